"""What reading a whole file of records gives: those that can be read, and those that cannot with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that a reader refuses.

    Attributes:
        position: place in the file, from 0.
        id: id as text, "" where the record gives none.
        reason: why, without file and record.
        box: whether its reference box is at fault.
    """

    position: int
    id: str
    reason: str
    box: bool = False

    def __str__(self) -> str:
        return f"{record_name(self.position, self.id)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Scan(Generic[T]):
    """All records of a file.

    Attributes:
        records: those that can be read, in order.
        positions: place of each in the file, from 0.
        bad: those that cannot.
        notes: {kind of repair: number of records that needed it}.
    """

    records: list[T]
    positions: list[int]
    bad: list[BadRecord]
    notes: Counter[str]


def record_name(position: int, id: str) -> str:
    """Name of a record in messages: `record 3 (id 17)`."""
    return f"record {position} (id {id})" if id else f"record {position}"
