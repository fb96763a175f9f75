"""MoCL: one block and one key per task; the cosine of the mean instruction embedding with the keys weights the blocks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import gates as gating
from proglora_jax.core import precise
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR, GateInputs, Passes, Probe, TaskInfo, require, require_choice
from proglora_jax.methods.pooled import Pooled
from proglora_jax.methods.routing import Routing

SHARPNESS = 8.0
"""Factor on the cosines before the softmax, as in the authors' code."""


@dataclasses.dataclass(frozen=True)
class MoCL(Pooled):
    """y = W x + s sum_{k<=i} w_k B_k A_k x, w = softmax(8 c), c_k = cos(q, v_k); L = CE + mean(1 - c_i).

    Attributes:
        weights: "softmax8" (softmax over eight times the cosines, the authors' code) or "cosine" (the cosines themselves, the paper).
        batch_mean: whether all rows of a batch share the mean of their weights, as in the authors' code.
        use_scale: whether the blocks' outputs are scaled by alpha / rank; the authors' code leaves the scale out.
        match_weight: weight of the matching loss, which draws the new key to the new task's instructions.
        train_old_keys: whether the keys of earlier blocks go on training, as they do in the authors' code.

    Source: MoCL (Findings of NAACL 2024) and its code; the ProgLoRA papers rerun it on their r = 16 block in all seven linears. What is
    left open and what is chosen: the query is the mean of the backbone's own word embeddings over the instruction (the original Llama
    script builds its encoder from the config alone, so with random weights); weights are per sample, so that an answer does not depend on
    its neighbours; old keys are frozen like their blocks; keys start uniform in [0, 1) as in the original. The matching loss of its Llama
    script is accepted but never passed on; it is on here, as in the paper and the other scripts.
    """

    a_init: str = "kaiming"
    weights: str = "softmax8"
    batch_mean: bool = False
    use_scale: bool = True
    match_weight: float = 1.0
    train_old_keys: bool = False

    name: ClassVar[str] = "mocl"
    keeps_forward: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require_choice("weights", self.weights, ("softmax8", "cosine"))
        require(self.match_weight >= 0, "match_weight", self.match_weight, "must be >= 0 (1.0 in the paper)")

    @property
    def isolated_as(self) -> str:
        """Plain LoRA, where a single block has the gate 1 and the usual scale."""
        return "lora" if self.weights == "softmax8" and self.use_scale else "self"

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 where the scale is left out."""
        return self.alpha / self.rank if self.use_scale else 1.0

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """Pool and first key."""
        state = super().init(targets, projector, total, seed)
        keys = {"key": _new_key(seed, 0, targets.width), "keys": jnp.zeros((total, targets.width), jnp.float32)}
        return dataclasses.replace(state, params=state.params | keys)

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Freezes the last block and its key, and makes new ones."""
        state = super().start_task(state, info, probe)
        if info.index == 0:
            return state
        keys = jnp.asarray(state.params["keys"]).at[info.index - 1].set(state.params["key"])
        key = _new_key(info.seed, info.index, keys.shape[1])
        return dataclasses.replace(state, params=state.params | {"keys": keys, "key": key})

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """The new block and its key (and old keys by flag)."""
        return ("block", "key") + (("keys",) if self.train_old_keys else ())

    def group(self, path: str) -> str:
        """Keys are the group "gate"."""
        if path.startswith(PROJECTOR):
            return PROJECTOR
        return GATE if path in ("key", "keys") else ADAPTER

    def similarities(self, params: PyTree, inputs: GateInputs) -> jax.Array:
        """f32[B, M] cosines of the mean instruction embedding with every key; 0 for a row without instruction."""
        query = gating.mean_feature(inputs.embeddings, inputs.segments == segments.INSTRUCTION)  # [B, D]
        old = params["keys"] if self.train_old_keys else jax.lax.stop_gradient(params["keys"])
        newest = (jnp.arange(old.shape[0]) == inputs.stage)[:, None]
        return precise.matmul(_unit(query), _unit(jnp.where(newest, params["key"][None], old)).T)

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """One weight per block and sample."""
        cosines = self.similarities(params, inputs)
        if self.weights == "softmax8":
            weights = gating.block_softmax(SHARPNESS * cosines, inputs.stage)
        else:
            weights = jnp.where(jnp.arange(cosines.shape[1]) <= inputs.stage, cosines, 0.0)
        if self.batch_mean:
            weights = jnp.broadcast_to(weights.mean(axis=0, keepdims=True), weights.shape)
        return self.split_gates(params, weights, inputs.stage)

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """The matching loss, mean over the batch of 1 - cos(query, newest key)."""
        if not self.match_weight:
            return jnp.float32(0), {}
        match = 1.0 - jnp.take(self.similarities(params, inputs), inputs.stage, axis=1).mean()
        return self.match_weight * match, {"match": match}

    def fold(self, state: CLState, task: int) -> PyTree:
        """Not possible: the gates depend on each sample's instruction."""
        raise ValueError(f"{self.name} cannot be folded into one adapter: its gates are computed from each sample's instruction")

    def routing(self, state: CLState) -> Routing:
        """Cosines of the mean instruction embedding with the keys; eight times as sharp before the softmax.

        Raises:
            ValueError: with batch_mean, where a prompt's gates depend on the prompts beside it.
        """
        if self.batch_mean:
            raise ValueError(f"{self.name} with config.method.batch_mean=True gates a prompt by the rows beside it as well")
        stage, params = int(state.stage), state.params
        keys = np.concatenate([np.asarray(params["keys"])[:stage], np.asarray(params["key"])[None]])  # [M, D]
        softmax = self.weights == "softmax8"
        temperature, weights = (1.0 / SHARPNESS, "softmax") if softmax else (1.0, "scores")
        return Routing(keys, temperature, pool="mean", score="cosine", weights=weights)


def _new_key(seed: int, index: int, width: int) -> jax.Array:
    """A key drawn uniformly from [0, 1), f32[D]."""
    return jnp.asarray(trees.named_generator(seed, "key", index).uniform(0.0, 1.0, width), np.float32)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] over their norm; zeros stay zeros, without a gradient that is not a number."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))
