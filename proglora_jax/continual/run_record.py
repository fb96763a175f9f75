"""The record of a run: what a sequence of tasks leaves in `workdir/results.json` for the reports.

The file is one JSON object. Stages and blocks count from 0. A stage or score that is not there yet is null or left out.

    method       str            name of the method
    seed         int
    tasks        [str]          names in training order
    scoring      {mode: matrix} mode "coin", "clean", and "coin_pad" and the like where images were prepared in another way as well
                                (config.evaluate.also_image_mode);
                                matrix[stage][task] = accuracy in percent, rows up to the stage's own task
                                (zero-shot and multi-task: one row with every task; isolated tasks: null before the own one)
    gates        {stage: {task: [float]}}   mean gate of each block over a task's questions, after that stage; {} for none
    isolated     {task: float} or null      accuracy (first mode's scoring) of training on each task alone
    baselines    {name: {task: float}}      optional; e.g. question-only answers, score of the references themselves
    counts       [{group: int}]             per stage: parameters that train, by group
    seconds      [{"train": s, "evaluate": s}]  per stage; wall clock
    data         [{what: int}]  per stage: "rows" of its own tasks, how many records of their files could not be used ("bad_records";
                                of the whole files, also where config.data.train_examples takes fewer), and of those taken, how many
                                teach nothing ("unsupervised"), were cut short ("truncated") or have an empty answer ("empty_answers");
                                "blank_images": for how many distinct images of the rows that were trained on, replayed ones
                                included, a blank one stood (config.data.on_bad_image=blank); "cut_images": how many were cut off or
                                damaged, and used as far as they could be decoded; of all batches of the phases that run the language
                                model, "positions" without padding, "padded_positions" with it, and "batches" {padded length: number}
    prompts      [{task: {what: int}}]  per stage: "positions", "padded_positions" and "batches" of the questions' prompts, by task; as
                                "blank_images" where images were prepared in another way as well
    blank_images [{task: int}]  per stage: for how many distinct images of a task's questions a blank one stood; tasks without any are
                                left out; "ImageNet_pad" and the like for images that were prepared in another way as well
    cut_images   [{task: int}]  the same of images that were cut off or damaged
    command      str            the command that made the run
    versions     {package: str}
    config_hash  str
    benchmark    str            optional; "coin", "coin_mini" ...
    settings     {name: value}  optional; what else the report should show
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.evaluation.scores import MODES
from proglora_jax.evaluation.sequence import SequenceMetrics, diagonal, finished_stages, mean, metrics, triangle

FILE = "results.json"
_IMAGES = {"pad": "pad", "coin": "crop"}
_REQUIRED = ("method", "seed", "tasks", "scoring")


def with_images(mode: str, image_mode: str) -> str:
    """Name of a scoring mode whose images were prepared by another config.evaluate.image_mode: "coin", "pad" -> "coin_pad"."""
    return f"{mode}_{_IMAGES[image_mode]}"


def shared_modes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The scoring modes that all records have, in the order of the first."""
    return tuple(mode for mode in records[0].modes if all(mode in record.modes for record in records))


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The fields of `results.json`, as the module's docstring lists them; `gates` has stage numbers as keys."""

    method: str
    seed: int
    tasks: tuple[str, ...]
    scoring: Mapping[str, Sequence[Sequence[float | None]]]
    gates: Mapping[int, Mapping[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    isolated: Mapping[str, float] | None = None
    baselines: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    counts: Sequence[Mapping[str, int] | None] = ()
    seconds: Sequence[Mapping[str, float] | None] = ()
    data: Sequence[Mapping[str, Any] | None] = ()
    prompts: Sequence[Mapping[str, Mapping[str, Any]] | None] = ()
    blank_images: Sequence[Mapping[str, int] | None] = ()
    cut_images: Sequence[Mapping[str, int] | None] = ()
    command: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config_hash: str = ""
    benchmark: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        """Scoring modes that are there, the headline one ("coin") first."""
        return tuple(sorted(self.scoring, key=lambda mode: (mode != "coin", mode)))

    @property
    def sequential(self) -> bool:
        """False for a run without a sequence: one row with every task, or (isolated tasks) rows with their own task only."""
        return len(self.tasks) == 1 or not any(_covers_all(rows, len(self.tasks)) or _alone(rows) for rows in self.scoring.values())

    @property
    def stages(self) -> int:
        """Number of leading stages that are scored completely, in every mode; not more than 1 without a sequence."""
        return min(map(finished_stages, self.scoring.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether everything is scored: every stage, or without a sequence every task."""
        if self.sequential:
            return self.stages == len(self.tasks)
        return all(_scored(self.final(mode)) == len(self.tasks) for mode in self.modes)

    def final(self, mode: str) -> list[float | None]:
        """Accuracy on the tasks so far after the last finished stage, percent; without a sequence one value per task or None."""
        rows = self.scoring[mode]
        if not self.sequential:
            values = rows[0] if _covers_all(rows, len(self.tasks)) else [row[-1] if row else None for row in rows]
            return [*values, *[None] * (len(self.tasks) - len(values))]
        done = triangle(rows[: self.stages])
        return done[-1] if done else []

    def right_after(self, mode: str) -> list[float | None]:
        """Accuracy on each task right after its own stage, percent; as `final` for a run without a sequence."""
        return diagonal(self.scoring[mode][: self.stages]) if self.sequential else self.final(mode)

    def metrics(self, mode: str) -> SequenceMetrics:
        """The metrics of the finished stages; FWT only in the headline mode, whose scoring `isolated` has.

        A run without a sequence has only means: ACC, MAA and New.ACC are the same number, as in the papers' tables.
        """
        if not self.sequential:
            scored = [value for value in self.final(mode) if value is not None]
            average = mean(scored) if scored else None
            return SequenceMetrics(1, average, average, None, None, average, None)
        alone = [self.isolated.get(task) for task in self.tasks] if self.isolated and mode == self.modes[0] else None
        return metrics(self.scoring[mode][: self.stages], alone)

    def to_json(self) -> dict[str, Any]:
        """The content of `results.json`."""
        content = dataclasses.asdict(self)
        content["gates"] = {str(stage): gates for stage, gates in self.gates.items()}
        return content


def save_run(record: RunRecord, workdir: str | os.PathLike[str]) -> str:
    """Writes `workdir/results.json` in one step (a reader never sees half a file) and returns its path."""
    text = json.dumps(record.to_json(), indent=1, allow_nan=False, default=_scalar) + "\n"
    return write_atomically(os.path.join(workdir, FILE), text.encode())


def load_run(workdir: str | os.PathLike[str]) -> RunRecord:
    """Reads the record of a run.

    Args:
        workdir: the run's folder.

    Returns:
        The record; a partial run has fewer rows or null entries.

    Raises:
        UserError: "<workdir>/results.json: no such file; ..."
        UserError: "<workdir>/results.json: not valid JSON (...)"
        UserError: "<workdir>/results.json: <n> problem(s): ..." for missing or misshapen fields
    """
    path = os.path.join(workdir, FILE)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give the workdir of a run that has scored at least one stage")
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); the run that wrote it was cut off or the file was edited") from error
    advice = "Run the evaluation again, or mend the file; continual/run_record.py lists its fields."
    raise_collected(_problems(content), path, advice)
    known = {field.name for field in dataclasses.fields(RunRecord)}
    fields = {name: value for name, value in content.items() if name in known and value is not None}
    fields["tasks"] = tuple(content["tasks"])
    fields["scoring"] = {mode: [row or [] for row in matrix] for mode, matrix in content["scoring"].items()}
    fields["gates"] = {int(stage): gates for stage, gates in fields.get("gates", {}).items()}
    return RunRecord(**fields)


def _scored(row: Sequence[float | None] | None) -> int:
    return sum(value is not None for value in row or ())


def _covers_all(rows: Sequence[Sequence[float | None] | None], tasks: int) -> bool:
    return len(rows) == 1 and _scored(rows[0]) == tasks


def _alone(rows: Sequence[Sequence[float | None] | None]) -> bool:
    """Whether every row after the first, which tells nothing, holds its own task only."""
    later = [(stage, row) for stage, row in enumerate(rows) if stage and _scored(row)]
    return bool(later) and all(len(row) == stage + 1 and _scored(row) == 1 and row[-1] is not None for stage, row in later)


def _scalar(value: Any) -> int | float:
    """A number of an array library as a plain one."""
    if not hasattr(value, "item"):
        raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written to {FILE}")
    return value.item()


def write_atomically(path: str | os.PathLike[str], data: bytes) -> str:
    """Writes a file under a temporary name beside it and renames it; returns the path."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes the file private; a report is for others too.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return os.fspath(path)


def _problems(content: Any) -> list[str]:
    """What is wrong with the content of a results file, one sentence each."""
    if not isinstance(content, dict):
        return [f"holds {type(content).__name__}, an object is needed"]
    missing = [f"field {name!r} is missing" for name in _REQUIRED if content.get(name) is None]
    if missing:
        return missing
    tasks = content["tasks"]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        return [f"tasks={tasks!r}: must be a list of at least one name"]
    if not isinstance(content["scoring"], dict) or not content["scoring"]:
        return [f"scoring={content['scoring']!r}: must be an object with at least one mode"]
    modes = (*MODES, *(with_images(mode, images) for images in _IMAGES for mode in MODES))
    found = [f"scoring.{mode}: unknown mode; use one of {', '.join(modes)}" for mode in content["scoring"] if mode not in modes]
    found += [line for mode, matrix in content["scoring"].items() for line in _matrix_problems(mode, matrix, len(tasks))]
    for name in ("isolated", *(f"baselines.{name}" for name in content.get("baselines") or {})):
        values = content.get("isolated") if name == "isolated" else content["baselines"][name.partition(".")[2]]
        found += [f"{name}.{task}={value!r}: not a percentage" for task, value in (values or {}).items() if not _is_percent(value)]
    return found + _gate_problems(content.get("gates") or {}, tasks)


def _matrix_problems(mode: str, matrix: Any, tasks: int) -> list[str]:
    where = f"scoring.{mode}"
    if not isinstance(matrix, list) or not all(row is None or isinstance(row, list) for row in matrix):
        return [f"{where}: must be a list of rows"]
    if len(matrix) > tasks:
        return [f"{where}: {len(matrix)} rows for {tasks} tasks"]
    found = []
    for stage, row in enumerate(matrix):
        if len(row or ()) > tasks:
            found.append(f"{where}[{stage}]: {len(row)} accuracies for {tasks} tasks")
            continue
        bad = [task for task, value in enumerate(row or ()) if value is not None and not _is_percent(value)]
        found += [f"{where}[{stage}][{task}]={row[task]!r}: not a percentage" for task in bad]
    return found


def _gate_problems(gates: Any, tasks: Sequence[str]) -> list[str]:
    found = []
    for stage, rows in gates.items():
        if not str(stage).isdecimal() or int(stage) >= len(tasks):
            found.append(f"gates[{stage!r}]: must be the number of a stage, 0 to {len(tasks) - 1}")
            continue
        for task, values in rows.items():
            if task not in tasks:
                found.append(f"gates[{stage}][{task!r}]: not one of the tasks {', '.join(tasks)}")
            elif not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
                found.append(f"gates[{stage}][{task!r}]: must be a list of numbers, one per block")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_percent(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value <= 100.0
