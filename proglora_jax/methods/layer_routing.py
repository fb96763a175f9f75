"""ProgLoRA's routing with a query projector and keys of every layer's own: gates from the hidden states that enter the layer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from proglora_jax.adapters import gates as gating
from proglora_jax.core.types import Adapter, PyTree

ROUTER = ("key", "keys", "query_projector")


def stack_router(params: PyTree, layers: int) -> PyTree:
    """The same key, keys and query projector for every layer at the start: each leaf gets a leading axis L."""
    return {name: jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * layers), params[name]) for name in ROUTER}


def layer_gate(leaves: PyTree, gates: PyTree, h: jax.Array, *, weigh: Any, split: Any) -> PyTree:
    """One layer's gates from the residual stream before it.

    Args:
        leaves: the layer's "key" [D], "keys" [M, D], "query_projector", and what else a layer has (dropout key).
        gates: {"mask": bool[B, T], "stage": i32[], "bonus": f32[]} of the batch.
        h: [B, T, D].
        weigh: (router, z f32[B, D], stage, bonus) -> f32[B, M].
        split: (weights f32[B, M], stage) -> the primitive's gates.

    Returns:
        The leaves that are no router's, the primitive's gates, and "z", the feature.
    """
    z = gating.route_feature(h, gates["mask"])
    weights = weigh({name: leaves[name] for name in ROUTER}, z, gates["stage"], gates["bonus"])
    rest = {name: leaf for name, leaf in leaves.items() if name not in ROUTER}
    return rest | split(weights, gates["stage"]) | {"z": z}


def attach(adapter: Adapter, params: PyTree, weigh: Any, split: Any) -> Adapter:
    """An adapter whose layers compute their own gates."""
    layer = adapter.layer | {name: params[name] for name in ROUTER}
    return dataclasses.replace(adapter, layer=layer, layer_gate=partial(layer_gate, weigh=weigh, split=split))
