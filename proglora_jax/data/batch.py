"""What a batch is: its fields, the segment codes of its tokens, and the function that collates rows into one.

A batch is a dict of numpy arrays with static shapes for a bucket (T, K) and P image positions per image:

    tokens       i32[B,T]      image positions are expanded: P copies of the image token id per image; right padded
    segments     i8[B,T]       PAD, TEMPLATE, INSTRUCTION, IMAGE or ANSWER (below)
    length       i32[B]        number of real positions
    label_index  i32[B,K]      positions whose hidden state predicts a supervised token (its position minus 1); 0 if unused
    labels       i32[B,K]      the supervised token ids; 0 if unused
    label_mask   bool[B,K]     which of the K are used
    image        f32[B,H,W,3]  always there; zeros for text-only rows, so that every process runs the same program
    image_mask   bool[B]       rows with an image
    task_id      i32[B]        index of the task in the sequence
    weight       f32[B]        factor on the row's loss (1; lambda for replayed rows)
    example      i32[B]        index of the row in its task's list
    valid        bool[B]       False on rows that only fill the last batch

Evaluation batches have K = 0 and hold prompts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD = 0
"""Right padding."""
TEMPLATE = 1
"""BOS, system sentence, role tags, the line break after an image."""
INSTRUCTION = 2
"""Text of the human turns."""
IMAGE = 3
"""Image positions."""
ANSWER = 4
"""Assistant text and the EOS that closes it: the supervised tokens."""

QUESTION_FIELDS = ("tokens", "segments", "length", "task_id", "example", "valid")
"""What a question has of its own where questions share images (data/image_groups.py)."""
PREFIX_FIELDS = ("tokens", "segments", "task_id")
"""What the beginning that they share has."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One row before collation.

    Attributes:
        tokens: i32[n] with the image expanded.
        segments: i8[n] segment codes.
        image: f32[H,W,3] or None.
        task_id: index of the task in the sequence.
        weight: factor on the row's loss.
        example: index of the row in its task's list.
        valid: False on a filler row.
    """

    tokens: np.ndarray
    segments: np.ndarray
    image: np.ndarray | None
    task_id: int
    example: int
    weight: float = 1.0
    valid: bool = True


def collate(rows: Sequence[BatchRow], bucket: tuple[int, int], pad_id: int, image_shape: tuple[int, int]) -> Batch:
    """Collates rows into one batch.

    Args:
        rows: B rows; none may be longer than the bucket or, where K > 0, have more supervised tokens than it.
        bucket: (T, K), positions and supervised tokens per row; K = 0 leaves the labels out.
        pad_id: token id of padding.
        image_shape: (H, W) in pixels.

    Raises:
        ValueError: "row 3 has 70 positions and 5 supervised tokens; bucket (64, 16) is too small"
    """
    count, (positions, supervised) = len(rows), bucket
    batch = _empty(count, positions, supervised, pad_id, image_shape)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        answers = np.flatnonzero(row.segments == ANSWER) if supervised else np.zeros(0, np.int64)
        if n > positions or len(answers) > supervised:
            raise ValueError(f"row {i} has {n} positions and {len(answers)} supervised tokens; bucket {bucket} is too small")
        batch["tokens"][i, :n] = row.tokens
        batch["segments"][i, :n] = row.segments
        batch["length"][i] = n
        batch["label_index"][i, : len(answers)] = answers - 1
        batch["labels"][i, : len(answers)] = row.tokens[answers]
        batch["label_mask"][i, : len(answers)] = True
        if row.image is not None:
            batch["image"][i] = row.image
            batch["image_mask"][i] = True
        batch["task_id"][i] = row.task_id
        batch["weight"][i] = row.weight
        batch["example"][i] = row.example
        batch["valid"][i] = row.valid
    return batch


def _empty(count: int, positions: int, supervised: int, pad_id: int, image_shape: tuple[int, int]) -> Batch:
    return {
        "tokens": np.full((count, positions), pad_id, np.int32),
        "segments": np.full((count, positions), PAD, np.int8),
        "length": np.zeros(count, np.int32),
        "label_index": np.zeros((count, supervised), np.int32),
        "labels": np.zeros((count, supervised), np.int32),
        "label_mask": np.zeros((count, supervised), bool),
        "image": np.zeros((count, *image_shape, 3), np.float32),
        "image_mask": np.zeros(count, bool),
        "task_id": np.zeros(count, np.int32),
        "weight": np.zeros(count, np.float32),
        "example": np.zeros(count, np.int32),
        "valid": np.zeros(count, bool),
    }
