"""How much of what batches compute is padding: the positions of their rows against those that they are padded to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Padding:
    """Positions of some batches.

    Attributes:
        positions: of their rows; rows that only fill a batch have none.
        padded_positions: of the batches: each as many as its rows times its padded length.
        batches: {padded length: how many batches have it}, growing.
    """

    positions: int = 0
    padded_positions: int = 0
    batches: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, positions: int, lengths: Iterable[int], rows: int) -> Padding:
        """The padding of batches.

        Args:
            positions: of the rows of all of them.
            lengths: padded length of each.
            rows: rows of each, fillers included.
        """
        found, counts = np.unique(np.asarray(list(lengths), np.int64), return_counts=True)
        batches = dict(zip(found.tolist(), counts.tolist()))
        return cls(int(positions), int(rows * (found * counts).sum()), batches)

    @property
    def share(self) -> float:
        """Share of the padded positions that hold no token, 0 to 1."""
        return 1.0 - self.positions / self.padded_positions if self.padded_positions else 0.0

    def __add__(self, other: Padding) -> Padding:
        lengths = sorted({*self.batches, *other.batches})
        batches = {length: self.batches.get(length, 0) + other.batches.get(length, 0) for length in lengths}
        return Padding(self.positions + other.positions, self.padded_positions + other.padded_positions, batches)

    def __str__(self) -> str:
        """"4.4 % padding; batches by padded length: 672: 927, 704: 3"."""
        listed = ", ".join(f"{length}: {count:,}" for length, count in self.batches.items())
        return f"{100 * self.share:.1f} % padding; batches by padded length: {listed}"

    def to_json(self) -> dict[str, Any]:
        """The fields for a record; lengths as text, as keys in JSON are."""
        batches = {str(length): count for length, count in self.batches.items()}
        return {"positions": self.positions, "padded_positions": self.padded_positions, "batches": batches}

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> Padding | None:
        """What `to_json` gave, or None where a record does not have it."""
        if not found or not found.get("padded_positions"):
            return None
        batches = {int(length): int(count) for length, count in (found.get("batches") or {}).items()}
        return cls(int(found["positions"]), int(found["padded_positions"]), batches)


def padding_by_length(sizes: np.ndarray, tops: Sequence[int], rows: int) -> Padding:
    """The padding of batches of rows sorted by padded length, the last one filled up; as prompts are batched.

    Args:
        sizes: i64[n] positions of the rows.
        tops: padded lengths, growing; the last one holds every row.
        rows: rows of a batch.
    """
    padded = np.asarray(tops, np.int64)[np.sort(np.searchsorted(tops, sizes))]
    return Padding.of(int(np.sum(sizes)), (padded[start : start + rows][-1] for start in range(0, len(padded), rows)), rows)
