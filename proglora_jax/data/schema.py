"""The two records that every task is read into, and the tolerant readers of CoIN's JSON files."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from absl import logging

from proglora_jax.data.box_text import BoxError, check_boxes, parse_box
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.scans import BadRecord, Scan

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
BAD_RECORD_POLICIES = ("stop", "skip_and_count")
_KNOWN_QUESTION_KEYS = frozenset({"question_id", "id", "image", "text", "answer", "size"})


@dataclass(frozen=True, slots=True)
class Example:
    """One training record.

    Attributes:
        id: record id as text (the record's position where the file gives none).
        task: task name.
        image: absolute path, or None for a text-only record.
        turns: (human, gpt) pairs; the human text carries no `<image>`: the placeholder line belongs to the first turn
            of every record with an image and is put there when the record is encoded.
    """

    id: str
    task: str
    image: str | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One evaluation record.

    Attributes:
        id: question id as text.
        task: task name.
        image: absolute path, or None for a text-only question.
        text: the whole prompt, instruction included, without `<image>`.
        answer: the reference answer; for Grounding the text of `answer_bbox`; "" where the file gives none.
        bbox: reference box (x1, y1, x2, y2) in the padded-square frame, each in [0, 1], or None.
        size: image (width, height) in pixels, or None.
        extra: every other key of the record, as read.
    """

    id: str
    task: str
    image: str | None
    text: str
    answer: str
    bbox: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


Record = TypeVar("Record", Example, Question)


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One row of a training set: an example, where it came from and how much its loss counts.

    Attributes:
        example: the record.
        task_id: index of the task in the sequence.
        index: position of the example in its own task's list.
        weight: factor on the row's loss (1, or lambda for a replayed row).
    """

    example: Example
    task_id: int
    index: int
    weight: float = 1.0


def read_json(path: str) -> object:
    """Reads one JSON file.

    Raises:
        UserError: "<path>: no such file", "<path>: not UTF-8 text (byte N)" or "<path>: not valid JSON (line N, column M: ...)".
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the data root and the folder layout in the README") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8 or download it again") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{path}: not valid JSON ({where}); the file is damaged or incomplete, download it again") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not usable JSON ({str(error).split(';')[0]}); the file is damaged, download it again") from error
    except RecursionError as error:
        raise UserError(f"{path}: the JSON is nested too deeply to be a CoIN file; download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def read_examples(
    path: str, task: str, image_root: str, image_aliases: Mapping[str, str] | None = None, *, boxes: bool = False, on_bad: str = "stop",
    keep: Callable[[object], bool] | None = None,
) -> tuple[list[Example], int]:
    """Reads a training file.

    Unknown keys are ignored; gpt turns before the first human turn and an unanswered last human turn are dropped; a
    placeholder after the first turn or in a record without an image is removed; each kind of repair is logged once with
    its count.

    Args:
        path: the JSON file.
        task: task name written into every record.
        image_root: folder that image paths are relative to.
        image_aliases: {first folder of an image path: folder that is really there}.
        boxes: whether answers are boxes: one whose corners are not four numbers between 0 and 1 is refused.
        on_bad: what becomes of records that are refused: "stop" names them in an error, "skip_and_count" leaves them out and logs
            how many, and the first of them.
        keep: tells the records of this task from others in the same file; None where it holds no others.

    Returns:
        (the examples in file order, how many records were left out).

    Raises:
        UserError: "<path>: N problem(s): record 3 (id 17): no 'conversations' list; ...", "config.data.on_bad_record=x: ..."
    """
    if on_bad not in BAD_RECORD_POLICIES:
        raise UserError(f"config.data.on_bad_record={on_bad}: choose one of {', '.join(BAD_RECORD_POLICIES)}")
    scan, left_out = scan_examples(path, task, image_root, image_aliases, boxes=boxes, keep=keep), 0
    if on_bad == "skip_and_count" and scan.bad and scan.records:
        left_out = len(scan.bad)
        total = len(scan.records) + len(scan.bad)
        logging.warning("%s: %d of %d records are left out (config.data.on_bad_record=skip_and_count): %s%s.", path, left_out, total,
                        "; ".join(map(str, scan.bad[:3])), " ..." if len(scan.bad) > 3 else "")
        scan = Scan(scan.records, scan.positions, [], scan.notes)
    more = "" if on_bad == "skip_and_count" else ", or set config.data.on_bad_record=skip_and_count"
    return _all_good(path, scan, more), left_out


