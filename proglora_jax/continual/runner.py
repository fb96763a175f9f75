"""The sequence of tasks: start a task, train its phases, end it, save it, evaluate all tasks so far, report; resumes anywhere."""

from __future__ import annotations

import dataclasses
import shutil
import time

import numpy as np

from proglora_jax.checkpoints.stage import save_checkpoint
from proglora_jax.continual import results, similarity
from proglora_jax.continual.answering import evaluate_task, other_images
from proglora_jax.continual.blank_images import KINDS
from proglora_jax.continual.phases import run_phases
from proglora_jax.continual.probes import open_probe
from proglora_jax.continual.session import Session
from proglora_jax.continual.similarity_encoders import open_encoders
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
from proglora_jax.training.processes import asked_to_stop
from proglora_jax.training.projector import projector_for_task


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
            for progress in stage.folder(session.workdir).glob(f"{PROGRESS}*"):
                shutil.rmtree(progress, ignore_errors=True)
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
    embedding, alike, encoders = _similarity(session, stage, before, own)
    info = TaskInfo(stage.index, stage.name, total, len(own) if own else 0, alike, seed)

    # ---- the method's state for this task, and what trains
    probe = open_probe(session, own, lambda task: own_rows(session, stages[task])) if own else None
    projector = projector_for_task(
        session.settings.train.projector_init_per_task, state.params["mm_projector"], initial.params["mm_projector"], stage.index, seed)
    state = method.start_task(dataclasses.replace(state, params=state.params | {"mm_projector": projector}), info, probe)
    mask = check_contract(method, before.state if before else None, state, info)
    counts = _announce(session, stage, stages, shapes.StageShapes(info, state, mask), alike)

    # ---- phases
    seconds, read = 0.0, {}
    if own:
        state, seconds, odd, padding = run_phases(
            session, stage, stages, info, own, state, probe, origin=before.digest if before else session.base)
        state = method.end_task(state, info, probe)
        read = {"rows": len(own)} | own.counts | {f"{kind}_images": count for kind, count in odd.items()} | padding.to_json()
        for kind, count in odd.items():
            if count:
                session.logger.message(f"{stage.name}: {count} image(s) {KINDS[kind]} in training")

    # ---- checkpoint
    tree = meshes.to_host(method.to_disk(state)) | {"embedding": {f"task_{stage.index:02d}": embedding}}
    digest = trees.digest(tree)
    meta = results.stage_meta(session, stage, digest, before.digest if before else "", counts, {
        "train": seconds, "stage": time.monotonic() - began}, alike if embedding else np.zeros(0, np.float32)) | {
        "encoders": encoders, "data": read}
    save_checkpoint(folder / FINAL, {"adapter": tree}, {"meta": meta})
    session.logger.event("stage_trained", digest=digest, seconds=seconds)
    merged = trees.merge(before.tree if before else {}, tree)
    return Finished(state, merged, digest, meta)


def _similarity(
    session: Session, stage: Stage, before: Finished | None, own: EncodedRows | None
) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """(the task's embedding, f32[i] similarity to each earlier task, hash of the encoders); {}, NaN and "" where nothing asks for it."""
    if own is None or stage.fresh or len(stage.train) != 1 or not session.method.uses_similarity:
        return {}, np.full(stage.index, np.nan, np.float32), ""
    encoders = open_encoders(session)
    if before and before.meta["encoders"] != encoders.fingerprint:
        raise UserError(
            f"config.similarity: the tasks before {stage.name} were embedded by other encoders than config.similarity.encoders="
            f"'{session.settings.similarity.encoders}' gives now; put their files back, or choose another workdir")
    embedding = similarity.task_embedding(session, encoders, stage.name, own)
    earlier = [before.tree["embedding"][f"task_{i:02d}"] for i in range(stage.index)] if before else []
    return embedding, similarity.similarities(earlier, embedding, session.settings.similarity.clamp), encoders.fingerprint


def _announce(session: Session, stage: Stage, stages: tuple[Stage, ...], begun: shapes.StageShapes, alike: np.ndarray) -> dict[str, int]:
    """Prints what trains and what rests; returns the trainable parameters by group."""
    table = shapes.describe_parameters(session.method, begun, session.llava.to_tree())
    session.logger.message(f"\nstage {stage.number + 1} of {len(stages)}: {stage.name} with {session.method.name}\n{table}")
    if np.isfinite(alike).any():
        listed = ", ".join(f"{session.tasks[i]} {value:.3f}" for i, value in enumerate(alike))
        session.logger.message(f"similarity to the tasks before, by {session.settings.similarity.encoders}: {listed}")
    return shapes.trainable_counts(session.method, begun.state, begun.mask)


# -------------------------------------------------------------------------------------------------------------- evaluation


def _evaluate_stage(session: Session, stage: Stage, done: Finished) -> None:
    """Scores every task of the stage; scores that are there and intact are read back."""
    params, memory = meshes.put_replicated((done.state.params, done.state.memory), session.mesh)
    state = dataclasses.replace(done.state, params=params, memory=memory)
    folder = stage.folder(session.workdir)
    asked = [(task, "") for task in stage.evaluate]
    asked += [(task, other) for task in stage.evaluate if (other := other_images(session.settings, session.tasks[task]))]
    for task, images in asked:
        name, way = session.tasks[task], {"": "", "pad": ", images padded", "crop": ", images cropped"}[images]
        result, known = evaluate_task(session, state, done.digest, task, stage.local(task), folder, images)
        shown = ", ".join(f"{mode} {value:.2f}" for mode, value in result["accuracy"].items())
        session.logger.message(f"after stage {stage.number + 1} {stage.name}: {name} {shown}{way}")
        for kind, said in KINDS.items():
            if result.get(f"{kind}_images"):
                session.logger.message(f"{name}: {result[f'{kind}_images']} image(s) {said}")
        lost = {mode: value for mode, value in result["ceiling"].items() if value < 100.0}
        if lost and not known and not images:
            listed = ", ".join(f"{mode} {value:.2f}" for mode, value in lost.items())
            session.logger.message(f"{name}: no answers could score more than {listed}, as the references do")
        if not known:
            told = {"images": images} if images else {}
            session.logger.event("scores", stage=stage.number, phase="evaluate", task=name, **told, **result["accuracy"])
