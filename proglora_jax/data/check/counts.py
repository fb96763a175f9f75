"""How many records each file of the benchmark should hold, and the comparison with what is there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

COUNT_MODES = ("published", "any")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a file should hold.

    Attributes:
        low, high: records, both included.
        with_image: records with an image, or None where all records have one or the number is unknown.
        answers: distinct reference answers, or None where there is no fixed set of them.
        source: who says so.
    """

    low: int
    high: int
    with_image: int | None = None
    answers: int | None = None
    source: str = "the published file"

    @property
    def range(self) -> str:
        """The number or range as text, e.g. "12,726" or "165,000 to 166,000"."""
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def _exactly(records: int, with_image: int | None = None, answers: int | None = None) -> Expected:
    return Expected(records, records, with_image, answers)


def _about(records: int) -> Expected:
    """Within 1 %: for files whose exact size nobody has published."""
    return Expected(round(0.99 * records), round(1.01 * records))


# {task: (training file, evaluation file)}. Source: CoIN's files and scripts; the papers' table 4 rounds them. Grounding's training
# file and OCR-VQA's two are known about; of VQAv2's evaluation file only the upper bound, all of val2014, is.
PUBLISHED: dict[str, tuple[Expected, Expected]] = {
    "ScienceQA": (_exactly(12_726, with_image=6_218), _exactly(4_241, with_image=2_017)),
    "TextVQA": (_exactly(34_602), _exactly(5_000)),
    "ImageNet": (_exactly(129_833), _exactly(5_050, answers=100)),
    "GQA": (_exactly(72_140), _exactly(12_578)),
    "VizWiz": (_exactly(20_523), _exactly(4_319)),
    "Grounding": (_about(55_885), _exactly(30_969)),
    "VQAv2": (_exactly(82_783), Expected(1, 214_354)),
    "OCRVQA": (Expected(165_000, 166_000), _about(100_000)),
}


def expected_counts(root: str, mode: str = "published") -> dict[str, tuple[Expected, Expected]]:
    """{task: (training file, evaluation file)}: of the embedded benchmark's own manifest where root holds one, else as published.

    Args:
        root: the data root.
        mode: "published", or "any" for no expectation ({}).
    """
    if mode == "any":
        return {}
    try:
        with open(os.path.join(root, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["benchmark"] != "coin_mini":
            return PUBLISHED
        records = {name: int(count) for name, count in manifest["records"].items()}
        return {task: tuple(Expected(n, n, source="its manifest.json") for n in (records[f"{task}/train"], records[f"{task}/test"]))
                for task in manifest["tasks"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return PUBLISHED


def count_problems(expected: Expected, records: int, with_image: int, answers: int) -> list[str]:
    """One clause for each way in which a file differs from what is expected.

    Args:
        expected: what should be there.
        records: records in the file, unreadable ones included.
        with_image: readable records with an image.
        answers: distinct reference answers.
    """
    problems = []
    if not expected.low <= records <= expected.high:
        problems.append(f"holds {records:,} records, but {expected.source} has {expected.range}")
    if expected.with_image is not None and with_image != expected.with_image:
        problems.append(f"holds {with_image:,} records with an image, but {expected.source} has {expected.with_image:,}")
    if expected.answers is not None and answers != expected.answers:
        problems.append(f"has {answers:,} distinct answers, but {expected.source} has {expected.answers:,}")
    return problems
