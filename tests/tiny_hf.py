"""Tiny random LLaVAs of transformers (torch), the oracle for models and checkpoints; nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
import transformers

IMAGE_TOKEN, PAD, VOCAB = 61, 60, 64

# Llama and CLIP sizes that stress different things; each differs from the defaults in what its name says.
CASES = {
    "plain": ({}, {}, {}),
    "grouped": (dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=36), dict(num_hidden_layers=2), {}),
    "odd_widths": (
        dict(hidden_size=30, intermediate_size=41, num_attention_heads=3, num_key_value_heads=3, head_dim=6, rms_norm_eps=1e-5),
        dict(hidden_size=20, intermediate_size=23, num_attention_heads=5, image_size=9, patch_size=3),
        dict(vision_feature_layer=1),
    ),
    "tied_full": (
        dict(num_hidden_layers=1, tie_word_embeddings=True),
        {},
        dict(vision_feature_select_strategy="full", vision_feature_layer=-1),
    ),
    "theta": (dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), dict(hidden_act="gelu"), {}),
}


def make(case: str = "plain", seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """A random LLaVA whose weights are large enough for every layer to matter."""
    text, vision, rest = CASES[case]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
    ids = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    text_config = transformers.LlamaConfig(**{**sizes, **ids, **text})
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, projection_dim=8)
    vision_config = transformers.CLIPVisionConfig(**{**sizes, "image_size": 8, "patch_size": 4, **vision})
    tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + (rest.get("vision_feature_select_strategy") == "full")
    config = transformers.LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=tokens,
        pad_token_id=PAD,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **rest,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    return randomise(model, seed)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws all parameters anew: the library's own start has norms at one, biases at zero and nearly linear layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else noise * (0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5))
    return model


def batch(model: transformers.LlavaForConditionalGeneration, rng: np.random.Generator, lengths=(14, 17, 6), images=(True, True, False)):
    """Right-padded rows, some with an image: (tokens i32[B, T], length i32[B], image f32[B, H, W, 3])."""
    config = model.config
    count, side = config.image_seq_length, config.vision_config.image_size
    tokens = np.full((len(lengths), max(lengths) + count), PAD, np.int32)
    length = np.array([n + count * has for n, has in zip(lengths, images)], np.int32)
    image = np.zeros((len(lengths), side, side, 3), np.float32)
    for row, has in enumerate(images):
        tokens[row, : length[row]] = rng.integers(3, PAD, length[row])
        if has:
            tokens[row, 3 : 3 + count] = IMAGE_TOKEN
            image[row] = rng.standard_normal((side, side, 3))
    return tokens, length, image


def torch_inputs(tokens: np.ndarray, length: np.ndarray, image: np.ndarray) -> dict[str, torch.Tensor]:
    """The same batch as transformers takes it: pixels only of the rows that have an image."""
    has = (tokens == IMAGE_TOKEN).any(axis=1)
    inputs = dict(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(np.arange(tokens.shape[1])[None] < length[:, None]).long(),
    )
    if has.any():
        inputs["pixel_values"] = torch.tensor(image[has].transpose(0, 3, 1, 2))
    return inputs
