"""The memory of ProgLoRA's recall loss: what is kept of old tasks' samples, which of them count, and features that are read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core.types import CLState, PyTree
from proglora_jax.data import replay
from proglora_jax.methods.views import Probe, TaskInfo

# Kept in CLState.carry by task: the training step reads the memory and is compiled once, so nothing there may grow.
PROJECTORS, ROWS = "projectors", "recall_rows"


def task_key(index: int) -> str:
    """The name under which a task's part is kept."""
    return f"task_{index:02d}"


def empty(total: int, phi: int, layers: tuple[int, ...], width: int) -> dict[str, jax.Array]:
    """A memory of fixed size: {"features": f32[C, phi, ..., D], "targets": f32[C, phi, ..., C], "mask": f32[C, phi]}.

    Args:
        total: number of tasks, C.
        phi: samples of a task.
        layers: (L,) where every layer has gates of its own, else ().
        width: D.
    """
    phi = max(phi, 1)
    return {
        "features": jnp.zeros((total, phi, *layers, width), jnp.float32),
        "targets": jnp.zeros((total, phi, *layers, total), jnp.float32),
        "mask": jnp.zeros((total, phi), jnp.float32),
    }


def counted(memory: Mapping[str, Any], info: TaskInfo, phi: int, count: str) -> jax.Array:
    """Which stored samples count in a stage, f32[C, phi]: the first (1 - similarity) phi of each old task, or all.

    Source: ProgLoRA (Findings of ACL 2025), section 3.3, with the counts of section 3.2.
    """
    similarity = info.similarity if count == "similarity" else np.zeros(info.index)
    mask = np.zeros((info.total, max(phi, 1)), np.float32)
    for task, value in enumerate(similarity):
        mask[task, : replay.replay_count(float(value), phi)] = 1.0
    targets = jnp.asarray(memory["targets"])
    filled = jnp.any(targets > 0, axis=tuple(range(2, targets.ndim)))  # a task smaller than phi fills its first places only
    return jnp.asarray(mask) * filled


def store(state: CLState, info: TaskInfo, rows: np.ndarray, seen: Mapping[str, np.ndarray], projector: PyTree | None) -> CLState:
    """Keeps a task's features and gates, the rows that they come from, and its query projector where one is given."""
    memory, count, key = dict(state.memory), len(rows), task_key(info.index)
    memory["features"] = jnp.asarray(memory["features"]).at[info.index, :count].set(seen["z"])
    memory["targets"] = jnp.asarray(memory["targets"]).at[info.index, :count].set(seen["w"])
    kept = {ROWS: np.asarray(rows, np.int32)} | ({} if projector is None else {PROJECTORS: projector})
    carry = state.carry | {name: state.carry.get(name, {}) | {key: value} for name, value in kept.items()}
    return dataclasses.replace(state, memory=memory, carry=carry)


def read_again(state: CLState, info: TaskInfo, probe: Probe) -> CLState:
    """The memory with the features of all old samples as the model sees them now; their targets stay.

    For features that depend on what trains (the mm_projector, or blocks of lower layers): those of the end of the old task are not
    what the router will be asked about.
    """
    features = jnp.asarray(state.memory["features"])
    for task in range(info.index):
        rows = state.carry[ROWS][task_key(task)]
        features = features.at[task, : len(rows)].set(probe.earlier(task)(state, rows)["z"])
    return dataclasses.replace(state, memory=state.memory | {"features": features})


def to_disk(state: CLState) -> dict[str, Any]:
    """What a stage's checkpoint holds of the memory: the newest task's part."""
    stage = int(state.stage)
    tree: dict[str, Any] = {"memory": {task_key(stage): {name: state.memory[name][stage] for name in ("features", "targets")}}}
    for name in (PROJECTORS, ROWS):
        if task_key(stage) in state.carry.get(name, {}):
            tree[name] = {task_key(stage): state.carry[name][task_key(stage)]}
    return tree


def from_disk(tree: Mapping[str, Any], fresh: CLState, state: CLState, stage: int) -> CLState:
    """The state with the memories of all tasks so far."""
    memory = dict(fresh.memory)
    for task in range(stage + 1):
        for name in ("features", "targets"):
            memory[name] = jnp.asarray(memory[name]).at[task].set(tree["memory"][task_key(task)][name])
    carry = state.carry | {name: tree[name] for name in (PROJECTORS, ROWS) if name in tree}
    return dataclasses.replace(state, memory=memory, carry=carry)
