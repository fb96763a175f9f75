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


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but a layer's weights, gathered from other devices or read from their stack: they would be kept for every layer."""
    return primitive.name not in ("sharding_constraint", "dynamic_slice", "squeeze")


def _named(*names: str) -> Callable:
    """Keeps the values of these names, and what cuDNN's attention gives its backward pass, output and statistics, which has none."""
    kernel = lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper"
    return _policies.save_from_both_policies(_policies.save_only_these_names(*names), kernel)


_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable] = {
    "none": _all_but_weights,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "qkvo": _named("query", "key", "value", "attention", "low_rank"),
    "qkvo_mlp": _named(*SAVED_NAMES),
}


def remat(body: Callable, policy: str) -> Callable:
    """Wraps the body of a scan over layers so that the backward pass recomputes what the policy does not keep.

    Args:
        body: (carry, layer) -> (carry, output), the body of a scan.
        policy: "none" keeps everything, "full" only the carry, "dots" the outputs of the linears, "qkvo" what attention
            reads and writes, "qkvo_mlp" that, the residual stream between attention and MLP, and the MLP's two inner linears
            (norms, rotations and activations are recomputed, and the scores of XLA's attention; of a fused attention nothing is).

    Raises:
        ValueError: "remat='<policy>' is unknown: choose one of none, full, ..."
    """
    if _known(policy) == "none" and not meshes.gathers():
        return body
    return _checkpoint(body, policy)


def _known(policy: str) -> str:
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")
    return policy


def _checkpoint(body: Callable, policy: str, barrier: bool = False) -> Callable:
    # Inside a scan the loop itself keeps forward and backward apart, so the costly barrier against CSE is not needed.
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=barrier)


def scan(
    body: Callable, carry: PyTree, layers: PyTree, *, trained: PyTree = None, policy: str = "none", count: int | None = None,
    unroll: int = 1,
):
    """Runs a body over stacked layers, first to last.

    Args:
        body: (carry, layer) -> (carry, output); with `trained`, (carry, (layer, layer of trained)) -> (carry, output).
        carry: what goes from layer to layer.
        layers: pytree of arrays [L, ...], read where they lie.
        trained: more of them, for which gradients are wanted: of a part of the layers they are copied, and gradients cost no more than
            those of the layers that run, while the gradient of `layers` is summed over the whole stack once a layer.
        policy: name of a rematerialisation policy, see `remat`.
        count: run only the first `count` layers; None runs all.
        unroll: number of layers in one turn of the loop; as many as run, or more, and there is no loop.

    Returns:
        (carry, outputs stacked over the layers that ran).
    """
    scanned = layers if trained is None else (layers, trained)
    count = num_layers(scanned) if count is None else count
    if 1 < count <= unroll:
        return _one_by_one(body, carry, layers, trained, policy, count)
    if count == num_layers(scanned):
        return jax.lax.scan(remat(body, policy), carry, scanned, unroll=unroll)

    def indexed(carry: PyTree, scanned: tuple):
        index, own = scanned
        layer = take(layers, index)
        return body(carry, layer if trained is None else (layer, own))

    # Even where nothing is to be computed again, else the weights read here would be kept as a copy of the whole stack.
    body_at = _checkpoint(indexed, _known(policy))
    return jax.lax.scan(body_at, carry, (jnp.arange(count), jax.tree.map(lambda leaf: leaf[:count], trained)), unroll=unroll)


def _one_by_one(body: Callable, carry: PyTree, layers: PyTree, trained: PyTree, policy: str, count: int):
    """`scan` without a loop: what goes from the forward to the backward pass is not copied into stacks, and weights are read in place.

    A matmul can read a layer of a stack where it lies only if the compiler knows which one it is.
    """
    pieces = lambda leaf: [piece[0] for piece in jax.lax.split(leaf[:count], (1,) * count)]  # its transpose is one concatenation
    leaves, structure = jax.tree.flatten(trained)
    own, outputs = [jax.tree.unflatten(structure, parts) for parts in zip(*map(pieces, leaves), strict=True)] or [trained] * count, []
    for index in range(count):

        def at(carry: PyTree, own: PyTree, index: int = index):
            layer = take(layers, index)
            return body(carry, layer if trained is None else (layer, own))

        # No loop keeps forward and backward apart here: the barrier does, else XLA would keep what it finds computed twice.
        carry, output = _checkpoint(at, _known(policy), barrier=True)(carry, own[index])
        outputs.append(output)
    return carry, stack(outputs)


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
