"""What a run leaves for reports: the meta of a stage's checkpoint, and results.json collected from the stages' scores."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import proglora_jax
from proglora_jax.checkpoints.integrity import read_json
from proglora_jax.continual.answering import other_images, scores_file
from proglora_jax.continual.blank_images import KINDS
from proglora_jax.continual.run_record import FILE, RunRecord, load_run, save_run, with_images
from proglora_jax.continual.session import Session
from proglora_jax.continual.stages import FINAL, Stage
from proglora_jax.data.errors import UserError
from proglora_jax.evaluation.scores import MODES
from proglora_jax.evaluation.scores_rules import ScoreOptions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy", "pillow")


def stage_meta(
    session: Session, stage: Stage, digest: str, previous: str, counts: Mapping[str, int], seconds: Mapping[str, float], alike: np.ndarray
) -> dict[str, Any]:
    """The meta.json of a stage's checkpoint: all that is needed to use its blocks without the config."""
    method = session.method
    return {
        "method": method.name, "hyperparameters": dataclasses.asdict(method), "rank": method.rank, "alpha": method.alpha,
        "targets": {name: list(shape) for name, shape in session.targets.linears.items()}, "layers": session.targets.layers,
        "backbone": session.base, "protocol": session.protocol, "tasks": list(session.tasks), "stage": stage.number,
        "index": stage.index, "task": stage.name,
        "digest": digest, "previous": previous, "trainable": dict(counts), "seconds": dict(seconds),
        "similarity": [float(value) for value in alike], "versions": versions(), "config_hash": config_hash(session.workdir),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"proglora_jax": proglora_jax.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def config_hash(workdir: Path) -> str:
    """The hash that the workdir's config.json states; "" where there is none."""
    path = workdir / "config.json"
    return str(read_json(path).get("hash", "")) if path.exists() else ""


def update(session: Session, stages: tuple[Stage, ...]) -> RunRecord:
    """Collects the scores of all stages so far into workdir/results.json."""
    record = collect(session, stages)
    if session.chief:
        save_run(record, session.workdir)
    return record


def collect(session: Session, stages: tuple[Stage, ...]) -> RunRecord:
    """The record of the run, from what lies in the stages' folders."""
    tasks, run, other = session.tasks, session.settings.run, session.settings.evaluate.other_mode
    matrix: dict[str, list] = {mode: [] for mode in (*MODES, *(with_images(mode, other) for mode in MODES if other))}
    gates: dict[int, dict[str, list[float]]] = {}
    counts, seconds, read, prompts, odd, ceilings = [], [], [], [], {kind: [] for kind in KINDS}, {}
    for stage in stages:
        folder = stage.folder(session.workdir)
        scored = {task: _read(scores_file(folder, tasks[task])) for task in stage.evaluate}
        if all(score is None for score in scored.values()):
            break
        images = {task: other_images(session.settings, tasks[task]) for task in stage.evaluate if other}
        again = {task: _read(scores_file(folder, tasks[task], way)) for task, way in images.items()}
        for mode in MODES:
            matrix[mode].append(_row(scored, mode))
            if other:
                matrix[with_images(mode, other)].append(_row(again, mode))
        known = {tasks[task]: score for task, score in scored.items() if score is not None}
        if any(len(score["gates"]) > 1 for score in known.values()):
            count = stage.index + 1 if session.method.blocks_are_tasks else None  # slots of later tasks are empty
            gates[stage.number] = {name: score["gates"][:count] for name, score in known.items()}
        ceilings |= {name: score["ceiling"]["coin"] for name, score in known.items()}
        meta = _read(folder / FINAL / "meta.json", checksum=False) or {}
        counts.append(meta.get("trainable", {}))
        read.append(meta.get("data", {}))
        twice = {f"{tasks[task]}_{images[task]}": score for task, score in again.items() if score is not None and images[task]}
        for kind, found in odd.items():
            field = f"{kind}_images"
            found.append({name: score[field] for name, score in (known | twice).items() if score.get(field)})
        prompts.append({name: score["prompts"] for name, score in (known | twice).items() if score.get("prompts")})
        spent = sum(score["seconds"] for score in (known | twice).values())
        seconds.append({"train": meta.get("seconds", {}).get("train", 0.0), "evaluate": spent})
    settings = {"learning rate": session.settings.train.learning_rate, "batch size": session.settings.train.batch_size,
                "instruction set": _instruction_set(session), "protocol": run.protocol}
    # The rules of the mode "coin", where they are not those of CoIN's scripts for LLaVA.
    usual = dataclasses.asdict(ScoreOptions())
    settings |= {name: value for name, value in dataclasses.asdict(session.score_options).items() if value != usual[name]}
    settings |= {"published row": run.published_row} if run.published_row else {}
    settings |= {name: value for name, value in dataclasses.asdict(session.method).items()}
    return RunRecord(
        method=session.method.name, seed=run.seed, tasks=tasks, scoring=matrix, gates=gates, isolated=_isolated(session, matrix),
        baselines={"score of the references themselves": ceilings} if ceilings else {}, counts=counts, seconds=seconds, data=read,
        prompts=prompts, blank_images=odd["blank"], cut_images=odd["cut"],
        command=_command(session.workdir), versions=versions(), config_hash=config_hash(session.workdir),
        benchmark="coin_mini" if session.settings.data.benchmark == "embedded" else "CoIN", settings=settings,
    )


def _row(scored: Mapping[int, Mapping[str, Any] | None], mode: str) -> list[float | None]:
    """A row of the matrix from the scores by task."""
    row: list[float | None] = [None] * (max(scored) + 1)
    for task, score in scored.items():
        row[task] = None if score is None else score["accuracy"][mode]
    return row


def read_isolated(session: Session) -> dict[str, float] | None:
    """Accuracy of each task trained alone, from the run that the config names; None where it names none.

    Raises:
        UserError: "config.run.isolated_results=<path>: ..." for a file that is no such record or lacks a task.
    """
    named = session.settings.run.isolated_results
    if not named:
        return None
    path = Path(named)
    try:
        record = load_run(path.parent if path.name == FILE else path)
    except UserError as error:
        raise UserError(f"config.run.isolated_results={named}: {error}") from error
    missing = [task for task in session.tasks if task not in (record.isolated or {})]
    if missing:
        raise UserError(
            f"config.run.isolated_results={named}: has no isolated result of {', '.join(missing)}; run these tasks with "
            "config.run.protocol=isolated first")
    return {task: record.isolated[task] for task in session.tasks}


def _instruction_set(session: Session) -> str:
    """The set's name, and where its files were made from another one, how many records."""
    name, made = session.settings.data.instruction_set, [found for data in session.data.values() if (found := data.made_from)]
    if not made:
        return name
    count, kept = (sum(found[f"train{end}"] + found[f"questions{end}"] for found in made) for end in ("", "_kept"))
    return f"{name} (made from {made[0]['from']}: {count - kept:,} records and questions re-templated, {kept:,} could not be)"


def _isolated(session: Session, matrix: Mapping[str, list]) -> dict[str, float] | None:
    """Accuracy of each task trained alone: this run's own if it is such a run."""
    if session.settings.run.protocol == "isolated":
        return {session.tasks[i]: row[i] for i, row in enumerate(matrix["coin"]) if row[i] is not None}
    return read_isolated(session)


def _command(workdir: Path) -> str:
    path = workdir / "config.json"
    return str(read_json(path).get("command", "")) if path.exists() else ""


def _read(path: Path, checksum: bool = True) -> dict[str, Any] | None:
    try:
        return read_json(path, checksum=checksum)
    except UserError:
        return None
