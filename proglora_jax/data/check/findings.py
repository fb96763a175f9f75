"""What a check of the data found: problems by kind, harmless remarks, a row of numbers per task; as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from proglora_jax.data.errors import write_file
from proglora_jax.data.scans import record_name

# {kind: (heading of its column, what it is, what training does with it)}, in the order of the report.
KINDS: dict[str, tuple[str, str, str]] = {
    "file": ("files", "files that are missing or cannot be read", "a run stops at them"),
    "schema": ("schema", "records that cannot be read",
               "a run stops at them, or leaves training records out with config.data.on_bad_record=skip_and_count"),
    "box": ("boxes", "boxes out of range or without area",
            "a run treats those out of range as it treats records that cannot be read; those without area are used as they are"),
    "reference": ("references", "questions that cannot be scored", "a run stops at those that the scorer refuses; others count as read"),
    "count": ("counts", "files of another size than expected", "a run uses what is there"),
    "missing_image": ("missing", "images that are missing", "a run stops, or goes on with config.data.on_bad_image=blank"),
    "corrupt_image": ("corrupt", "images that cannot be read", "a run stops, or goes on with config.data.on_bad_image=blank"),
    "truncated_image": ("cut off", "images that are cut off or damaged", "a run uses what can be decoded of them, as CoIN does"),
    "tokens": ("tokens", "records that cannot be encoded", "a run stops at them"),
    "over_long": ("too long", "records longer than the limit", "a run cuts their end off"),
    "unsupervised": ("untaught", "records without a supervised token",
                     "a run leaves them out and counts them, or stops with config.data.on_unsupervised=raise"),
    "duplicate": ("leaked", "questions on a picture that training asks too", "a run trains on them and scores them"),
}
POLICIES = ("stop", "skip_and_count")
IN_ORDER, BY_BUCKET, BY_LENGTH = "CoIN's order", "by bucket", "by length"
"""How batches are made: config.data.grouping=modality_length and bucket, and those of prompts."""
_PADDING = ("padding", "by bucket", "of prompts")  # heads of their columns
# What lets a run go on past problems of a kind at which it stops by default.
_SETTINGS = dict.fromkeys(("schema", "box"), "config.data.on_bad_record=skip_and_count") | dict.fromkeys(
    ("missing_image", "corrupt_image"), "config.data.on_bad_image=blank")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: one of KINDS.
        file: the JSON or auxiliary file.
        record: place of the record in the file, from 0; None for the file itself.
        id: the record's id as text.
        sentence: the whole message, file and record included.
        stops: whether training stops at it whatever the config says.
    """

    kind: str
    file: str
    record: int | None
    id: str
    sentence: str
    stops: bool


@dataclass(slots=True)
class FileRow:
    """Numbers of one JSON file.

    Attributes:
        path: the file.
        records: records in it, unreadable ones included.
        with_image: readable records with an image.
        turns: question-and-answer pairs; equals the readable records of an evaluation file.
        expected: how many records it should hold, as text; "" where nothing is expected.
        longest: positions of the longest record, after cutting; 0 without a tokenizer.
        supervised: most supervised tokens of a record; 0 without a tokenizer and for questions.
        mean: mean positions of the records that a run would use; 0 without a tokenizer.
        padding: {how batches are made: share of padding in them, percent}, of training "CoIN's order" and "by bucket", of questions
            "by length"; {} without a tokenizer.
    """

    path: str = ""
    records: int = 0
    with_image: int = 0
    turns: int = 0
    expected: str = ""
    longest: int = 0
    supervised: int = 0
    mean: float = 0.0
    padding: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class TaskRow:
    """Numbers of one task in one instruction set.

    Attributes:
        instruction_set, task: names.
        train, questions: its two files.
        images: distinct images that its records name.
        problems: {kind: number}; an image counts once in every task that uses it.
    """

    instruction_set: str
    task: str
    train: FileRow = field(default_factory=FileRow)
    questions: FileRow = field(default_factory=FileRow)
    images: int = 0
    problems: Counter[str] = field(default_factory=Counter)


