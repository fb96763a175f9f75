"""The sequence of tasks: start a task, train its phases, end it, save it, evaluate all tasks so far, report; resumes anywhere."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from proglora_jax.checkpoints.stage import find_newest, load_checkpoint, load_records, save_checkpoint
from proglora_jax.continual import results, similarity
from proglora_jax.continual.answering import evaluate_task
from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import StageData, chosen_batches, open_iterator, own_rows, stage_data
from proglora_jax.continual.stages import FINAL, PROGRESS, Finished, Stage, load_stage, plan_stages
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data.errors import UserError
from proglora_jax.data.pipeline import TrainIterator
from proglora_jax.data.rows import EncodedRows
from proglora_jax.methods.base import Phase, TaskInfo, check_contract
from proglora_jax.training import shapes
from proglora_jax.training.loop import PhasePlan, PhaseState, Stopped, start_phase, train_phase
from proglora_jax.training.processes import asked_to_stop


def run(session: Session) -> None:
    """Runs all stages that are not finished, and evaluates what is not evaluated.

    Raises:
        Stopped: after a stop signal, with everything done so far on the disk.
        UserError: for what the user can mend.
    """
    method = session.method
    stages = plan_stages(session.tasks, method, session.settings.run.protocol)
    results.read_isolated(session)  # what it says is needed after the first stage, but a wrong name should show before
    total = 1 if stages[0].fresh else len(stages)
    initial = method.init(session.targets, meshes.to_host(session.llava.projector_params()), total, session.settings.run.seed)
    before: Finished | None = None
    for stage in stages:
        before = None if stage.fresh else before
        done = load_stage(stage, session.workdir, method, initial, before)
        if done is None:
            done = _train_stage(session, stage, stages, initial, before, total)
        elif done.meta["backbone"] != session.base:
            raise UserError(
                f"{stage.folder(session.workdir)}: was trained on another backbone than config.model.path={session.settings.model.path} "
                f"holds now (hash {done.meta['backbone'][:12]}, now {session.base[:12]}); put that model back, or choose another workdir")
        if session.chief:
            shutil.rmtree(stage.folder(session.workdir) / PROGRESS, ignore_errors=True)
        if asked_to_stop(session.stop):
            raise Stopped(f"stopped after training stage {stage.number + 1}; the stage is saved")
        _evaluate_stage(session, stage, done)
        results.update(session, stages)
        before = done


# ---------------------------------------------------------------------------------------------------------------- training


def _train_stage(
    session: Session, stage: Stage, stages: tuple[Stage, ...], initial: CLState, before: Finished | None, total: int
) -> Finished:
    """Trains a stage and writes its checkpoint."""
    method, seed, began = session.method, session.settings.run.seed, time.monotonic()
    state = before.state if before else initial
    folder = stage.folder(session.workdir)

    # ---- the task's rows, and how alike it is to the tasks before it
    own = own_rows(session, stage) if stage.train else None
    embedding = _embedding(session, stage, own)
    earlier = [before.tree["embedding"][f"task_{i:02d}"] for i in range(stage.index)] if before else []
    alike = similarity.similarities(earlier, embedding, session.settings.similarity.clamp) if earlier else np.zeros(0, np.float32)
    info = TaskInfo(stage.index, stage.name, total, len(own) if own else 0, alike, seed)

    # ---- the method's state for this task, and what trains
    probe = _probe(session, own) if own else None
    state = method.start_task(state, info, probe)
    mask = check_contract(method, before.state if before else None, state, info)
    counts = _announce(session, stage, stages, state, mask, alike)

    # ---- phases
    seconds = 0.0
    phases = method.phases(info)
    origin = before.digest if before else session.base
    data = stage_data(session, stage, own, method.replay(info)) if phases else None
    for phase in phases:
        state, passed = _run_phase(session, stage, stages, phase, data, state, mask, origin, last=phase is phases[-1])
        seconds += passed
    if own:
        state = method.end_task(state, info, probe)

    # ---- checkpoint
    tree = meshes.to_host(method.to_disk(state)) | {"embedding": {f"task_{stage.index:02d}": embedding}}
    digest = trees.digest(tree)
    meta = results.stage_meta(session, stage, digest, before.digest if before else "", counts, {
        "train": seconds, "stage": time.monotonic() - began}, alike)
    save_checkpoint(folder / FINAL, {"adapter": tree}, {"meta": meta})
    session.logger.event("stage_trained", digest=digest, seconds=seconds)
    merged = trees.merge(before.tree if before else {}, tree)
    return Finished(state, merged, digest, meta)


def _embedding(session: Session, stage: Stage, own: EncodedRows | None) -> dict[str, np.ndarray]:
    if own is None or stage.fresh or len(stage.train) != 1:
        return {}
    return similarity.task_embedding(session, stage.name, own, session.settings.evaluate.batch_size)


def _probe(session: Session, rows: EncodedRows):
    """What methods ask of training samples: (state, row numbers) -> {name: f32[n, ...]}."""

    def probe(state: CLState, numbers: np.ndarray) -> dict[str, np.ndarray]:
        params, memory = meshes.put_replicated((state.params, state.memory), session.mesh)
        parts: dict[str, np.ndarray] = {}
        for positions, batch in chosen_batches(session, rows, numbers, session.settings.evaluate.batch_size):
            out = session.probe_step(params, memory, session.llava, meshes.put_batch(batch, session.mesh), state.stage)
            for name, value in out.items():
                host = np.asarray(value)[: len(positions)]
                parts.setdefault(name, np.zeros((len(numbers), *host.shape[1:]), host.dtype))[positions] = host
        return parts

    return probe


def _run_phase(
    session: Session, stage: Stage, stages: tuple[Stage, ...], phase: Phase, data: StageData, state: CLState, mask, origin: str, last: bool
) -> tuple[CLState, float]:
    """Trains one phase, from its beginning or from the newest progress that can be trusted; `origin` names what the stage began with."""
    settings, method = session.settings, session.method
    trainable, frozen = trees.partition(state.params, mask)
    begin = start_phase(trainable, settings.train, session.mesh)
    iterator = open_iterator(session, data)
    folder = stage.folder(session.workdir) / PROGRESS
    spent = _resume(session, folder, phase, origin, begin, iterator)
    session.logger.rewind(stage.number, phase.name, begin.step)
    later = (len(stages) - stage.number - 1) * len(data.plan)
    session.logger.start_phase(stage=stage.number, stages=len(stages), task=stage.name, phase=phase.name, steps=len(data.plan),
                               first_step=begin.step, steps_after=later)
    began = time.monotonic() - spent
    names = {(row.task_id, row.index): f"{row.example.task} record {row.example.id}" for row in data.rows.rows}
    # The seed of a stage's draws depends on its place in the run, so that isolated stages differ too.
    plan = PhasePlan(stage.index, len(data.plan), settings.run.seed * 1000 + stage.number, lambda *row: names[row],
                     settings.run.checkpoint_every_steps, stage.name)

    def save(now: PhaseState) -> None:
        record = {"step": now.step, "phase": phase.name, "origin": origin, "loss": now.loss, "seconds": time.monotonic() - began}
        path = folder / f"{phase.name}_{now.step:07d}"
        changed = {"trainable": now.trainable, "optimizer": now.optimizer}
        save_checkpoint(path, changed, {"meta": record, "iterator": _position(iterator, now.step)})
        for old in sorted(folder.glob(f"{phase.name}_*[0-9]"))[:-2] if session.chief else ():
            shutil.rmtree(old, ignore_errors=True)

    frozen, memory = meshes.put_replicated((frozen, state.memory), session.mesh)
    end = train_phase(
        plan=plan, state=begin, frozen=frozen, memory=memory, llava=session.llava, batches=iterator,
        step_function=session.train_step(data.separate), method=method, train=settings.train, mesh=session.mesh, logger=session.logger,
        stop=session.stop, save=save,
    )
    if not last:
        save(end)  # a phase that is done is not run again when a later one is killed
    params = trees.merge(frozen, end.trainable)
    return dataclasses.replace(state, params=params), time.monotonic() - began


def _position(iterator: TrainIterator, step: int) -> dict[str, Any]:
    """Where the iterator must go on: after the steps that are done (it reads ahead of them)."""
    return iterator.get_state() | {"next_index": step}


def _resume(session: Session, folder: Path, phase: Phase, origin: str, state: PhaseState, iterator: TrainIterator) -> float:
    """Takes up the newest intact progress of a phase into `state` and the iterator; returns the seconds it had taken."""
    path, skipped = find_newest(folder, f"{phase.name}_*", clean=session.chief)
    for damaged, reason in skipped:
        logging.warning("Progress %s is skipped: %s", damaged.name, reason)
    if path is None:
        return 0.0
    like = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    if load_records(path)["meta"]["origin"] != origin:
        logging.warning("Progress %s is dropped: the stage began with another state then than it does now.", path.name)
        if session.chief:
            shutil.rmtree(folder, ignore_errors=True)
        return 0.0
    try:
        loaded, records = load_checkpoint(path, {"trainable": like(state.trainable), "optimizer": like(state.optimizer)})
        iterator.set_state(records["iterator"])
    except UserError as error:
        raise UserError(f"{path} cannot be continued: {error}") from error
    state.trainable, state.optimizer = loaded["trainable"], loaded["optimizer"]
    state.step, state.loss = records["meta"]["step"], records["meta"]["loss"]
    session.logger.message(f"resumed after step {state.step} of phase {phase.name}, where the loss was {state.loss:.6g}")
    return float(records["meta"]["seconds"])


def _announce(session: Session, stage: Stage, stages: tuple[Stage, ...], state: CLState, mask, alike: np.ndarray) -> dict[str, int]:
    """Prints what trains and what rests; returns the trainable parameters by group."""
    base = session.llava.to_tree()
    table = shapes.describe_parameters(state.params, mask, base, stage.index)
    session.logger.message(f"\nstage {stage.number + 1} of {len(stages)}: {stage.name} with {session.method.name}\n{table}")
    if len(alike):
        listed = ", ".join(f"{session.tasks[i]} {value:.3f}" for i, value in enumerate(alike))
        session.logger.message(f"similarity to the tasks before: {listed}")
    return shapes.trainable_counts(state.params, mask)


# -------------------------------------------------------------------------------------------------------------- evaluation


def _evaluate_stage(session: Session, stage: Stage, done: Finished) -> None:
    """Scores every task of the stage; scores that are there and intact are read back."""
    params, memory = meshes.put_replicated((done.state.params, done.state.memory), session.mesh)
    state = dataclasses.replace(done.state, params=params, memory=memory)
    folder = stage.folder(session.workdir)
    for task in stage.evaluate:
        result, known = evaluate_task(session, state, done.digest, task, stage.local(task), folder)
        shown = ", ".join(f"{mode} {value:.2f}" for mode, value in result["accuracy"].items())
        session.logger.message(f"after stage {stage.number + 1} {stage.name}: {session.tasks[task]} {shown}")
        if not known:
            session.logger.event("scores", stage=stage.number, phase="evaluate", task=session.tasks[task], **result["accuracy"])
