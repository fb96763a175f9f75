"""ProgLoRA (light): one block shared by all tasks in the bottom layers, ProgLoRA's pool in the layers above them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from proglora_jax.core import stack
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.methods.base import TaskInfo, require, require_choice
from proglora_jax.methods.proglora import ProgLoRADynamic


@dataclasses.dataclass(frozen=True)
class ProgLoRALight(ProgLoRADynamic):
    """Layers below `shared_layers`: y = W x + s B A x with one block for all tasks; above: ProgLoRA (dynamic), as in its file.

    Attributes:
        shared_layers: L, the number of bottom layers.
        bottom: what they have: "shared_trained" (a block that trains in every stage, with gate 1), "none" (no block), or
            "shared_frozen_after_first" (it trains in the first stage only; the training step is then compiled twice).
        tie_bottom_layers: whether the bottom layers share one pair of factors, instead of having one each.

    The shared block has leaves of its own, [L, ...]; the task blocks and the pool have those of the upper layers only, so nothing
    trains, is stored or is saved for a pool below. One scan still runs through all layers: the trainable factors are put end to end, the
    frozen pool is read by the layer's own row number, and each layer knows whether it is an upper one (else its gates are 1 and 0).

    Source: Lightweight ProgLoRA, which trains the bottom block "jointly across all tasks", hence the default. Its numbers say
    otherwise: 38 M trainable parameters are the upper 29 of 32 layers alone (42 M times 29/32), and its first task differs from that of
    every other method with this block, though a trained shared block would make them the same; the released code has a commented-out
    switch that skips layers. "none" gives these. The introduction can be read as tied layers; L is a number of layers, though an ablation
    says "blocks". Recall takes 200 samples of each old task; no lambda is printed, so it is the full variant's 2.0.
    """

    shared_layers: int = 3
    bottom: str = "shared_trained"
    tie_bottom_layers: bool = False
    recall_count: str = "fixed"

    name: ClassVar[str] = "proglora_light"

    def __post_init__(self):
        super().__post_init__()
        require(self.shared_layers >= 1, "shared_layers", self.shared_layers, "must be >= 1 (3 in the paper); 0 is proglora_dynamic")
        require_choice("bottom", self.bottom, ("shared_trained", "none", "shared_frozen_after_first"))
        require(self.bottom != "none" or not self.tie_bottom_layers, "tie_bottom_layers", self.tie_bottom_layers,
                "there is nothing to tie with bottom='none'")
        require(self.routing_scope == "global", "routing_scope", repr(self.routing_scope),
                "must be 'global': the bottom layers have no router")

    @property
    def isolated_as(self) -> str:
        """Plain LoRA, where the bottom layers have a block of their own each."""
        return "self" if self.bottom == "none" or self.tie_bottom_layers else "lora"

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """The full variant's state, cut in two: its bottom layers are the shared block, and their pool is dropped.

        Raises:
            UserError: where `shared_layers` leaves no layer for the pool.
        """
        low = self.shared_layers
        require(low < targets.layers, "shared_layers", low, f"must be less than the model's {targets.layers} layers")
        state = super().init(targets, projector, total, seed)
        cut = lambda part, at: jax.tree.map(lambda leaf: leaf[at], part)
        params = state.params | {name: cut(state.params[name], slice(low, None)) for name in ("block", "pool")}
        if self.bottom != "none":
            params["shared"] = cut(state.params["block"], slice(0, 1 if self.tie_bottom_layers else low))
        return dataclasses.replace(state, params=params)

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """One upper block per task, and the shared block."""
        return super().stored_parameters(state, info) + trees.count_parameters(state.params.get("shared", {}))

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """The full variant's, and the shared block."""
        trains = self.bottom == "shared_trained" or (self.bottom == "shared_frozen_after_first" and info.index == 0)
        return super().trainable(info) + (("shared",) if trains else ())

    def leaves(self, params: PyTree) -> PyTree:
        """The trainable factors of all layers, bottom first."""
        return self._whole(params, params["block"])

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter:
        """The adapter; the pool goes along whole, and every layer picks its row."""
        adapter, low = super().adapter(params, gates, key), self.shared_layers
        layers = stack.num_layers(params["block"]) + low
        place = {"row": jnp.maximum(jnp.arange(layers) - low, 0), "upper": jnp.arange(layers) >= low}
        return dataclasses.replace(
            adapter, layer=adapter.layer | place, gates=gates | {"frozen": params["pool"]}, delta=partial(_delta, inner=adapter.delta),
            layer_gate=partial(_layer_gate, bottom=float(self.bottom != "none")),
        )

    def block(self, state: CLState, index: int) -> PyTree:
        """A task's block over all layers, with the shared block below it."""
        return self._whole(state.params, super().block(state, index))

    def _whole(self, params: PyTree, block: PyTree) -> PyTree:
        low = self.shared_layers
        fill = params.get("shared") or jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), block)
        join = lambda below, above: jnp.concatenate([jnp.broadcast_to(below, (low, *below.shape[1:])), above])
        return jax.tree.map(join, fill, block)


def _layer_gate(leaves: PyTree, gates: PyTree, h: jax.Array, *, bottom: float) -> PyTree:
    """One layer's gates: the batch's above, no pool and a constant for the shared block below."""
    del h
    pool, new = (gates[name] for name in ("pool", "new"))
    own = {"pool": jnp.where(leaves["upper"], pool, 0.0), "new": jnp.where(leaves["upper"], new, bottom)}
    return {name: leaf for name, leaf in leaves.items() if name != "upper"} | own


def _delta(names: tuple[str, ...], leaves: PyTree, context: PyTree, gates: PyTree, x: jax.Array, *, inner) -> tuple[jax.Array, ...]:
    """The pairs with the frozen factors of the layer's own row."""
    frozen = {name: stack.take(gates["frozen"][name], context["row"]) for name in names}
    whole = {name: leaves[name] | {"pool_a": frozen[name]["a"], "pool_b": frozen[name]["b"]} for name in names}
    return inner(names, whole, context, gates, x)
