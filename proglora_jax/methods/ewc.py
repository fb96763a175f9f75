"""EWC: sequential LoRA with a quadratic penalty on moving what mattered to earlier tasks, by their Fisher information."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.data import replay
from proglora_jax.methods.base import PROJECTOR, GateInputs, Passes, Probe, TaskInfo, require, require_choice
from proglora_jax.methods.lora import LoRA


@dataclasses.dataclass(frozen=True)
class EWC(LoRA):
    """L = CE + lambda / 2 sum_{p<i} sum_j F_{p,j} (theta_j - theta*_{p,j})^2 over what trains.

    Attributes:
        penalty_weight: lambda; the penalty has the factor 1/2 besides.
        accumulate: "separate" (each old task pulls to its own end) or "online" (one anchor, the newest end, and F <- gamma F + F_new).
        gamma: share of the old information that "online" keeps.
        fisher: "batch" (square of the mean gradient of a mini-batch, averaged over mini-batches) or "per_sample".
        fisher_batches: mini-batches that the information is taken from; fewer where the task is smaller.
        fisher_batch_size: rows of each.
        scope: "lora_and_projector" or "lora", what is held.

    "separate" needs no list of tasks: a sum of quadratics is a quadratic. With F = sum F_p and the information-weighted mean m of the
    ends, sum_p F_p (theta - theta*_p)^2 = F (theta - m)^2 + c, and c grows by F F_p / (F + F_p) (m - theta*_p)^2 with every task p (the
    parallel axis theorem). It is the same number, not an approximation, every term is positive, so nothing cancels in float32, and what
    is stored is F, m and the scalar c, however many tasks there are: the training step keeps its shapes.

    Source: Overcoming catastrophic forgetting in neural networks (PNAS 2017), Eq. 3. What is left open and what is chosen: the ProgLoRA
    papers say that EWC tunes "the entire model", which contradicts their own set-up and cost; here it is what LoRA trains. The
    information is the empirical one (ground-truth labels, no dropout) at the end of the task, over 50 batches of 12 rows; lambda = 5000
    belongs to this and the factor 1/2, and is not published (another public code base takes 0.5 without the factor, and sums per sample).
    """

    penalty_weight: float = 5000.0
    accumulate: str = "separate"
    gamma: float = 1.0
    fisher: str = "batch"
    fisher_batches: int = 50
    fisher_batch_size: int = 12
    scope: str = "lora_and_projector"

    name: ClassVar[str] = "ewc"

    def __post_init__(self):
        super().__post_init__()
        require(self.penalty_weight >= 0, "penalty_weight", self.penalty_weight, "must be >= 0 (5000 with batches of 12 rows)")
        require_choice("accumulate", self.accumulate, ("separate", "online"))
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "must be in [0, 1] (1 keeps all)")
        require(self.gamma == 1 or self.accumulate == "online", "gamma", self.gamma, "must be 1 with accumulate='separate'")
        require_choice("fisher", self.fisher, ("batch", "per_sample"))
        require(self.fisher_batches >= 1, "fisher_batches", self.fisher_batches, "must be >= 1 (50 is usual)")
        require(self.fisher_batch_size >= 1, "fisher_batch_size", self.fisher_batch_size, "must be >= 1 (12 is usual)")
        require_choice("scope", self.scope, ("lora_and_projector", "lora"))

    def held(self) -> tuple[str, ...]:
        """The parameters that the penalty holds; a projector that does not train needs no holding."""
        return ("block",) + ((PROJECTOR,) if self.scope == "lora_and_projector" and self.train_mm_projector else ())

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """No information yet: a penalty of exactly 0."""
        state = super().init(targets, projector, total, seed)
        held = {name: state.params[name] for name in self.held()}
        memory = {"fisher": jax.tree.map(jnp.zeros_like, held), "anchor": held, "constant": jnp.float32(0)}
        return dataclasses.replace(state, memory=memory)

    def penalty(self, params: PyTree, memory: PyTree) -> jax.Array:
        """sum_p sum_j F_{p,j} (theta_j - theta*_{p,j})^2, f32[]."""
        term = lambda fisher, anchor, theta: (fisher * jnp.square(theta - anchor)).sum()
        held = {name: params[name] for name in memory["anchor"]}
        return sum(jax.tree.leaves(jax.tree.map(term, memory["fisher"], memory["anchor"], held))) + memory["constant"]

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """Half of lambda times the penalty."""
        penalty = self.penalty(params, memory)
        return 0.5 * self.penalty_weight * penalty, {"penalty": penalty}

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe) -> CLState:
        """Adds the task's Fisher information and its end to what the next stages hold on to."""
        size = min(self.fisher_batch_size, info.size)
        rows = replay.replay_indices(info.size, self.fisher_batches * size, info.seed, info.name)
        rows = rows[: len(rows) // size * size]  # whole batches: a smaller one's gradient is noisier, so its square is larger
        new = probe.squared_gradients(state, rows, size, self.fisher, self.held())
        ends = {name: state.params[name] for name in self.held()}
        memory = state.memory
        if self.accumulate == "online":
            total = jax.tree.map(lambda old, new: self.gamma * old + new, memory["fisher"], new)
            return dataclasses.replace(state, memory=memory | {"fisher": total, "anchor": ends})
        merged = {path: _merge(memory_f, trees.flatten(memory["anchor"])[path], trees.flatten(new)[path], trees.flatten(ends)[path])
                  for path, memory_f in trees.flatten(memory["fisher"]).items()}
        part = lambda index: trees.unflatten({path: value[index] for path, value in merged.items()})
        constant = memory["constant"] + sum(value[2] for value in merged.values())
        return dataclasses.replace(state, memory={"fisher": part(0), "anchor": part(1), "constant": constant})

    def to_disk(self, state: CLState) -> dict[str, Any]:
        """Block, projector, and what is held on to."""
        return super().to_disk(state) | {"memory": dict(state.memory)}

    def from_disk(self, tree: Mapping[str, Any], fresh: CLState, stage: int) -> CLState:
        """The same."""
        return dataclasses.replace(super().from_disk(tree, fresh, stage), memory=tree["memory"])


def _merge(fisher: jax.Array, anchor: jax.Array, new: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F1 (t - m1)^2 + F2 (t - m2)^2 as F (t - m)^2 + c: (F, m, sum of c)."""
    fisher, anchor, new, end = (jnp.asarray(leaf, jnp.float32) for leaf in (fisher, anchor, new, end))
    total = fisher + new
    share = jnp.where(total > 0, new / jnp.where(total > 0, total, 1.0), 1.0)
    return total, anchor + share * (end - anchor), (fisher * share * jnp.square(end - anchor)).sum()