class Findings:
    """Collects what a check finds, and reports it.

    Attributes:
        rows: one per task and instruction set.
        problems: in the order in which they were found.
        notes: {(what it is about, remark): (number, an example or "")}.
        images: distinct images in all.
        batching: how batches are made whose padding the rows tell, in words; "" without a tokenizer.
    """

    def __init__(self):
        self.rows: list[TaskRow] = []
        self.problems: list[Problem] = []
        self.notes: dict[tuple[str, str], tuple[int, str]] = {}
        self.images, self.batching = 0, ""

    def add(self, kind: str, file: str, reason: str, record: int | None = None, id: str = "", *, stops: bool = False) -> None:
        """Notes a problem of a file, or of one record of it.

        Args:
            kind, file, record, id, stops: see `Problem`.
            reason: the message; file and record are put before it, unless it is about the file itself and names it.
        """
        where = file if record is None else f"{file}: {record_name(record, id)}"
        sentence = " ".join((reason if reason.startswith(where) else f"{where}: {reason}").split())
        self.problems.append(Problem(kind, file, record, id, sentence, stops))

    def note(self, where: str, remark: str, count: int = 1, example: str = "") -> None:
        """Adds to the count of a harmless remark; the first example stays."""
        before, first = self.notes.get((where, remark), (0, ""))
        self.notes[where, remark] = (before + count, first or example)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def counts(self) -> dict[str, int]:
        """{kind: number of problems}, kinds without any left out."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def exit_status(self, policy: str) -> int:
        """1 if something is wrong and the policy is "stop", else 0."""
        return int(policy == "stop" and not self.ok)

    def lines(self, policy: str, shown: int = 10) -> Iterator[str]:
        """The report: problems by kind, remarks, the table, and one sentence that sums up.

        Args:
            policy: "stop" or "skip_and_count".
            shown: problems spelled out per kind; the rest is counted.
        """
        for kind, count in self.counts.items():
            _, title, consequence = KINDS[kind]
            yield f"{title}: {count:,} ({consequence})"
            some = (problem.sentence for problem in self.problems if problem.kind == kind)
            yield from (f"  {sentence}" for sentence, _ in zip(some, range(shown)))
            if count > shown:
                yield f"  and {count - shown:,} more"
        if self.notes:
            yield "remarks, nothing to do:"
            for (where, remark), (count, example) in self.notes.items():
                yield f"  {where}: {count:,} x {remark}{f', e.g. {example}' if example else ''}"
        yield from self._table()
        yield self._verdict(policy)

    def _table(self) -> Iterator[str]:
        kinds = [kind for kind in KINDS if any(row.problems[kind] for row in self.rows)]
        sets = len({row.instruction_set for row in self.rows}) > 1
        tokens = any(row.train.longest or row.questions.longest for row in self.rows)
        header = [*(["set"] if sets else []), "task", "train", "turns", "questions", "images",
                  *(["mean", "longest", "labels", "prompt", *_PADDING] if tokens else []), *(KINDS[kind][0] for kind in kinds)]
        body = [
            [*([row.instruction_set] if sets else []), row.task, _count(row.train), f"{row.train.turns:,}", _count(row.questions),
             f"{row.images:,}", *(_lengths(row) if tokens else []),
             *(f"{row.problems[kind]:,}" for kind in kinds)]
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
        left = 2 if sets else 1
        if tokens:
            yield self.batching
        for line in (header, *body):
            yield "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()

    def _verdict(self, policy: str) -> str:
        records = sum(row.train.records + row.questions.records for row in self.rows)
        walked = f"{records:,} records and {self.images:,} images checked"
        if self.ok:
            return f"{walked}: no problems"
        total = len(self.problems)
        if policy == "stop":
            return f"{walked}: {total:,} problem(s); repair them, or accept them with --policy skip_and_count"
        stops = sum(problem.stops for problem in self.problems)
        rest = f"; training stops at {stops:,} of them all the same, repair those" if stops else ""
        settings = dict.fromkeys(_SETTINGS[one.kind] for one in self.problems if one.kind in _SETTINGS and not one.stops)
        rest += f"; a run goes on at {'the others' if stops else 'them'} with {' and '.join(settings)}" if settings else ""
        return f"{walked}: {total:,} problem(s) counted and accepted{rest}"

    def to_dict(self, policy: str) -> dict:
        """Everything found, ready for JSON; no problem is left out."""
        return {
            "ok": self.ok,
            "policy": policy,
            "exit_status": self.exit_status(policy),
            "images": self.images,
            "batching": self.batching,
            "counts": self.counts,
            "stops_training": sum(problem.stops for problem in self.problems),
            "tasks": [asdict(row) | {"problems": dict(row.problems)} for row in self.rows],
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [
                {"where": where, "remark": remark, "count": count, "example": example}
                for (where, remark), (count, example) in self.notes.items()
            ],
        }

    def write_json(self, path: str, policy: str) -> None:
        """Writes `to_dict` to a file, whole or not at all.

        Raises:
            UserError: "<path>: cannot be written (...)"
        """
        write_file(path, json.dumps(self.to_dict(policy), indent=1) + "\n")


def _lengths(row: TaskRow) -> list[str]:
    train, questions = row.train, row.questions
    padding = (train.padding.get(IN_ORDER), train.padding.get(BY_BUCKET), questions.padding.get(BY_LENGTH))
    numbers = (round(train.mean), train.longest, train.supervised, questions.longest)
    return [*(f"{number:,}" for number in numbers), *("-" if share is None else f"{share:.1f}%" for share in padding)]


def _count(row: FileRow) -> str:
    """A file's records; beside them what was expected, where that is not a plain match."""
    found = f"{row.records:,}"
    return found if row.expected in ("", found) else f"{found} of {row.expected}"
