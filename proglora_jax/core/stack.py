"""How layers are stacked: the one place that knows that the parameters of equal layers share arrays with a leading axis L."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proglora_jax.core import mesh as meshes

PyTree = Any

# Values that the layers tag with jax.ad_checkpoint.checkpoint_name; a policy below may keep them for the backward pass.
# "low_rank" is for an adapter's x @ A, which is small to keep and costs a read of x to recompute.
SAVED_NAMES = ("query", "key", "value", "attention", "residual", "gate", "up", "low_rank")


def _all_but_constraints(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but what a sharding constraint returns: the gathered weights of a layer would be kept for every layer at once."""
    return primitive.name != "sharding_constraint"


_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable] = {
    "none": _all_but_constraints,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "qkvo": _policies.save_only_these_names("query", "key", "value", "attention", "low_rank"),
    "qkvo_mlp": _policies.save_only_these_names(*SAVED_NAMES),
}


def remat(body: Callable, policy: str) -> Callable:
    """Wraps the body of a scan over layers so that the backward pass recomputes what the policy does not keep.

    Args:
        body: (carry, layer) -> (carry, output), the body of a scan.
        policy: "none" keeps everything, "full" only the carry, "dots" the outputs of the linears, "qkvo" what attention
            reads and writes, "qkvo_mlp" that, the residual stream between attention and MLP, and the MLP's two inner linears
            (only norms, rotations and activations are recomputed).

    Raises:
        ValueError: "remat='<policy>' is unknown: choose one of none, full, ..."
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")
    if policy == "none" and not meshes.gathers():
        return body
    # Inside a scan the loop itself keeps forward and backward apart, so the costly barrier against CSE is not needed.
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def scan(body: Callable, carry: PyTree, layers: PyTree, *, policy: str = "none", count: int | None = None, unroll: int = 1):
    """Runs a body over stacked layers, first to last.

    Args:
        body: (carry, layer) -> (carry, output).
        carry: what goes from layer to layer.
        layers: pytree of arrays [L, ...].
        policy: name of a rematerialisation policy, see `remat`.
        count: run only the first `count` layers; the others are not read and not copied.
        unroll: number of layers in one turn of the loop.

    Returns:
        (carry, outputs stacked over the layers that ran).
    """
    if count is None or count == num_layers(layers):
        return jax.lax.scan(remat(body, policy), carry, layers, unroll=unroll)

    def indexed(carry: PyTree, index: jax.Array):
        return body(carry, take(layers, index))

    return jax.lax.scan(remat(indexed, policy), carry, jnp.arange(count), unroll=unroll)


def num_layers(layers: PyTree) -> int:
    """Length of the leading axis of a stacked pytree."""
    return jax.tree.leaves(layers)[0].shape[0]


def take(layers: PyTree, index: jax.Array | int) -> PyTree:
    """One layer of a stacked pytree; the index may be traced."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), layers)


def stack(layers: Sequence[PyTree]) -> PyTree:
    """Stacks equal pytrees, one per layer, along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack(layers: PyTree) -> list[PyTree]:
    """A list of per-layer pytrees from a stacked one; the inverse of `stack`."""
    return [jax.tree.map(lambda leaf: leaf[index], layers) for index in range(num_layers(layers))]


def stacked_shape(make: Callable, count: int) -> Callable:
    """Turns a maker of one layer's parameters into a maker of stacked ones.

    Args:
        make: (shape, *rest) -> array.
        count: number of layers, L.

    Returns:
        The same function with `count` put in front of every shape.
    """
    return lambda shape, *rest: make((count, *shape), *rest)
