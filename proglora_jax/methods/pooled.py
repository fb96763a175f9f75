"""What every method with a growing pool shares: one block per task, old blocks frozen in slots fused along rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import lowrank
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.methods.base import Cost, Method, Phase, Probe, TaskInfo, require, require_choice


@dataclasses.dataclass(frozen=True)
class Pooled(Method):
    """A pool of frozen blocks and one trainable block per stage.

    Attributes:
        fuse: "delta" (sum of the blocks' outputs) or "factor" (fused factors), see `lowrank.mix_ranks`.
        pool_chunk: slots are allocated in chunks of this many; 0 allocates all at once, which means one compile for the
            whole sequence; 1 means a compile per stage and no wasted FLOPs. Without empty slots the first stage has plain LoRA's
            losses to the last bit; sums over empty slots add zeros, in an order of their own, and so differ by rounding.
    """

    fuse: str = "delta"
    pool_chunk: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_choice("fuse", self.fuse, lowrank.MIXES)
        require(self.pool_chunk >= 0, "pool_chunk", self.pool_chunk, "must be 0 (all slots at once) or a chunk of slots")

    def mix(self) -> str:
        """How blocks are fused."""
        return self.fuse

    def slots(self, stage: int, total: int) -> int:
        """Frozen slots that a stage needs (its index), rounded up to the chunk; all of them with chunk 0."""
        return -(-stage // self.pool_chunk) * self.pool_chunk if self.pool_chunk else total - 1

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """One fresh block and an empty pool."""
        state = super().init(targets, projector, total, seed)
        pool = lowrank.empty_pool(targets, self.slots(0, total), self.rank)
        return dataclasses.replace(state, params=state.params | {"pool": pool})

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Freezes the last task's block into its slot and makes a fresh one (B = 0); the first task keeps the initial block."""
        state = dataclasses.replace(state, stage=jnp.int32(info.index))
        if info.index == 0:
            return state
        params = state.params
        pool = lowrank.grow_pool(params["pool"], self.slots(info.index, info.total), self.rank)
        pool = lowrank.write_slot(pool, params["block"], info.index - 1, self.rank)
        block = lowrank.init_block(trees.named_generator(info.seed, "block", info.index), self._targets(params), self.rank, self.a_init)
        return dataclasses.replace(state, params=params | {"pool": pool, "block": block})

    def leaves(self, params: PyTree) -> PyTree:
        """The trainable block and the pool, side by side."""
        return {
            name: {"a": leaf["a"], "b": leaf["b"], "pool_a": params["pool"][name]["a"], "pool_b": params["pool"][name]["b"]}
            for name, leaf in params["block"].items()
        }

    def split_gates(self, params: PyTree, weights: jax.Array, stage: jax.Array) -> PyTree:
        """Gates per block f32[B, M] -> the primitive's gates; the newest block's weight is that of index `stage`."""
        slots = self.pool_slots(params)
        newest = jnp.take(weights, stage, axis=1)[:, None]  # [B, 1]
        frozen = weights[:, :slots]
        frozen = jnp.pad(frozen, ((0, 0), (0, slots - frozen.shape[1])))  # the last chunk may hold more slots than there are tasks
        return {
            "pool": lowrank.repeat_gates(frozen, self.rank),
            "new": lowrank.repeat_gates(newest, self.rank),
            "blocks": weights,
        }

    def pool_slots(self, params: PyTree) -> int:
        """Capacity of the pool, from its shapes."""
        first = next(iter(params["pool"].values()))
        return first["a"].shape[-1] // self.rank

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """The slots of the pool rest."""
        return dataclasses.replace(super().cost(params, info, phase), frozen=lowrank.ranks_of(params["pool"]))

    def fill(self, params: PyTree, info: TaskInfo) -> dict[str, str]:
        """A slot per earlier task."""
        return {"pool": f"{info.index} of {self.pool_slots(params)} slots filled"}

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """One block per task."""
        return (info.index + 1) * super().stored_parameters(state, info)

    def to_disk(self, state: CLState) -> dict[str, Any]:
        """The stage's new block, and the other parameters but not the pool (its blocks lie in the earlier stages)."""
        stage = int(state.stage)
        rest = {name: value for name, value in state.params.items() if name not in ("block", "pool")}
        return {"pool": {f"block_{stage:02d}": state.params["block"]}, "params": rest}

    def from_disk(self, tree: Mapping[str, Any], fresh: CLState, stage: int) -> CLState:
        """Puts the blocks of the earlier stages into the pool and the stage's own into the trainable place."""
        slots = self.slots(stage, self.pool_slots(fresh.params) + 1)
        pool = lowrank.grow_pool(fresh.params["pool"], slots, self.rank)
        for index in range(stage):
            pool = lowrank.write_slot(pool, tree["pool"][f"block_{index:02d}"], index, self.rank)
        params = tree["params"] | {"pool": pool, "block": tree["pool"][f"block_{stage:02d}"]}
        return dataclasses.replace(fresh, params=params, stage=jnp.int32(stage))

    def blocks(self, state: CLState) -> int:
        """The blocks of the tasks so far."""
        return int(state.stage) + 1

    def block(self, state: CLState, index: int) -> PyTree:
        """A frozen block out of its slot, or the newest."""
        newest = super().block(state, index)
        if index == int(state.stage):
            return newest
        at = slice(index * self.rank, (index + 1) * self.rank)
        return {name: {"a": leaf["a"][:, :, at], "b": leaf["b"][:, at, :]} for name, leaf in state.params["pool"].items()}

    def fold_weighted(self, state: CLState, weights: np.ndarray) -> PyTree:
        """The pool under constant weights f32[M] as one adapter, scale folded into B.

        Factors lie side by side with their weight in B; where they are fused first, they are summed into one block's rank.
        """
        stage = int(state.stage)
        folded = {}
        for name, leaf in self.leaves(state.params).items():
            slots = leaf["pool_a"].shape[-1] // self.rank
            frozen = np.zeros(slots, np.float32)
            frozen[: len(weights)] = weights[:slots]
            gate = np.repeat([*frozen, weights[stage]], self.rank)
            a = jnp.concatenate([leaf["pool_a"], leaf["a"]], axis=-1)
            b = jnp.concatenate([leaf["pool_b"], leaf["b"]], axis=1) * (self.scale * gate)[None, :, None]
            if self.fuse == "factor":
                a = (a * gate).reshape(*a.shape[:2], -1, self.rank).sum(axis=2)  # [L, d_in, r]
                b = b.reshape(b.shape[0], -1, self.rank, b.shape[2]).sum(axis=1)  # [L, r, d_out]
            folded[name] = {"a": a, "b": b}
        return folded

    def _targets(self, params: PyTree) -> Targets:
        shapes = {name: (leaf["a"].shape[1], leaf["b"].shape[2]) for name, leaf in params["block"].items()}
        return Targets(next(iter(params["block"].values()))["a"].shape[0], shapes, width=0)
