"""Which rows form which batch: a deterministic plan, made with numpy before training starts.

A batch of the plan is one optimizer step of all devices. Its bucket (T, K) is the smallest one that fits all its rows, so
every step has one of a few static shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging

from proglora_jax.data.errors import UserError
from proglora_jax.data.padding import Padding

Bucket = tuple[int, int]
GROUPINGS = ("modality_length", "bucket", "none")
REMAINDERS = ("drop", "wrap")
BUCKETS: tuple[Bucket, ...] = (
    (320, 64), (672, 64), (704, 128), (768, 128), (832, 256), (960, 256), (1280, 512), (1536, 1024), (2048, 2048),
)  # fmt: skip
"""The default for LLaVA-1.5, whose images have 576 positions: one for batches without images, and steps that grow with the length.

A record of one short question has 635 to 660 positions with its image, most of them more than 640; hence 672. Why these,
and what others would do: benchmarks/padding.py.
"""
PROMPT_LENGTHS = (256, 640, 704, 1024, 2048)
"""The default for prompts; batches of questions are made by length, so that fewer will do."""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of a phase, in order.

    Attributes:
        buckets: shapes (T, K), from small to large.
        bucket: i32[N] index into `buckets` per batch.
        rows: i64[N, B] row numbers per batch.
        epoch: i32[N] pass over the data that a batch belongs to.
        dropped: rows left out because they did not fill a batch, all epochs together.
        positions: i64[N] positions of a batch's rows, without padding.
    """

    buckets: tuple[Bucket, ...]
    bucket: np.ndarray
    rows: np.ndarray
    epoch: np.ndarray
    dropped: int
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def batch_size(self) -> int:
        """Rows per batch, all processes together."""
        return self.rows.shape[1]

    def padding(self) -> Padding:
        """What of the batches is padding."""
        return Padding.of(self.positions.sum(), (self.buckets[place][0] for place in self.bucket), self.batch_size)

    def digest(self) -> str:
        """sha256 of the whole plan."""
        parts = (repr(self.buckets).encode(), self.bucket.astype("<i4").tobytes(), self.rows.astype("<i8").tobytes())
        return hashlib.sha256(b"|".join((repr(self.rows.shape).encode(), *parts))).hexdigest()


def plan_batches(
    lengths: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    has_image: Sequence[bool] | np.ndarray,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    seed: int,
    epochs: int = 1,
    max_steps: int = 0,
    grouping: str = "modality_length",
    remainder: str = "drop",
    chunks: int = 1,
    image_positions: int = 0,
) -> BatchPlan:
    """Plans the batches of a phase.

    Args:
        lengths: positions per row, image included.
        labels: supervised tokens per row.
        has_image: per row.
        batch_size: rows per optimizer step, all devices and accumulation steps together.
        buckets: shapes (T, K), both growing.
        seed: any integer; every epoch is shuffled anew.
        epochs: passes over the rows.
        max_steps: where above 0, that many batches instead: rows are repeated or cut as needed.
        grouping: "modality_length" (CoIN: nearly every batch all image or all text, chunks of equal total length),
            "bucket" (rows of one bucket together: fewest padded positions), "none" (plain shuffle).
        remainder: "drop" leaves the last partial batch of an epoch out, "wrap" fills it from the epoch's first rows.
        chunks: equal parts of a batch, each of consecutive rows, that should have about the same total length ("modality_length" only):
            the groups within which the loss is averaged, in LLaVA one per device and accumulation step.
        image_positions: positions of an image, which the lengths of chunks leave out, as LLaVA's do.

    Raises:
        UserError: "config.train.batch_size=32: only 20 rows; lower it or set config.data.remainder=wrap", and the like for every field.

    Source: LLaVA's group_by_modality_length, with token counts for word counts.
    """
    lengths, labels, has_image = np.asarray(lengths, np.int64), np.asarray(labels, np.int64), np.asarray(has_image, bool)
    _check(len(lengths), batch_size, epochs, max_steps, grouping, remainder, chunks)
    buckets = check_buckets(buckets)
    row_bucket = row_buckets(lengths, labels, buckets)
    batches, epoch_of, dropped, epoch = [], [], 0, 0
    while (len(batches) < max_steps) if max_steps else (epoch < epochs):
        rng = np.random.default_rng([seed & 0xFFFFFFFF, epoch])
        if grouping == "modality_length":
            stream = _modality_stream(rng, lengths - image_positions * has_image, has_image, batch_size, chunks)
        elif grouping == "bucket":
            stream = _bucket_stream(rng, row_bucket, batch_size)
        else:
            stream = rng.permutation(len(lengths))
        partial = len(stream) % batch_size
        if partial and remainder == "wrap":
            stream = np.concatenate([stream, np.resize(stream, batch_size - partial)])
        elif partial:
            stream, dropped = stream[:-partial], dropped + partial
        batches.extend(stream.reshape(-1, batch_size))
        epoch_of += [epoch] * (len(batches) - len(epoch_of))
        epoch += 1
    if dropped:
        logging.info("Batch plan: %d rows left out in %d epochs because they do not fill a batch of %d.", dropped, epoch, batch_size)
    steps = max_steps or len(batches)
    rows = np.stack(batches[:steps])
    bucket = row_bucket[rows].max(axis=1).astype(np.int32)
    return BatchPlan(buckets, bucket, rows, np.asarray(epoch_of[:steps], np.int32), dropped, lengths[rows].sum(axis=1))


