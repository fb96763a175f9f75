"""Checks the records of one task: what the readers refuse, counts, boxes, references, answers and lengths."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from proglora_jax.data.box_text import BoxError, parse_box
from proglora_jax.data.check.counts import Expected, count_problems
from proglora_jax.data.check.findings import FileRow, Findings, Problem
from proglora_jax.data.check.images import ImageUses
from proglora_jax.data.check.lengths import Sizes
from proglora_jax.data.check.progress import progress
from proglora_jax.data.errors import UserError
from proglora_jax.data.rows import why_unsupervised
from proglora_jax.data.scans import Scan
from proglora_jax.data.schema import Example, Question
from proglora_jax.data.tasks import TaskData, read_auxiliary_file
from proglora_jax.data.templates import bare_question
from proglora_jax.data.tokens import Encoded, Encoder

# (scorer, questions, auxiliary files) -> (index, reason) of every question that could not be scored.
ReferenceCheck = Callable[[str, Sequence[Question], Mapping[str, object]], list[tuple[int, str]]]
# Records tokenised per call: enough for the tokenizer's own threads, little memory.
_CHUNK = 512
_NO_IMAGE = -1


@dataclass
class SeenFile:
    """What is kept of a file after its records have been checked; a training record has one entry per turn in the last two.

    Attributes:
        path: the file.
        ids: id per readable record.
        positions: place in the file per readable record.
        images: number of the image per readable record, -1 for none.
        owners: readable record of each question.
        questions: hash of each question without its instruction.
        sizes: {readable record: image size that the record claims}.
        auxiliary: paths of the auxiliary files that belong to it.
        problems: a training file's: what was found in it for this task.
        usable: sizes of the records that a run would use; empty without a tokenizer.
    """

    path: str = ""
    ids: list[str] = field(default_factory=list)
    positions: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("q"))
    owners: array = field(default_factory=lambda: array("q"))
    questions: array = field(default_factory=lambda: array("q"))
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    auxiliary: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    usable: Sizes = field(default_factory=Sizes)

    def add(self, record: Example | Question, position: int, uses: ImageUses, texts: Sequence[str]) -> None:
        """Keeps a record's image and the hashes of its questions."""
        self.owners.extend([len(self.ids)] * len(texts))
        self.questions.extend(hash(bare_question(text, record.task).strip()) for text in texts)
        self.ids.append(record.id)
        self.positions.append(position)
        self.images.append(_NO_IMAGE if record.image is None else uses.add(record.image, self.path, position, record.id))


