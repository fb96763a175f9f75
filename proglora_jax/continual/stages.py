"""Which stages a run has, where each lies in the workdir, and what of it can be trusted after a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from proglora_jax.checkpoints.integrity import CheckpointDamaged
from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method
from proglora_jax.training.processes import from_chief, in_any_process

FINAL = "adapter"
PROGRESS = "progress"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: place in the run, from 0; names the folder.
        index: place in the method's sequence, from 0 (always 0 for stages that start anew).
        name: what it is called: the task, or the method where it has a single stage.
        train: indices of the tasks that are trained on.
        evaluate: indices of the tasks that are evaluated afterwards.
        names: task names by the id that the method sees.
        fresh: whether it starts from the initial state instead of the stage before.
    """

    number: int
    index: int
    name: str
    train: tuple[int, ...]
    evaluate: tuple[int, ...]
    names: tuple[str, ...]
    fresh: bool = False

    def local(self, task: int) -> int:
        """The id that the method sees for a task of the run: its place, or 0 in a stage that is a sequence of its own."""
        return 0 if self.fresh else task

    def folder(self, workdir: Path) -> Path:
        """workdir/stages/03_gqa."""
        return workdir / "stages" / f"{self.number:02d}_{self.name.lower()}"


def plan_stages(tasks: tuple[str, ...], method: Method, protocol: str) -> tuple[Stage, ...]:
    """The stages of a run.

    Task after task for a sequence; each task from the start for "isolated"; one stage for a method that is `joint`.

    Raises:
        UserError: for an isolated run of a method that has no task to isolate.
    """
    everything = tuple(range(len(tasks)))
    if method.joint:
        if protocol != "sequential":
            raise UserError(f"config.run.protocol='{protocol}': {method.name} has a single stage; use 'sequential'")
        return (Stage(0, 0, method.name, everything if method.trains else (), everything, tasks),)
    if protocol == "isolated":
        return tuple(Stage(i, 0, name, (i,), (i,), (name,), fresh=True) for i, name in enumerate(tasks))
    return tuple(Stage(i, i, name, (i,), everything[: i + 1], tasks) for i, name in enumerate(tasks))


@dataclasses.dataclass(frozen=True)
class Finished:
    """A stage that is trained.

    Attributes:
        state: the method's state at its end.
        tree: what the checkpoints of all stages up to it hold, merged.
        digest: hash of the stage's own tree.
        meta: the checkpoint's meta.json.
    """

    state: CLState
    tree: dict[str, Any]
    digest: str
    meta: Mapping[str, Any]


def load_stage(stage: Stage, workdir: Path, method: Method, initial: CLState, before: Finished | None) -> Finished | None:
    """The stage's checkpoint, or None when it is not there or cannot be trusted; says why it was skipped.

    A checkpoint is trusted when every checksum holds and it was made from the same predecessor. Process 0 decides for all.

    Raises:
        UserError: in all processes, where one of them does not find the checkpoint that process 0 finds.
    """
    found = _trusted(stage, workdir, method, initial, before)
    here = found.digest if found else ""
    chosen = from_chief(here)
    if not chosen:
        return None
    if in_any_process(np.asarray(here != chosen)):
        raise UserError(
            f"{stage.folder(workdir) / FINAL}: not every process finds the checkpoint that process 0 finds (hash {chosen[:12]}; here: "
            f"{here[:12] or 'nothing that can be trusted'}); --workdir must be on a file system that all processes see alike")
    return found


def _trusted(stage: Stage, workdir: Path, method: Method, initial: CLState, before: Finished | None) -> Finished | None:
    """What this process finds."""
    path = stage.folder(workdir) / FINAL
    if not path.exists() and not any(path.parent.glob(f"{FINAL}.old-*")):
        return None
    try:
        loaded, records = load_checkpoint(path, ["adapter"])
    except CheckpointDamaged as damage:
        logging.warning("Stage %s is trained again: %s", stage.name, damage.reason)
        return None
    meta = records["meta"]
    previous = before.digest if before else ""
    if meta["previous"] != previous:
        change = meta["previous"][:12], previous[:12]
        logging.warning("Stage %s is trained again: it was made from another predecessor (%s, now %s).", stage.name, *change)
        return None
    tree = trees.merge(before.tree if before else {}, loaded["adapter"])
    return Finished(method.from_disk(tree, initial, stage.index), tree, meta["digest"], meta)
