"""The table of CoIN's eight tasks, their orders, and the loader that finds a task's files under a data root."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import FOLDERS, MADE, MULTITASK, find_set, task_of
from proglora_jax.data.scans import Scan
from proglora_jax.data.schema import Example, Question, Record, read_examples, read_json, read_questions, scan_examples, scan_questions


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table.

    Attributes:
        name: name in configs, reports and folders.
        title: name as the papers print it.
        folder: folder under `Instructions_<set>`.
        eval_file: file with the questions that are scored.
        image_dir: first folder of its image paths under the image root.
        scorer: name of the scoring rule.
        coin_image_mode: image preparation at test time in CoIN's scripts, "crop" or "pad".
        max_new_tokens: cap on generated tokens in CoIN's scripts.
        train_records: records of the published training file (Grounding and OCR-VQA: about); for plans, files may have others.
        eval_questions: questions of the published evaluation file (VQAv2: at most, OCR-VQA: about).
        auxiliary: ((key, path under the image root), ...) of the files that scoring needs besides the questions.
    """

    name: str
    title: str
    folder: str
    eval_file: str
    image_dir: str
    scorer: str
    coin_image_mode: str
    max_new_tokens: int
    train_records: int
    eval_questions: int
    auxiliary: tuple[tuple[str, str], ...] = ()


_SCIENCEQA_FILES = (("problems", "ScienceQA/problems.json"), ("pid_splits", "ScienceQA/pid_splits.json"))
_ROWS = (
    Task("ScienceQA", "ScienceQA", "ScienceQA", "test.json", "ScienceQA", "scienceqa", "crop", 1024, 12_726, 4_241, _SCIENCEQA_FILES),
    Task("TextVQA", "TextVQA", "TextVQA", "val.json", "TextVQA", "textvqa", "pad", 128, 34_602, 5_000,
         (("annotations", "TextVQA/TextVQA_0.5.1_val.json"),)),
    Task("ImageNet", "ImageNet", "ImageNet", "test.json", "ImageNet_withlabel", "imagenet", "crop", 1024, 129_833, 5_050),
    Task("GQA", "GQA", "GQA", "test.json", "GQA", "gqa", "pad", 128, 72_140, 12_578,
         (("questions", "GQA/testdev_balanced_questions.json"),)),
    Task("VizWiz", "VizWiz", "VizWiz", "val.json", "VizWiz", "vizwiz", "pad", 128, 20_523, 4_319),
    Task("Grounding", "Grounding", "Grounding", "test.json", "COCO2014", "grounding", "crop", 1024, 55_885, 30_969),
    Task("VQAv2", "VQAv2", "VQAv2", "val.json", "COCO2014", "vqav2", "crop", 1024, 82_783, 214_354),
    Task("OCRVQA", "OCR-VQA", "OCRVQA", "test.json", "OCR-VQA", "ocrvqa", "pad", 128, 165_500, 100_000),
)
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}

ORDERS: dict[str, tuple[str, ...]] = {
    "coin": tuple(TASKS),
    "alphabet": ("GQA", "Grounding", "ImageNet", "OCRVQA", "ScienceQA", "TextVQA", "VizWiz", "VQAv2"),
}

# Other names of an image folder, taken when the usual one is not there.
_IMAGE_ALIASES = {"ImageNet_withlabel": ("ImageNet",), "OCR-VQA": ("OCRVQA",), "COCO2014": ("COCO", "coco")}


def get_task(name: str) -> Task:
    """The task of that name; case and hyphens do not matter.

    Raises:
        UserError: "task x: unknown; choose from ScienceQA, TextVQA, ..."
    """
    wanted = name.replace("-", "").replace("_", "").lower()
    for task in _ROWS:
        if task.name.lower() == wanted:
            return task
    raise UserError(f"task {name}: unknown; choose from {', '.join(TASKS)}")