class RecordChecker:
    """Checks files of records; everything that is wrong goes into its findings.

    Attributes:
        findings: where to.
        uses: images that the records name.
    """

    def __init__(self, findings: Findings, uses: ImageUses, encoder: Encoder | None, references: ReferenceCheck | None):
        """Args: findings, uses: filled; encoder: how text becomes tokens, or None not to check lengths; references: see above."""
        self.findings, self.uses = findings, uses
        self._encoder, self._references = encoder, references
        self._auxiliary: dict[str, dict | None] = {}

    def check_train(self, data: TaskData, row: FileRow, expected: Expected | None) -> SeenFile:
        """Checks a task's training file and fills its row."""
        seen = SeenFile(data.train_path)
        scan = self._scan(data.scan_train, seen.path, stops=False)  # config.data.on_bad_record
        if scan is None:
            return seen
        for example, position in zip(scan.records, scan.positions):
            seen.add(example, position, self.uses, [human for human, _ in example.turns])
            if data.answers_are_boxes:
                self._check_answer_boxes(example, seen.path, position)
            if self._encoder is None and not any(gpt.strip() for _, gpt in example.turns):
                self.findings.add("unsupervised", seen.path, "no answer that is not empty", position, example.id)
        empty = [sum(not gpt.strip() for _, gpt in example.turns) for example in scan.records]
        among_others = sum(count for count, example in zip(empty, scan.records) if count < len(example.turns))
        if among_others:
            self.findings.note(seen.path, "an empty answer among others (config.data.empty_answer says what becomes of it)", among_others)
        self._finish(scan, seen, row, expected, ())
        if self._encoder is not None:
            self._encode(scan, seen, row, self._encoder.encode_examples, self._judge_example)
        return seen

    def check_questions(self, data: TaskData, row: FileRow, expected: Expected | None) -> SeenFile:
        """Checks a task's evaluation file and its auxiliary files, and fills the row."""
        seen = SeenFile(data.path(data.task.eval_file))
        paths = data.auxiliary_paths()
        auxiliary, seen.auxiliary = {key: self._read_auxiliary(path) for key, path in paths.items()}, tuple(paths.values())
        scan = self._scan(data.scan_questions, seen.path, stops=True)
        if scan is None:
            return seen
        for question, position in zip(scan.records, scan.positions):
            if question.size is not None:
                seen.sizes[len(seen.ids)] = question.size
            seen.add(question, position, self.uses, [question.text])
        repeated = len(seen.ids) - len(set(seen.ids))
        if repeated:
            self.findings.note(seen.path, "a question id that was there before (all are scored)", repeated)
        refused = set() if None in auxiliary.values() else self._check_scoring(data.task.scorer, scan, seen, auxiliary)
        for index, question in enumerate(scan.records):
            if index not in refused:
                self._check_reference(question, seen.path, scan.positions[index])
        self._finish(scan, seen, row, expected, {question.answer for question in scan.records})
        if self._encoder is not None:
            self._encode(scan, seen, row, self._encoder.encode_questions, self._judge_question)
        return seen

    def _scan(self, read: Callable[[], Scan], path: str, stops: bool) -> Scan | None:
        """The file's records; those that a reader refuses are noted (`stops`: a run has no choice), None if it refuses the file."""
        try:
            scan = read()
        except UserError as error:
            self.findings.add("file", path, str(error), stops=True)
            return None
        for bad in scan.bad:
            self.findings.add("box" if bad.box else "schema", path, bad.reason, bad.position, bad.id, stops=stops)
        for note, count in scan.notes.items():
            self.findings.note(path, note, count)
        return scan

    def _finish(self, scan: Scan, seen: SeenFile, row: FileRow, expected: Expected | None, answers) -> None:
        row.path, row.records = seen.path, len(scan.records) + len(scan.bad)
        row.with_image, row.turns = sum(number != _NO_IMAGE for number in seen.images), len(seen.questions)
        if expected is not None:
            row.expected = "" if expected.low <= row.records <= expected.high else expected.range
            for problem in count_problems(expected, row.records, row.with_image, len(answers)):
                self.findings.add("count", seen.path, f"{problem}; download it again, or give --counts any for a set of your own")

    def _check_answer_boxes(self, example: Example, path: str, position: int) -> None:
        """What the reader lets pass: words around a box in brackets, and boxes without area."""
        for number, (_, gpt) in enumerate(example.turns):
            try:
                reason = _no_area(parse_box(gpt)) if gpt.strip() else ""
            except BoxError as error:
                reason = str(error)
            if reason:
                self.findings.add("box", path, f"answer of turn {number}: {reason}", position, example.id)

    def _check_reference(self, question: Question, path: str, position: int) -> None:
        """What the scorer accepts but cannot judge by."""
        if question.bbox is not None and (reason := _no_area(question.bbox)):
            self.findings.add("box", path, f"{reason}, so no answer can be right", position, question.id)

    def _read_auxiliary(self, path: str) -> dict | None:
        if path not in self._auxiliary:
            try:
                self._auxiliary[path] = read_auxiliary_file(path)
            except UserError as error:
                self.findings.add("file", path, str(error), stops=True)
                self._auxiliary[path] = None
        return self._auxiliary[path]

    def _check_scoring(self, scorer: str, scan: Scan[Question], seen: SeenFile, auxiliary: Mapping[str, object]) -> set[int]:
        """Numbers of the questions that the scorer refuses."""
        try:
            problems = self._references(scorer, scan.records, auxiliary) if self._references else []
        except UserError as error:
            self.findings.add("file", seen.path, str(error), stops=True)
            return set()
        for index, reason in problems:
            self.findings.add("reference", seen.path, reason, scan.positions[index], seen.ids[index], stops=True)
        return {index for index, _ in problems}

    def _encode(self, scan: Scan, seen: SeenFile, row: FileRow, encode: Callable, judge: Callable) -> None:
        """Encodes all records as training does and judges each."""
        with progress(f"lengths of {os.path.basename(seen.path)}", len(scan.records), "records") as tick:
            for start in range(0, len(scan.records), _CHUNK):
                records = scan.records[start : start + _CHUNK]
                places = scan.positions[start : start + _CHUNK]
                for item, record, position in zip(self._encoded(encode, records, places, seen.path), records, places):
                    if item is not None:
                        judge(item, seen, position, record, row)
                tick(len(records))

    def _encoded(self, encode: Callable, records: Sequence, places: Sequence[int], path: str) -> list[Encoded | None]:
        """The records encoded, None for those that cannot be."""
        try:
            return encode(records)
        except UserError as error:
            if len(records) > 1:  # some record is at fault: find it
                return [item for record, place in zip(records, places) for item in self._encoded(encode, [record], [place], path)]
            self.findings.add("tokens", path, str(error), places[0], records[0].id, stops=True)
            return [None]

    def _judge_example(self, item: Encoded, seen: SeenFile, position: int, example: Example, row: FileRow) -> None:
        row.longest, row.supervised = max(row.longest, len(item.tokens)), max(row.supervised, item.supervised)
        if not item.supervised:
            self.findings.add("unsupervised", seen.path, why_unsupervised(item, self._encoder), position, example.id)
            return
        seen.usable.add(len(item.tokens), item.supervised, item.has_image)
        if item.truncated:
            self.findings.add("over_long", seen.path, self._too_long("its last answers are lost"), position, example.id)

    def _judge_question(self, item: Encoded, seen: SeenFile, position: int, question: Question, row: FileRow) -> None:
        row.longest = max(row.longest, len(item.tokens))
        seen.usable.add(len(item.tokens), 0, item.has_image)
        if item.truncated:
            self.findings.add("over_long", seen.path, self._too_long("the end of the question is lost"), position, question.id)

    def _too_long(self, loss: str) -> str:
        return f"longer than {self._encoder.max_length} positions, {loss}; raise config.data.max_length if the model can"


