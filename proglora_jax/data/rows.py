"""Training rows encoded once into flat arrays, so that a plan can be made of their lengths and batches of their tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging

from proglora_jax.data.batch import IMAGE, BatchRow
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.schema import TrainRow
from proglora_jax.data.tokens import Encoded, Encoder

UNSUPERVISED_POLICIES = ("drop", "raise")
# Records tokenised per call: enough for the tokenizer's own threads, little memory.
_CHUNK = 512
# Records that a warning names.
_NAMED = 5


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Encoded training rows.

    Attributes:
        rows: where each came from.
        tokens: i32[*] all tokens behind one another, each image as one position.
        segments: i8[*] their segment codes.
        starts: i64[n+1] where each row starts in them.
        lengths: i64[n] positions per row with the image expanded.
        labels: i64[n] supervised tokens per row.
        has_image: bool[n].
        encoder: what encoded them.
        counts: how many rows were truncated, had empty answers, or were left out without a supervised token.
    """

    rows: tuple[TrainRow, ...]
    tokens: np.ndarray
    segments: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    has_image: np.ndarray
    encoder: Encoder
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int, image: np.ndarray | None) -> BatchRow:
        """One row ready for collation, with its image (f32[H,W,3] or None)."""
        part = slice(self.starts[number], self.starts[number + 1])
        tokens, segments = self.tokens[part], self.segments[part]
        if self.has_image[number]:
            repeats = np.where(segments == IMAGE, self.encoder.image_tokens, 1)
            tokens, segments = np.repeat(tokens, repeats), np.repeat(segments, repeats)
        source = self.rows[number]
        return BatchRow(tokens, segments, image, source.task_id, source.index, source.weight)

    def describe(self, number: int) -> str:
        """Name of a row for messages, e.g. `GQA record 2354786 (number 17 of its file)`."""
        row = self.rows[number]
        return f"{row.example.task} record {row.example.id} (number {row.index} of its file)"

    def digest(self) -> str:
        """sha256 of what is trained on: tokens, segments, ids, image names, tasks, weights; not of where the data lies."""
        names = [(r.example.task, r.example.id, os.path.basename(r.example.image or ""), r.task_id, r.index, r.weight) for r in self.rows]
        arrays = (self.tokens.astype("<i4"), self.segments, self.starts.astype("<i8"))
        digest = hashlib.sha256(repr(names).encode("utf-8", "replace"))
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


def encode_rows(rows: Sequence[TrainRow], encoder: Encoder, on_unsupervised: str = "drop") -> EncodedRows:
    """Encodes all rows; counts of truncated rows, empty answers and rows left out are logged once.

    Args:
        rows: training rows.
        encoder: how text becomes tokens.
        on_unsupervised: for rows without a supervised token (empty answers, or cut off before the answer): "drop" leaves
            them out and counts them, "raise" names them in an error.

    Raises:
        UserError: "config.data.on_unsupervised=x: ...", "training rows: 2 problem(s): GQA record 7: no answer left within 2048
            positions; ...", or "training rows: none of the 5 has a supervised token; ..."
    """
    if on_unsupervised not in UNSUPERVISED_POLICIES:
        raise UserError(f"config.data.on_unsupervised={on_unsupervised}: choose one of {', '.join(UNSUPERVISED_POLICIES)}")
    kept, encoded, problems = [], [], []
    counts = {"truncated": 0, "empty_answers": 0, "unsupervised": 0}
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for row, item in zip(chunk, encoder.encode_examples([row.example for row in chunk])):
            counts["truncated"] += item.truncated
            counts["empty_answers"] += item.empty_answers
            if item.supervised:
                kept.append(row)
                encoded.append(_compact(item, encoder))
                continue
            counts["unsupervised"] += 1
            problems.append(f"{row.example.task} record {row.example.id}: {why_unsupervised(item, encoder)}")
    if on_unsupervised == "raise":
        raise_collected(problems, "training rows", "Repair them, raise config.data.max_length, or set config.data.on_unsupervised=drop.")
    if not kept:
        raise UserError(
            f"training rows: none of the {len(rows)} has a supervised token within {encoder.max_length} positions; "
            "check the answers in the task's file and config.data.max_length"
        )
    for name, count in counts.items():
        if count:
            logging.warning("Of %d training rows, %s: %d.", len(rows), name.replace("_", " "), count)
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        logging.warning("Left out: %s%s.", "; ".join(problems[:_NAMED]), more)
    return _pack(kept, encoded, encoder, counts)


def why_unsupervised(item: Encoded, encoder: Encoder) -> str:
    """Why a record has no supervised token."""
    return f"no answer left within {encoder.max_length} positions" if item.truncated else "no answer that is not empty"


def _compact(item: Encoded, encoder: Encoder) -> Encoded:
    """The record with its run of image positions shrunk to one: a hundred thousand rows then fit into memory easily.

    A run that was cut short cannot be restored, but then no answer is left either and the row is not kept.
    """
    image = np.flatnonzero(item.segments == IMAGE)
    if len(image) <= 1:
        return item
    keep = np.r_[0 : image[0] + 1, image[-1] + 1 : len(item.tokens)]
    return Encoded(item.tokens[keep], item.segments[keep], item.truncated, item.empty_answers)


def _pack(kept: list[TrainRow], encoded: list[Encoded], encoder: Encoder, counts: dict[str, int]) -> EncodedRows:
    sizes = np.asarray([len(item.tokens) for item in encoded], np.int64)
    has_image = np.asarray([item.has_image for item in encoded])
    return EncodedRows(
        rows=tuple(kept),
        tokens=np.concatenate([item.tokens for item in encoded]),
        segments=np.concatenate([item.segments for item in encoded]),
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        lengths=sizes + has_image * (encoder.image_tokens - 1),
        labels=np.asarray([item.supervised for item in encoded], np.int64),
        has_image=has_image,
        encoder=encoder,
        counts=counts,
    )
