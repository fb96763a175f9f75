"""O-LoRA: one block per task, all summed with weight 1; a penalty keeps the new block's row space off those of the old ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core import precise
from proglora_jax.core.types import CLState, PyTree
from proglora_jax.methods.base import GateInputs, Passes, require, require_choice
from proglora_jax.methods.pooled import Pooled


@dataclasses.dataclass(frozen=True)
class OLoRA(Pooled):
    """y = W x + s sum_{p<=i} B_p A_p x; L = CE + lambda1 sum_{linears} sum_{p<i} sum |A_i A_p^T| + lambda2 sum ||A_i||_F + ||B_i||_F.

    Attributes:
        orthogonal_weight: lambda1, of the overlap with old blocks.
        norm_weight: lambda2, of the Frobenius norms of the new block's factors.
        reduction: "sum" over the entries of all A_i A_p^T (the original) or "mean".
        train_forward: "sum" (old blocks take part while the new one trains) or "current_only" (they do at test alone).

    Source: O-LoRA (Findings of EMNLP 2023) and its code. The ProgLoRA papers rerun it on their r = 16 block in all seven linears and give
    no lambda. What is left open and what is chosen: the penalty is the code's plain sum of absolute values over all linears, not squared,
    not a mean, with its lambda1 = 0.5 and lambda2 = 0; at 7B it begins near 225 (i - 1) before the factor, so "mean" is there for other
    sizes. MCITlib's port trains the new block without the old ones, which is "current_only"; its comparison of names, which pairs every
    block with the first match, is a mistake and not offered. Blocks are initialised as PEFT does, as in the original.
    """

    a_init: str = "kaiming"
    orthogonal_weight: float = 0.5
    norm_weight: float = 0.0
    reduction: str = "sum"
    train_forward: str = "sum"

    name: ClassVar[str] = "olora"
    fixed_at_test: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.orthogonal_weight >= 0, "orthogonal_weight", self.orthogonal_weight, "must be >= 0 (0.5 in the original)")
        require(self.norm_weight >= 0, "norm_weight", self.norm_weight, "must be >= 0 (0 in the original)")
        require_choice("reduction", self.reduction, ("sum", "mean"))
        require_choice("train_forward", self.train_forward, ("sum", "current_only"))

    @property
    def isolated_as(self) -> str:
        """Plain LoRA, unless norms are penalised, which needs no earlier task."""
        return "self" if self.norm_weight else "lora"

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """Weight 1 for every block so far; for the newest alone while it trains by itself."""
        index = jnp.arange(self.pool_slots(params) + 1)
        alone = inputs.training and self.train_forward == "current_only"
        weights = index == inputs.stage if alone else index <= inputs.stage
        return self.split_gates(params, weights[None].astype(jnp.float32), inputs.stage)

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """lambda1 times the overlap with old blocks, lambda2 times the norms of the new one."""
        overlap = self._overlap(params, inputs.stage)
        loss, logged = self.orthogonal_weight * overlap, {"overlap": overlap}
        if self.norm_weight:
            norms = sum(_norm(leaf) for block in params["block"].values() for leaf in block.values())
            loss, logged = loss + self.norm_weight * norms, logged | {"norms": norms}
        return loss, logged

    def _overlap(self, params: PyTree, stage: jax.Array) -> jax.Array:
        slots = self.pool_slots(params)
        learned = jnp.repeat(jnp.arange(slots) < stage, self.rank)[None, :, None]
        total, entries = jnp.float32(0), 0
        for name, block in params["block"].items():
            products = precise.einsum("lip,liq->lpq", params["pool"][name]["a"], block["a"], preferred_element_type=jnp.float32)
            total = total + jnp.where(learned, jnp.abs(products), 0.0).sum()
            entries += products.shape[0] * self.rank**2
        return total if self.reduction == "sum" else total / (entries * jnp.maximum(stage, 1))

    def fold(self, state: CLState, task: int) -> PyTree:
        """The plain sum of all blocks so far."""
        del task
        weights = np.zeros(self.pool_slots(state.params) + 1, np.float32)
        weights[: int(state.stage) + 1] = 1.0
        return self.fold_weighted(state, weights)


def _norm(leaf: jax.Array) -> jax.Array:
    """Sum over layers of the Frobenius norm f32[L, ...] -> f32[]; a zero matrix has gradient 0, as in the original's framework."""
    squares = jnp.square(leaf).sum(axis=(1, 2))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0).sum()
