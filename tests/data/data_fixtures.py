"""Small tokenizers, images and data folders for the data tests."""

from __future__ import annotations

import json
import os

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from proglora_jax.data.templates import TEMPLATES

_CORPUS = [
    TEMPLATES["vicuna_v1"].system + " USER: hello ASSISTANT: world",
    "USER: What is the object in the image?\nAnswer the question using a single word or phrase. ASSISTANT: Toaster.",
    "USER USER US ER SUPER ASSISTANT AS SIST ANT 0.41, 0.28 [0.9] two 2 red blue yes no",
]


def save_tokenizer(folder: str, style: str = "first", image: bool = True) -> str:
    """Trains a sentencepiece-like BPE with byte fallback and saves it as a Hugging Face folder.

    Args:
        folder: where to.
        style: "first" marks only the very start of a text (as transformers does with legacy=False), "always" also what
            follows a special token (legacy=True), "prepend" the same by a normaliser (older tokenizer.json files).
        image: whether there is an `<image>` token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(_CORPUS * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if style == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    extra = {"extra_special_tokens": {"image_token": "<image>"}} if image else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    ).save_pretrained(folder)
    return folder


def save_pattern(path: str, width: int, height: int) -> str:
    """Writes the image with R = 3x + 5y, G = 7x + 2y, B = x * y // 97, all mod 256, as PNG."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([(3 * x + 5 * y) % 256, (7 * x + 2 * y) % 256, (x * y // 97) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def write_json(path: str, content: object) -> str:
    """Writes JSON, making folders."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return path


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """CoIN's `conversations` list of (human, gpt) pairs."""
    return [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)]