def _no_area(box: tuple[float, float, float, float]) -> str:
    """Why no region belongs to a box; "" if one does."""
    x1, y1, x2, y2 = box
    return "" if x1 < x2 and y1 < y2 else f"box {list(box)} has no area: x1 < x2 and y1 < y2 must hold"


def leaked_questions(train: SeenFile, questions: SeenFile, contents: Sequence[int]) -> list[tuple[int, int]]:
    """(index of a question, index of the first training record that asks the same of the same image) of the two files.

    Args:
        train, questions: what was kept of them.
        contents: hash per image number; the last entry stands for no image.
    """
    asked = [(contents[number], text) for number, text in zip(questions.images, questions.questions)]
    wanted = set(asked)
    found: dict[tuple[int, int], int] = {}
    for owner, text in zip(train.owners, train.questions):
        key = (contents[train.images[owner]], text)
        if key in wanted:
            found.setdefault(key, owner)
    return [(index, found[key]) for index, key in enumerate(asked) if key in found]


def shared_images(train: SeenFile, questions: SeenFile, contents: Sequence[int]) -> int:
    """Number of distinct pictures that are in both files, whatever is asked of them."""
    both = ({contents[number] for number in seen.images if number != _NO_IMAGE} for seen in (train, questions))
    return len(set.intersection(*both))