def read_questions(path: str, task: str, image_root: str, image_aliases: Mapping[str, str] | None = None) -> list[Question]:
    """Reads an evaluation file; arguments and errors as for `read_examples`. Repeated ids are kept, in order, and logged."""
    questions = _all_good(path, scan_questions(path, task, image_root, image_aliases))
    repeated = len(questions) - len({question.id for question in questions})
    if repeated:
        logging.warning("%s: %d question ids occur more than once; order is kept and every question is scored.", path, repeated)
    return questions


def scan_examples(
    path: str, task: str, image_root: str, image_aliases: Mapping[str, str] | None = None, *, boxes: bool = False,
    keep: Callable[[object], bool] | None = None,
) -> Scan[Example]:
    """As `read_examples`, but records that cannot be read are listed, and nothing is logged.

    Raises:
        UserError: for a file that is no list of records.
    """
    return _scan(path, image_root, image_aliases, lambda *args: _example(*args, task=task, boxes=boxes), keep)


def scan_questions(path: str, task: str, image_root: str, image_aliases: Mapping[str, str] | None = None) -> Scan[Question]:
    """As `read_questions`, but records that cannot be read are listed, and nothing is logged; errors as `scan_examples`."""
    return _scan(path, image_root, image_aliases, lambda *args: _question(*args, task=task))


def normalise_image_path(value: str, image_root: str, image_aliases: Mapping[str, str] | None = None) -> str:
    """Absolute path of an image named in a record: no leading `./`, no doubled `.jpg.jpg`, inside the image root.

    Raises:
        ValueError: "image path '../x.jpg' leaves the image root" or the like; the reader adds file and record.
    """
    path = value.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    while path.endswith(".jpg.jpg"):
        path = path[:-4]
    first, slash, rest = path.partition("/")
    if slash and image_aliases and first in image_aliases:
        path = f"{image_aliases[first]}/{rest}"
    if "\0" in path:
        raise ValueError(f"image path {value!r} contains a NUL character")
    root = os.path.abspath(image_root)
    absolute = os.path.normpath(os.path.join(root, path))
    if not absolute.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"image path {value!r} leaves the image root")
    return absolute


def _scan(path, image_root, image_aliases, parse, keep=None) -> Scan:
    """Applies `parse(record, position, image, notes)` to every record of the file that `keep` takes."""
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: the file must hold a JSON list of records, not {type(records).__name__}")
    if not records:
        raise UserError(f"{path}: the file holds no records; download it again or remove the task from the config")
    scan = Scan([], [], [], Counter())
    for position, record in enumerate(records):
        if keep is not None and not keep(record):
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError(f"must be a JSON object, not {type(record).__name__}")
            scan.records.append(parse(record, position, _image_of(record, image_root, image_aliases), scan.notes))
            scan.positions.append(position)
        except ValueError as error:
            scan.bad.append(BadRecord(position, _id_of(record), str(error), isinstance(error, BoxError)))
    if not scan.records and not scan.bad:
        raise UserError(f"{path}: the file of all tasks holds no records of this task; remove the task from the config")
    return scan


def _all_good(path: str, scan: Scan, more: str = "") -> list:
    """The records of a file without damage; repairs are logged."""
    raise_collected([str(bad) for bad in scan.bad], path, f"Repair or remove these records, or download the file again{more}.")
    for note, count in sorted(scan.notes.items()):
        logging.warning("%s: %d records: %s.", path, count, note)
    return scan.records


def _id_of(record: object) -> str:
    value = record.get("question_id", record.get("id")) if isinstance(record, dict) else None
    return "" if value is None else _clean(str(value))