def check_buckets(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets as a tuple, refused unless both T and K grow (K may stay equal).

    Raises:
        UserError: "config.data.buckets=[...]: ..."
    """
    given = tuple((int(t), int(k)) for t, k in buckets)
    if not given or any(t < 1 or k < 0 for t, k in given):
        raise UserError(f"config.data.buckets={list(given)}: needs at least one (positions, supervised tokens) pair, positions above 0")
    if any(b[0] <= a[0] or b[1] < a[1] for a, b in zip(given, given[1:])):
        raise UserError(f"config.data.buckets={list(given)}: must grow in positions and must not shrink in supervised tokens")
    return given


def row_buckets(lengths: np.ndarray, labels: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """i64[n] smallest bucket that fits each row.

    Raises:
        UserError: "3 rows do not fit the largest bucket (704, 64); the longest has ..."
    """
    by_length = np.searchsorted([t for t, _ in buckets], lengths, side="left")
    by_labels = np.searchsorted([k for _, k in buckets], labels, side="left")
    chosen = np.maximum(by_length, by_labels)
    misfits = np.count_nonzero(chosen >= len(buckets))
    if misfits:
        raise UserError(
            f"config.data.buckets: {misfits} rows do not fit the largest bucket {buckets[-1]}; the longest row has {lengths.max()} "
            f"positions, and the most supervised tokens are {labels.max()}; enlarge the bucket, or lower config.data.max_length or "
            "config.data.max_labels"
        )
    return chosen


def main_bucket(buckets: Sequence[Bucket], image_positions: int) -> Bucket:
    """The bucket that plans and estimates are made for: the first that holds an image and text; the last where none does.

    Args:
        buckets: shapes (T, K), growing; those for rows without images come first.
        image_positions: positions of an image.
    """
    return next((bucket for bucket in buckets if bucket[0] > image_positions), buckets[-1])


def suggest_buckets(lengths: Sequence[int], labels: Sequence[int], count: int = 1, multiple: int = 64) -> tuple[Bucket, ...]:
    """Buckets that fit all rows, cut at even quantiles of the lengths and rounded up to `multiple` positions.

    Args:
        lengths: positions per row.
        labels: supervised tokens per row.
        count: most buckets; fewer come back where rounding makes some equal.
        multiple: T is rounded up to this; K to an eighth of it.
    """
    lengths, labels = np.asarray(lengths, np.int64), np.asarray(labels, np.int64)
    limits = [int(np.quantile(lengths, (i + 1) / count, method="higher")) for i in range(count)]
    tops = sorted({-(-limit // multiple) * multiple for limit in limits})
    step = max(1, multiple // 8)
    return tuple((top, int(-(-labels[lengths <= top].max(initial=1) // step) * step)) for top in tops)


def _check(count, batch_size, epochs, max_steps, grouping, remainder, chunks) -> None:
    if grouping not in GROUPINGS:
        raise UserError(f"config.data.grouping={grouping}: choose one of {', '.join(GROUPINGS)}")
    if remainder not in REMAINDERS:
        raise UserError(f"config.data.remainder={remainder}: choose one of {', '.join(REMAINDERS)}")
    if batch_size < 1 or chunks < 1 or batch_size % chunks:
        raise UserError(f"config.train.batch_size={batch_size}: must be above 0 and divisible by its {chunks} chunks")
    if max_steps < 0 or (max_steps == 0 and epochs < 1):
        raise UserError(f"config.train.epochs={epochs}, config.train.max_steps={max_steps}: train for at least one epoch or one step")
    if count == 0:
        raise UserError("no training rows are left; check the task's files and config.data.train_examples")
    if count < batch_size and remainder == "drop":
        raise UserError(f"config.train.batch_size={batch_size}: only {count} rows; lower it or set config.data.remainder=wrap")


def _modality_stream(rng, lengths, has_image, batch_size, chunks) -> np.ndarray:
    """Row numbers in training order; every `batch_size` of them but the last few are of one modality."""
    kinds = [np.flatnonzero(has_image == kind) for kind in (True, False)]
    groups = []
    for members in (kind for kind in kinds if len(kind)):
        shuffled = rng.permutation(members)
        cuts = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
        groups.append([_balanced(cut, lengths, chunks) for cut in cuts])
    if len(groups) == 1:
        return np.concatenate(groups[0])
    # The last of each kind, full or not, goes to the end in file order; mixing is confined to there.
    rest = groups[0][:-1] + groups[1][:-1]
    last = np.sort(np.concatenate([groups[0][-1], groups[1][-1]]))
    return np.concatenate([*(rest[i] for i in rng.permutation(len(rest))), last])


def _balanced(rows: np.ndarray, lengths: np.ndarray, chunks: int) -> np.ndarray:
    """The rows by falling length, dealt into equally large chunks: each to the chunk that is shortest so far."""
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    if len(rows) % chunks:
        return np.concatenate([ordered[i::chunks] for i in range(chunks)])
    share = len(rows) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = np.zeros(chunks)
    for row in ordered:
        shortest = int(np.argmin(totals))
        dealt[shortest].append(int(row))
        totals[shortest] = np.inf if len(dealt[shortest]) == share else totals[shortest] + lengths[row]
    return np.asarray([row for chunk in dealt for row in chunk], np.int64)


def _bucket_stream(rng, row_bucket, batch_size) -> np.ndarray:
    """Row numbers such that each batch comes from one bucket; what does not fill a batch moves to the next larger bucket."""
    batches, rest = [], np.zeros(0, np.int64)
    for bucket in np.unique(row_bucket):
        pool = np.concatenate([rest, rng.permutation(np.flatnonzero(row_bucket == bucket))])
        full = len(pool) // batch_size * batch_size
        batches += list(pool[:full].reshape(-1, batch_size))
        rest = pool[full:]
    return np.concatenate([*(batches[i] for i in rng.permutation(len(batches))), rest])
