"""Tiny random BERT and ViT folders of transformers (torch), with tokenizer and image processor; nothing is downloaded."""

from __future__ import annotations

import json
import pathlib

import tiny_hf
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"?.,:[]'-", *(f"##{letter}" for letter in LETTERS),
    "what", "is", "the", "object", "in", "image", "color", "word", "##ing", "answer",
)  # fmt: skip


def bert(folder: pathlib.Path, seed: int = 0, **sizes) -> transformers.BertModel:
    """A random BERT, saved with a WordPiece tokenizer that lower-cases."""
    config = transformers.BertConfig(
        **dict(vocab_size=len(WORDS), hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4,
               max_position_embeddings=40) | sizes
    )
    model = tiny_hf.randomise(transformers.BertModel(config).eval(), seed)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    fields = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": config.max_position_embeddings}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return model


def vit(folder: pathlib.Path, seed: int = 0, **sizes) -> transformers.ViTModel:
    """A random ViT, saved with the image processor's settings as vit-base-patch16-224 has them."""
    config = transformers.ViTConfig(
        **dict(hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4) | sizes
    )
    model = tiny_hf.randomise(transformers.ViTModel(config).eval(), seed)
    model.save_pretrained(folder)
    side = config.image_size
    fields = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "ViTImageProcessor", "resample": 2, "rescale_factor": 1 / 255, "size": {"height": side, "width": side},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return model


def save_renamed(folder: pathlib.Path, rename, *, torch_file: bool) -> None:
    """Writes a folder's weights under other names, as safetensors or as torch.save does; `rename` gives None for tensors to leave out."""
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name}
    path.unlink()
    if torch_file:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
