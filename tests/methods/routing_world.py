"""A world without a model for ProgLoRA's routing: embeddings of rows, a probe, and stages whose training is a random move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, Targets
from proglora_jax.methods.base import GateInputs, Method, Probe, TaskInfo, check_contract

WIDTH, LAYERS = 8, 2
TARGETS = Targets(LAYERS, {"q_proj": (WIDTH, 6), "down_proj": (10, WIDTH)}, WIDTH, 5)
# Mostly negative, so that a maximum that is floored at zero shows.
TABLE = (2 * np.random.default_rng(11).standard_normal((tiny_llava.VOCAB, WIDTH)) - 3).astype(np.float32)
PROJECTOR = {"linear_1": {"kernel": np.eye(5, WIDTH, dtype=np.float32), "bias": np.zeros(WIDTH, np.float32)}}
TOTAL, SIZE = 3, 20
SIMILARITY = {0: [], 1: [0.75], 2: [0.5, 0.75]}


def embed(batch) -> np.ndarray:
    """Embeddings [B, T, D]; image positions differ from row to row."""
    x = TABLE[batch["tokens"]].copy()
    here = batch["tokens"] == tiny_llava.IMAGE_TOKEN
    x[here] += np.repeat(batch["image"][:, 0, 0, :1], here.sum(1), axis=0)
    return x


def inputs(batch, stage: int, *, training: bool = False, progress: float = 1.0) -> GateInputs:
    """What gates see of a batch."""
    return GateInputs(jnp.asarray(embed(batch)), batch["segments"], batch["task_id"], jnp.int32(stage), jnp.float32(progress), training)


def info(index: int, size: int = SIZE, similarity=None, method: Method | None = None) -> TaskInfo:
    """Task `index` of three; no similarity, as in a run, where the method does not ask for it."""
    alike = np.float32(SIMILARITY[index] if similarity is None else similarity)
    return TaskInfo(index, f"task{index}", TOTAL, size, alike if method is None or method.uses_similarity else alike * np.nan, 0)


def prober(method: Method, task: int, size: int = SIZE):
    """The probe of a task's rows."""
    rows = tiny_llava.rows_of(task, size)

    def probe(state: CLState, numbers: np.ndarray) -> dict[str, np.ndarray]:
        batch = tiny_llava.batch([rows[i] for i in numbers])
        return jax.tree.map(np.asarray, method.probe(state.params, state.memory, inputs(batch, int(state.stage))))

    return Probe(probe, None, lambda task: prober(method, task, size))


def start(method: Method) -> CLState:
    """The state before the first task."""
    return method.init(TARGETS, PROJECTOR, TOTAL, 0)


def train(method: Method, state: CLState, index: int, seed: int = 0) -> CLState:
    """Moves what trains at random, as training would."""
    rng = np.random.default_rng([seed, index])
    mask = method.trainable_mask(state, info(index))
    moved = {path: np.asarray(leaf) + 0.3 * mask[path] * rng.standard_normal(np.shape(leaf)).astype(np.float32)
             for path, leaf in trees.flatten(state.params).items()}  # fmt: skip
    return dataclasses.replace(state, params=trees.unflatten(moved))


def begin(method: Method, state: CLState, index: int, size: int = SIZE) -> CLState:
    """The state at the start of a task's training."""
    task = info(index, size, method=method)
    started = method.start_task(state, task, prober(method, index, size))
    check_contract(method, state if index else None, started, task)
    return started


def stage(method: Method, state: CLState, index: int, size: int = SIZE) -> CLState:
    """A whole stage."""
    state = train(method, begin(method, state, index, size), index)
    return method.end_task(state, info(index, size, method=method), prober(method, index, size))


def stages(method: Method, count: int, size: int = SIZE) -> CLState:
    """The state after `count` stages."""
    state = start(method)
    for index in range(count):
        state = stage(method, state, index, size)
    return state


def on_disk(method: Method, states) -> dict:
    """What the checkpoints of some stages hold, merged."""
    return trees.merge(*(meshes.to_host(method.to_disk(state)) for state in states))


def batch_of(task: int = 0, count: int = 6, **fixed):
    """Some rows of a task."""
    return tiny_llava.batch(tiny_llava.rows_of(task, count, seed=5, **fixed))


def gates(method: Method, state: CLState, batch, **how) -> np.ndarray:
    """Gates per block f32[B, M]."""
    return np.asarray(method.gates(state.params, state.memory, inputs(batch, int(state.stage), **how))["blocks"])