def task_order(order: str | Sequence[str]) -> tuple[str, ...]:
    """Task names in training order: a named order (coin, alphabet) or a list of names.

    Raises:
        UserError: "config.data.tasks: ..." for an unknown name, an empty list or a task that is named twice.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise UserError(f"config.data.tasks={order}: unknown order; choose {', '.join(ORDERS)} or give a list of task names")
        return ORDERS[order]
    names = tuple(get_task(name).name for name in order)
    if not names:
        raise UserError("config.data.tasks: the list is empty; name at least one task")
    if len(set(names)) < len(names):
        raise UserError(f"config.data.tasks={', '.join(names)}: a task is named twice; name each task once")
    return names


class TaskData:
    """A task's records, read when first asked for.

    Attributes:
        task: the table row.
        folder: folder with the task's JSON files.
        suffix: what stands before `.json` in their names ("" or "_new").
        image_root: folder that image paths are relative to.
        on_bad: what becomes of training records that cannot be used, see `read_examples`.
    """

    def __init__(self, task: Task, folder: str, suffix: str, image_root: str, on_bad: str = "stop"):
        self.task, self.folder, self.suffix, self.image_root, self.on_bad = task, folder, suffix, image_root, on_bad

    def path(self, file: str) -> str:
        """Path of `train.json`, `test.json` or `val.json` of this task."""
        stem, extension = os.path.splitext(file)
        aliased = os.path.join(self.folder, stem + self.suffix + extension)
        return aliased if os.path.exists(aliased) else os.path.join(self.folder, file)

    @property
    def train_path(self) -> str:
        """The file with the task's training records: its own, or where there is none the one of all tasks (`Multitask/train.json`)."""
        own, shared = self.path("train.json"), os.path.join(os.path.dirname(self.folder), MULTITASK, f"train{self.suffix}.json")
        return shared if not os.path.exists(own) and os.path.exists(shared) else own

    def _reading(self) -> dict[str, object]:
        """How the training file is read."""
        own = os.path.dirname(self.train_path) == self.folder
        return {"boxes": self.answers_are_boxes, "keep": None if own else lambda record: task_of(record) == self.task.name}

    @cached_property
    def made_from(self) -> dict[str, object]:
        """What `tools make-instructions` noted of these files: the set they are made from, and how many records stayed; {} for published
        files. Raises: UserError as `read_json` does.
        """
        path = os.path.join(os.path.dirname(self.folder), MADE)
        made = read_json(path) if os.path.exists(path) else {}
        return made.get(self.task.name, {}) if isinstance(made, dict) else {}

    @property
    def answers_are_boxes(self) -> bool:
        """Whether the task's answers are bounding boxes."""
        return self.task.scorer == "grounding"

    @cached_property
    def _training(self) -> tuple[list[Example], int]:
        aliases = self._image_aliases()
        return read_examples(self.train_path, self.task.name, self.image_root, aliases, on_bad=self.on_bad, **self._reading())

    @property
    def train(self) -> list[Example]:
        """Training examples in file order. Raises: UserError as `read_examples` does."""
        return self._training[0]

    @property
    def bad_records(self) -> int:
        """Training records that were left out. Raises: UserError as `read_examples` does."""
        return self._training[1]

    @cached_property
    def questions(self) -> list[Question]:
        """Evaluation questions in file order. Raises: UserError as `read_questions` does."""
        return read_questions(self.path(self.task.eval_file), self.task.name, self.image_root, self._image_aliases())

    def scan_train(self) -> Scan[Example]:
        """The training file with its damage listed. Raises: UserError as `scan_examples` does."""
        return scan_examples(self.train_path, self.task.name, self.image_root, self._image_aliases(), **self._reading())

    def scan_questions(self) -> Scan[Question]:
        """The evaluation file with its damage listed. Raises: UserError as `scan_questions` does."""
        return scan_questions(self.path(self.task.eval_file), self.task.name, self.image_root, self._image_aliases())

    @cached_property
    def auxiliary(self) -> dict[str, object]:
        """Parsed auxiliary files by key. Raises: UserError as `load_auxiliary` does."""
        return _read_auxiliary(self.task, self.image_root)

    def auxiliary_paths(self) -> dict[str, str]:
        """Where the auxiliary files are expected, by key."""
        return {key: os.path.join(self.image_root, relative) for key, relative in self.task.auxiliary}

    def _image_aliases(self) -> dict[str, str]:
        usual = self.task.image_dir
        if os.path.isdir(os.path.join(self.image_root, usual)):
            return {}
        found = (alias for alias in _IMAGE_ALIASES.get(usual, ()) if os.path.isdir(os.path.join(self.image_root, alias)))
        return {usual: alias for alias in found}


