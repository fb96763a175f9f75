"""What the records of a file would be padded to: shares of padding in training batches and in prompts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from proglora_jax.data.errors import UserError
from proglora_jax.data.padding import padding_by_length
from proglora_jax.data.plan import BUCKETS, PROMPT_LENGTHS, Bucket, plan_batches


@dataclass(frozen=True)
class Batching:
    """How a run would make batches.

    Attributes:
        rows: rows of a step, and questions at once; as many as there are where these are fewer.
        buckets: of training; those beyond the longest record that a run keeps give way to one that just holds it.
        prompts: padded lengths of prompts; as `buckets`.
    """

    rows: int = 64
    buckets: tuple[Bucket, ...] = BUCKETS
    prompts: tuple[int, ...] = PROMPT_LENGTHS

    @classmethod
    def stated(cls, rows: int, tops: Sequence[int]) -> Batching:
        """With the padded lengths that somebody named, for records and prompts alike; none takes the defaults.

        Raises:
            UserError: "--batch-rows 0: ..."; "--buckets 704 672: ..."
        """
        if rows < 1:
            raise UserError(f"--batch-rows {rows}: must be 1 or more")
        if any(top < 1 for top in tops) or any(b <= a for a, b in zip(tops, tops[1:])):
            raise UserError(f"--buckets {' '.join(map(str, tops))}: padded lengths must grow, from 1 on")
        return cls(rows, tuple((top, top) for top in tops), tuple(tops)) if tops else cls(rows)


@dataclass
class Sizes:
    """Sizes of the records of a file that a run would use.

    Attributes:
        lengths: positions of each.
        labels: supervised tokens of each; 0 for questions.
        pictured: 1 for those with image positions.
    """

    lengths: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("q"))
    pictured: array = field(default_factory=lambda: array("b"))

    def add(self, length: int, labels: int, pictured: bool) -> None:
        """Adds a record."""
        self.lengths.append(length)
        self.labels.append(labels)
        self.pictured.append(pictured)

    def mean(self) -> float:
        """Mean length; 0 without records."""
        return sum(self.lengths) / max(1, len(self.lengths))

    def training_padding(self, batching: Batching, most: int, grouping: str) -> float:
        """Share of padding in an epoch's batches, 0 to 1; 0 without records.

        Args:
            batching: how batches are made.
            most: positions of the longest record that a run keeps.
            grouping: as config.data.grouping.
        """
        if not self.lengths:
            return 0.0
        buckets = (*((length, labels) for length, labels in batching.buckets if length < most), (most, most))
        plan = plan_batches(
            self.lengths, self.labels, np.asarray(self.pictured, bool), batch_size=min(batching.rows, len(self.lengths)), buckets=buckets,
            seed=0, grouping=grouping)
        return plan.padding().share

    def prompt_padding(self, batching: Batching, most: int) -> float:
        """Share of padding in the batches of prompts, 0 to 1; `most` as above."""
        tops = [*(length for length in batching.prompts if length < most), most]
        return padding_by_length(np.asarray(self.lengths, np.int64), tops, min(batching.rows, len(self.lengths))).share
