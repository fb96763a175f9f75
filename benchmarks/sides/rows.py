"""A batch for both sides: random words, an image a row, no padding; the last words are the answer."""

from __future__ import annotations

import numpy as np

from proglora_jax.data import batch as codes
from proglora_jax.models.presets import LlavaConfig

FIRST_WORD = 5
"""The first id of ordinary words."""


def random_batch(config: LlavaConfig, rows: int, positions: int, labels: int, *, first: int = FIRST_WORD) -> dict[str, np.ndarray]:
    """A batch of data/batch.py.

    Args:
        config: sizes; its image token is never drawn as a word.
        rows: B.
        positions: T, image included.
        labels: supervised tokens a row; 0 makes prompts.
        first: the first id of a word.
    """
    rng, side = np.random.default_rng(0), config.vision_config.image_size
    image, made = np.arange(2, 2 + config.image_tokens), []
    for index in range(rows):
        tokens = rng.integers(first, config.text_config.vocab_size, positions).astype(np.int32)
        tokens[tokens == config.image_token_id] = first
        segments = np.full(positions, codes.INSTRUCTION, np.int8)
        tokens[image], segments[image] = config.image_token_id, codes.IMAGE
        segments[positions - labels :] = codes.ANSWER
        picture = rng.standard_normal((side, side, 3), dtype=np.float32)
        made.append(codes.BatchRow(tokens, segments, picture, 0, index))
    return codes.collate(made, (positions, labels), config.pad_token_id, (side, side))