def _record_id(record: Mapping, position: int, first: str, second: str) -> str:
    value = record.get(first, record.get(second))
    if isinstance(value, (dict, list)):
        raise ValueError(f"'{first}' must be text or a number, not {type(value).__name__}")
    return str(position) if value is None else _clean(str(value))


def _image_of(record: Mapping, image_root: str, image_aliases: Mapping[str, str] | None) -> str | None:
    value = record.get("image")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"'image' must be one path, not {type(value).__name__}")
    return normalise_image_path(_clean(value), image_root, image_aliases)


def _clean(text: str) -> str:
    """Replaces lone surrogates (JSON allows them, UTF-8 and tokenizers do not) by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _example(record: Mapping, position: int, image: str | None, notes: Counter, *, task: str, boxes: bool) -> Example:
    turns = _turns(record.get("conversations"), notes)
    if boxes:
        check_boxes([gpt for _, gpt in turns])
    first = turns[0][0]
    count = first.count(IMAGE_PLACEHOLDER)
    if image is not None and count > 1:
        raise ValueError(f"{count} '{IMAGE_PLACEHOLDER}' placeholders in the first turn but one image")
    if image is not None and count == 0:
        notes["an image but no '<image>' in the first turn (put there)"] += 1
    if image is None and any(IMAGE_PLACEHOLDER in human for human, _ in turns):
        notes["'<image>' in the text but no image (removed)"] += 1
    elif any(IMAGE_PLACEHOLDER in human for human, _ in turns[1:]):
        notes["'<image>' after the first turn (removed)"] += 1
    stripped = tuple((strip_placeholder(human), gpt) for human, gpt in turns)
    return Example(_record_id(record, position, "id", "question_id"), task, image, stripped)


def strip_placeholder(text: str) -> str:
    """Removes `<image>`; text that had one is also trimmed, any other text is returned as it is."""
    return text.replace(IMAGE_PLACEHOLDER, "").strip() if IMAGE_PLACEHOLDER in text else text


def _turns(conversations: object, notes: Counter) -> list[tuple[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("no 'conversations' list")
    messages = []
    for number, message in enumerate(conversations):
        role = _ROLES.get(str(message.get("from"))) if isinstance(message, dict) else None
        if role is None or not isinstance(message.get("value"), str):
            raise ValueError(f"conversation turn {number} needs 'from' (human or gpt) and a text 'value'")
        messages.append((role, _clean(message["value"])))
    while messages and messages[0][0] == "gpt":
        messages.pop(0)
        notes["a gpt turn before any human turn (dropped)"] += 1
    roles = [role for role, _ in messages]
    if roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        raise ValueError("roles do not alternate between human and gpt")
    if len(messages) < 2:
        raise ValueError("no human turn that is followed by a gpt turn")
    if len(messages) % 2:
        notes["a last human turn without an answer (dropped)"] += 1
    return [(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages) - 1, 2)]


def _question(record: Mapping, position: int, image: str | None, notes: Counter, *, task: str) -> Question:
    text = record.get("text")
    if not isinstance(text, str) or not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise ValueError("no 'text'")
    raw_box = record.get("answer_bbox")
    answer = record.get("answer", raw_box)
    if isinstance(answer, dict) or (isinstance(answer, list) and answer is not raw_box):
        raise ValueError(f"'answer' must be text, not {type(answer).__name__}")
    if image is None and IMAGE_PLACEHOLDER in text:
        notes["'<image>' in the text but no image (removed)"] += 1
    return Question(
        id=_record_id(record, position, "question_id", "id"),
        task=task,
        image=image,
        text=strip_placeholder(_clean(text)),
        answer="" if answer is None else _clean(str(answer)),
        bbox=None if raw_box is None else parse_box(raw_box),
        size=_size(record.get("size")),
        extra={key: value for key, value in record.items() if key not in _KNOWN_QUESTION_KEYS},
    )


def _size(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 2 or not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 1 for n in numbers):
        raise ValueError(f"'size' must be [width, height] in pixels, not {value!r}")
    return int(numbers[0]), int(numbers[1])