def load_task(root: str, task: str, instruction_set: str = "Original", on_bad_record: str = "stop") -> TaskData:
    """Finds a task's files under a data root; nothing is read yet.

    Args:
        root: holds `playground/Instructions_*` (or `Instructions_*`) and `cl_dataset`.
        task: task name.
        instruction_set: Original, Diverse, 10Type, or another name of `instruction_sets`.
        on_bad_record: what becomes of training records that cannot be used, see `read_examples`.

    Raises:
        UserError: "<root>: no folder for task GQA of instruction set Original; looked for ..."
    """
    row, looked = get_task(task), []
    for name, suffix in FOLDERS[find_set(instruction_set)]:
        for base in (os.path.join(root, "playground"), root):
            folder = os.path.join(base, name, row.folder)
            looked.append(folder)
            present = [file for file in ("train", os.path.splitext(row.eval_file)[0])
                       if os.path.exists(os.path.join(folder, f"{file}{suffix}.json"))]
            if present:
                return TaskData(row, folder, suffix, _image_root(root), on_bad_record)
    raise UserError(
        f"{root}: no files for task {row.name} of instruction set {instruction_set}; looked for train.json or {row.eval_file} in "
        f"{', '.join(looked[:4])}; set config.data.root to the folder that holds playground/ and cl_dataset/"
    )


def load_auxiliary(root: str, task: str) -> dict[str, object]:
    """Parsed auxiliary files of a task by key.

    Keys: ScienceQA `problems` (pid -> problem) and `pid_splits` (split -> pids); TextVQA `annotations` (with a `data`
    list, ten answers each); GQA `questions` (question id -> question); {} for every other task.

    Raises:
        UserError: "<path>: no such file ..." and the other sentences of `read_json`, or "<path>: must hold a JSON object".
    """
    return _read_auxiliary(get_task(task), _image_root(root))


def _read_auxiliary(task: Task, image_root: str) -> dict[str, object]:
    return {key: read_auxiliary_file(os.path.join(image_root, relative)) for key, relative in task.auxiliary}


def read_auxiliary_file(path: str) -> dict:
    """The JSON object of one auxiliary file. Raises: UserError as `load_auxiliary` does."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(content).__name__}; download the file again")
    return content


def _image_root(root: str) -> str:
    folder = os.path.join(root, "cl_dataset")
    return folder if os.path.isdir(folder) else root


def select_subset(records: Sequence[Record], size: int, seed: int = 0) -> list[Record]:
    """A subset that depends on record ids and seed only, not on file order; kept in file order.

    The records with the smallest hash of (seed, id) are taken, so a larger subset contains a smaller one.

    Args:
        records: examples or questions.
        size: how many; 0 or more than there are means all.
        seed: any integer.

    Raises:
        UserError: "subset size -1: must be 0 (all) or more"
    """
    if size < 0:
        raise UserError(f"subset size {size}: must be 0 (all) or more")
    if size == 0 or size >= len(records):
        return list(records)
    seen: Counter[str] = Counter()
    keys = []
    for position, record in enumerate(records):
        # Repeated ids are told apart by how often they have come before.
        text = f"{seed}:{record.id}:{seen[record.id]}"
        seen[record.id] += 1
        keys.append((hashlib.sha256(text.encode()).digest(), position))
    return [records[position] for position in sorted(position for _, position in sorted(keys)[:size])]
