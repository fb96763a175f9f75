"""A pool of single ranks {linear: {"a": [..., d_in, R], "b": [..., R, d_out]}}: what tasks add and drop, and how the arrays move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core.types import PyTree


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a task does to the pool.

    Attributes:
        before: ranks before it.
        new: ranks that it adds.
        every: after it, every so-many-th rank of the old part and of the new part is dropped; 0 drops none.
    """

    before: int
    new: int
    every: int

    @property
    def merged(self) -> int:
        """Ranks with the task's own."""
        return self.before + self.new

    def kept(self) -> np.ndarray:
        """i64[k] places of the ranks that stay, old part first: those with (index + 1) mod every != 0 in each part."""
        parts = [(0, self.before), (self.before, self.new)]
        keep = [start + np.flatnonzero((np.arange(size) + 1) % self.every if self.every else np.ones(size)) for start, size in parts]
        return np.concatenate(keep)


def schedule(new: list[int], capacity: int, progressive: bool) -> list[Turn]:
    """The turns of a sequence of tasks.

    Args:
        new: ranks that each task adds.
        capacity: a pool that reaches this many ranks drops as many as the next task will add (every (capacity / next)-th).
        progressive: False drops nothing until the last task, and then as many as fit the capacity.

    Raises:
        ValueError: "task <n> adds <r> ranks to a pool of <k>, more than the capacity of <c>", or "..., so none of the earlier tasks' ..."
    """
    turns, count = [], 0
    for task, own in enumerate(new):
        every, last, merged = 0, task == len(new) - 1, count + own
        if progressive and merged > capacity:
            raise ValueError(f"task {task + 1} adds {own} ranks to a pool of {count}, more than the capacity of {capacity}")
        if progressive and merged == capacity and not last:
            every = capacity // new[task + 1]
            if every < 2:
                raise ValueError(f"task {task + 2} adds {new[task + 1]} ranks, so none of the earlier tasks' would stay")
        if not progressive and last and merged > capacity:
            every = max((m for m in range(2, merged + 1) if len(Turn(count, own, m).kept()) <= capacity), default=2)
        turns.append(Turn(count, own, every))
        count = len(turns[-1].kept())
    return turns


def put(pool: PyTree, ranks: PyTree, start: int, count: int) -> PyTree:
    """The first `count` ranks of one set in the places from `start` on of another."""
    return {
        name: {
            "a": jnp.asarray(pool[name]["a"]).at[..., start : start + count].set(leaf["a"][..., :count]),
            "b": jnp.asarray(pool[name]["b"]).at[..., start : start + count, :].set(leaf["b"][..., :count, :]),
        }
        for name, leaf in ranks.items()
    }


def keep(pool: PyTree, places: np.ndarray) -> PyTree:
    """The ranks at some places, moved to the front; the rest of the pool is empty."""
    return {name: {"a": _front(leaf["a"], places, -1), "b": _front(leaf["b"], places, -2)} for name, leaf in pool.items()}


def keep_rows(keys: jax.Array, places: np.ndarray) -> jax.Array:
    """As `keep`, for keys [..., R, D]."""
    return _front(keys, places, -2)


def _front(leaf: jax.Array, places: np.ndarray, axis: int) -> jax.Array:
    chosen = jnp.take(jnp.asarray(leaf), jnp.asarray(places), axis=axis)
    pad = [(0, 0)] * leaf.ndim
    pad[axis] = (0, leaf.shape[axis] - len(places))
    return jnp.pad(chosen, pad)


def gather(pool: PyTree, places: jax.Array) -> PyTree:
    """Ranks of stacked layers by each layer's own places: i32[L, n]; without layers i32[n]."""
    take = lambda leaf, where, axis: jnp.take_along_axis(jnp.asarray(leaf), where, axis=axis)
    across, down = places[..., None, :], places[..., :, None]
    return {name: {"a": take(leaf["a"], across, -1), "b": take(leaf["b"], down, -2)} for name, leaf in pool.items()}


def join(*parts: PyTree) -> PyTree:
    """Sets of ranks side by side."""
    first, *rest = parts
    if not rest:
        return first
    side = lambda name, leaf, axis: jnp.concatenate([part[name][leaf] for part in parts], axis=axis)
    return {name: {"a": side(name, "a", -1), "b": side(name, "b", -2)} for name in first}


def pair(params: PyTree, parts: PyTree, prefix: str) -> tuple[PyTree, PyTree]:
    """Leaves and gates of the primitive, what learns apart from what rests.

    Args:
        params: sets of ranks by name.
        parts: {set's name without prefix: f32[..., B|1, 1, R] gates}; with "block" among them the block learns, else pool and shared do.
        prefix: of the sets' names.

    Returns:
        ({linear: {"a", "b", and for what rests "pool_a", "pool_b"}}, {"new": gates of what learns, "pool": gates of what rests}).
    """
    learns = ("block",) if "block" in parts else ("pool", "shared")
    rests = [name for name in ("pool", "shared") if name in parts and name not in learns]
    side = lambda names: join(*(params[prefix + name] for name in names))
    lead = jnp.broadcast_shapes(*(gate.shape[:-1] for gate in parts.values()))
    wide = lambda name: jnp.broadcast_to(parts[name], (*lead, parts[name].shape[-1]))
    gates = lambda names: jnp.concatenate([wide(name) for name in names], axis=-1)
    frozen = side(rests) if rests else {}
    leaves = {
        name: dict(leaf) | ({"pool_a": frozen[name]["a"], "pool_b": frozen[name]["b"]} if rests else {})
        for name, leaf in side(learns).items()
    }
    return leaves, {"new": gates(learns), "pool": gates(rests) if rests else jnp.zeros((*lead, 0), jnp.float32)}
