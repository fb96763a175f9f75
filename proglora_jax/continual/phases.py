"""The training phases of a stage: data, steps, saved progress; a run that is killed goes on inside the phase that it was in."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from proglora_jax.checkpoints.stage import find_newest, load_checkpoint, load_records, save_checkpoint
from proglora_jax.continual.blank_images import KINDS, BlankRows, odd_rows
from proglora_jax.continual.feature_data import FeatureBatches, plan_rows
from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import StageData, open_iterator, stage_data
from proglora_jax.continual.stages import PROGRESS, Stage
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data import replay as replays
from proglora_jax.data.errors import UserError
from proglora_jax.data.padding import Padding
from proglora_jax.data.pipeline import TrainIterator
from proglora_jax.data.rows import EncodedRows
from proglora_jax.methods.base import Phase, Probe, TaskInfo
from proglora_jax.training import shapes
from proglora_jax.training.loop import PhasePlan, PhaseState, start_phase, train_phase
from proglora_jax.training.processes import in_any_process

Batches = TrainIterator | FeatureBatches


@dataclasses.dataclass(frozen=True)
class _PhaseData:
    """What a phase trains on: batches, their number, names for messages, odd images, whether replayed rows have their own mean, padding."""

    batches: Batches
    steps: int
    example_name: Callable[[int, int], str]
    odd: dict[str, BlankRows]
    separate: bool = False
    padding: Padding | None = None


def run_phases(
    session: Session, stage: Stage, stages: tuple[Stage, ...], info: TaskInfo, own: EncodedRows, state: CLState, probe: Probe, *,
    origin: str,
) -> tuple[CLState, float, dict[str, int], Padding]:
    """Trains the phases of a stage, each from its beginning or from the newest progress that can be trusted.

    Args:
        session: the session.
        stage: the stage.
        stages: all of them.
        info: the task as the method sees it.
        own: the stage's own rows.
        state: after `start_task`.
        probe: what the method asks of the task's rows.
        origin: names what the stage began with.

    Returns:
        (state after the last phase, seconds of training, how many images stood blank or were cut off, by `blank_images.KINDS`: distinct
        ones, replayed ones included; what of the batches of all phases that run the language model is padding).
    """
    method, seconds, odd, padding = session.method, 0.0, {kind: set() for kind in KINDS}, Padding()
    phases = method.phases(info)
    shown = method.trainable_mask(state, info)
    for place, phase in enumerate(phases):
        if method.skips(state, info, phase):
            session.logger.message(f"phase {phase.name}: nothing to do")
        else:
            mask = method.phase_mask(state, info, phase)
            if mask != shown:
                counts = ", ".join(f"{name} {count:,}" for name, count in shapes.trainable_counts(method, state, mask).items())
                session.logger.message(f"phase {phase.name}: {counts} train")
            data = _phase_data(session, stage, info, own, state, phase, place, probe)
            padding += data.padding or Padding()
            state, passed = _run_phase(session, stage, stages, phases, place, data, state, mask, origin)
            seconds += passed
            for kind, rows in data.odd.items():
                odd[kind] |= rows.images()
        state = method.after_phase(state, info, phase, probe)
    return state, seconds, {kind: len(images) for kind, images in odd.items()}, padding


def _phase_data(
    session: Session, stage: Stage, info: TaskInfo, own: EncodedRows, state: CLState, phase: Phase, place: int, probe: Probe
) -> _PhaseData:
    if not phase.features:
        data: StageData = stage_data(session, stage, own, session.method.replay(info), phase, place)
        names = {(row.task_id, row.index): f"{row.example.task} record {row.example.id}" for row in data.rows.rows}
        odd = odd_rows(data.rows, data.plan.rows, session.train_loader)
        return _PhaseData(open_iterator(session, data), len(data.plan), lambda *row: names[row], odd, data.separate, data.plan.padding())
    count = min(len(own), phase.rows or len(own))
    numbers = np.sort(replays.replay_indices(len(own), count, info.seed, info.name))
    features = probe(state, numbers)[phase.features]
    train, ways = session.settings.train, meshes.batch_ways(session.mesh)
    size = phase.batch_size or train.batch_size
    size = max(ways, size // ways * ways)
    plan = plan_rows(count, size, phase.epochs or train.epochs, train.max_steps, session.settings.run.seed * 1000 + stage.number)
    names = {int(number): own.describe(int(number)) for number in numbers}
    odd = odd_rows(own, numbers, session.train_loader)
    batches = FeatureBatches(features, numbers, plan, stage.index, session.share)
    return _PhaseData(batches, len(plan), lambda task, number: names[number], odd)


def _run_phase(
    session: Session, stage: Stage, stages: tuple[Stage, ...], phases: tuple[Phase, ...], place: int, data: _PhaseData, state: CLState,
    mask, origin: str
) -> tuple[CLState, float]:
    """Trains one phase, number `place` of `phases`."""
    settings, method, phase, last = session.settings, session.method, phases[place], place == len(phases) - 1
    trainable, frozen = trees.partition(state.params, mask)
    begin = start_phase(trainable, settings.train, session.mesh, state.carry.get("running"))
    folder = stage.folder(session.workdir) / PROGRESS
    spent = _resume(session, folder, phases, place, origin, begin, data)
    if begin.step == data.steps and not last:  # done before the run was killed in a later phase, whose record must stay
        return _ended(state, frozen, begin), spent
    session.logger.rewind(stage.number, phase.name, begin.step)
    # Phases to come are taken to be as long as this one; what they need is not planned yet.
    stages_left, own_left = len(stages) - stage.number - 1, len(phases) - place - 1
    later = (stages_left * len(phases) + own_left) * data.steps
    session.logger.start_phase(stage=stage.number, stages=len(stages), task=stage.name, phase=phase.name, steps=data.steps,
                               first_step=begin.step, steps_after=later)
    if data.padding:
        session.logger.message(f"phase {phase.name}: {data.padding}")
    began = time.monotonic() - spent
    # The seed of a stage's draws depends on its place in the run, so that isolated stages differ too.
    seed = settings.run.seed * 1000 + stage.number + 100 * place
    plan = PhasePlan(stage.index, data.steps, seed, data.example_name, settings.run.checkpoint_every_steps, stage.name, phase)

    def save(now: PhaseState) -> None:
        record = {"step": now.step, "phase": phase.name, "origin": origin, "loss": now.loss, "seconds": time.monotonic() - began,
                  **{kind: rows.numbers() for kind, rows in data.odd.items()}}
        path = folder / f"{phase.name}_{now.step:07d}"
        save_checkpoint(path, _changed(now), {"meta": record, "iterator": _position(data.batches, now.step)})
        for old in sorted(folder.glob(f"{phase.name}_*[0-9]"))[:-2] if session.chief else ():
            shutil.rmtree(old, ignore_errors=True)

    frozen, memory = meshes.put_replicated((frozen, state.memory), session.mesh)
    end = train_phase(
        plan=plan, state=begin, frozen=frozen, memory=memory, llava=session.llava, batches=data.batches,
        step_function=session.train_step(data.separate, phase.program()), method=method, train=settings.train, mesh=session.mesh,
        logger=session.logger, stop=session.stop, save=save,
    )
    if not last:
        save(end)  # a phase that is done is not run again when a later one is killed
    return _ended(state, frozen, end), time.monotonic() - began


def _ended(state: CLState, frozen: Any, end: PhaseState) -> CLState:
    """The state with what a phase trained."""
    carry = state.carry | ({"running": end.running} if end.running else {})
    return dataclasses.replace(state, params=trees.merge(frozen, end.trainable), carry=carry)


def _changed(state: PhaseState) -> dict[str, Any]:
    """What a progress checkpoint holds."""
    return {"trainable": state.trainable, "optimizer": state.optimizer} | ({"running": state.running} if state.running else {})


def _position(batches: Batches, step: int) -> dict[str, Any]:
    """Where the iterator must go on: after the steps that are done (it reads ahead of them)."""
    return batches.get_state() | {"next_index": step}


def _move(folder: Path, aside: Path, phases: list[str]) -> None:
    """Puts the progress of some phases into another folder, empty before; the phases before them are done, and stay done."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in phases:
        for path in folder.glob(f"{name}_*"):
            path.rename(aside / path.name)


