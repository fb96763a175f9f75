"""The sequence of tasks: start a task, train its phases, end it, save it, evaluate all tasks so far, report; resumes anywhere."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from proglora_jax.checkpoints.stage import save_checkpoint
from proglora_jax.continual import results, similarity
from proglora_jax.continual.answering import evaluate_task
from proglora_jax.continual.phases import run_phases
from proglora_jax.continual.probes import open_probe
from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import own_rows
from proglora_jax.continual.stages import FINAL, PROGRESS, Finished, Stage, load_stage, plan_stages
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data.errors import UserError
from proglora_jax.data.rows import EncodedRows
from proglora_jax.methods.base import TaskInfo, check_contract
from proglora_jax.training import shapes
from proglora_jax.training.loop import Stopped


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
        if session.stop.requested:
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
    probe = open_probe(session, own) if own else None
    state = method.start_task(state, info, probe)
    mask = check_contract(method, before.state if before else None, state, info)
    counts = _announce(session, stage, stages, state, mask, alike)

    # ---- phases
    if own:
        state, seconds = run_phases(session, stage, stages, info, own, state, probe, origin=before.digest if before else session.base)
        state = method.end_task(state, info, probe)
    else:
        seconds = 0.0

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