def _resume(
    session: Session, folder: Path, phases: tuple[Phase, ...], place: int, origin: str, state: PhaseState, data: _PhaseData
) -> float:
    """Takes up the newest intact progress of phase number `place` into `state` and `data`; returns the seconds it had taken."""
    batches, phase = data.batches, phases[place]
    path, skipped = find_newest(folder, f"{phase.name}_*", clean=session.chief)
    for damaged, reason in skipped:
        logging.warning("Progress %s is skipped: %s", damaged.name, reason)
    if path is None:
        return 0.0
    like = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    records = load_records(path)
    problem = "the stage began with another state then than it does now" if records["meta"]["origin"] != origin else ""
    try:
        batches.set_state(records["iterator"])
    except UserError as error:  # other buckets, mended records, another tokenizer: its batches are not those of the steps done
        problem = problem or str(error)
    # All or none; and none moves files while another still reads them.
    if in_any_process(np.asarray(bool(problem))):
        problem = problem or "another process cannot take it up, its log says why"
        aside, what = folder.with_name(f"{PROGRESS}_dropped"), f"phase {phase.name}" if place else "stage"
        text = "Progress %s is dropped: %s. The %s begins anew; the old progress is kept in %s until the stage ends."
        logging.warning(text, path.name, problem, what, aside)
        if session.chief:
            _move(folder, aside, [phase.name for phase in phases[place:]])
        batches.set_state(batches.get_state() | {"next_index": 0})
        return 0.0
    try:
        loaded, _ = load_checkpoint(path, like(_changed(state)))
    except UserError as error:
        raise UserError(f"{path} cannot be continued: {error}") from error
    for name, tree in loaded.items():
        setattr(state, name, tree)
    state.step, state.loss = records["meta"]["step"], records["meta"]["loss"]
    for kind, rows in data.odd.items():
        rows.restore(records["meta"].get(kind, ()))
    session.logger.message(f"resumed after step {state.step} of phase {phase.name}, where the loss was {state.loss:.6g}")
    return float(records["meta"]["seconds"])
