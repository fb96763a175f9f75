"""Squared gradients of the cross-entropy over training samples, summed batch by batch: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree
from proglora_jax.methods.base import Method
from proglora_jax.training import losses
from proglora_jax.training.step import Batch, Remat, look, policy_at

KINDS = ("batch", "per_sample")


def chosen(params: PyTree, names: tuple[str, ...]) -> dict[str, Any]:
    """The parameters below some paths."""
    return trees.partition(params, trees.mask_by_prefix(params, names))[0]


def make_squared_gradients(
    method: Method, mesh: Mesh, names: tuple[str, ...], kind: str, remat: Remat, options: Mapping[str, Any] | None = None
) -> Callable:
    """The program that adds a batch's squared gradients to a sum; compiled once per bucket.

    Args:
        method: the method; gates as at test, no dropout, no extra loss.
        mesh: rows are split over its batch axes, the result lies on every device.
        names: prefixes of the parameters that are asked for.
        kind: "batch" squares the gradient of the batch's token mean; "per_sample" squares that of each row's own token mean and adds
            the rows up. A row without supervised tokens adds nothing.
        remat: rematerialisation policy, see `step.Remat`.
        options: of the compiler, see `loop_choice.compiler_options`.

    Returns:
        (total, params, memory, llava, batch, stage) -> total; the first is donated.
    """

    def cross_entropy(asked: PyTree, params: PyTree, memory: PyTree, llava: Any, rows: Batch, stage: jax.Array) -> jax.Array:
        params = trees.merge(params, asked)
        sight = look(llava, method, params, memory, rows, stage)
        adapter = method.adapter(params, sight.gates, None)
        x, index = sight.inputs.embeddings, rows["label_index"]
        logits = llava.logits(llava.decode(x, positions=index, adapter=adapter, remat=policy_at(remat, rows)).hidden)
        nll = losses.token_nll(logits, rows["labels"], rows["label_mask"])
        return nll.sum() / jnp.maximum(rows["label_mask"].sum(), 1)

    gradient = jax.grad(cross_entropy)
    ways = meshes.batch_ways(mesh)

    def add_batch(total, params, memory, llava, batch, stage):
        squares = jax.tree.map(jnp.square, gradient(chosen(params, names), params, memory, llava, batch, stage))
        return jax.tree.map(jnp.add, total, squares)

    def add_samples(total, params, memory, llava, batch, stage):
        # Each device takes its own rows one after the other, so that it holds the gradient of a single one.
        turns = jax.tree.map(lambda leaf: leaf.reshape(ways, -1, 1, *leaf.shape[1:]).swapaxes(0, 1), dict(batch))

        def turn(total, rows):
            one = lambda row: gradient(chosen(params, names), params, memory, llava, row, stage)
            squares = jax.tree.map(lambda leaf: jnp.square(leaf).sum(axis=0), jax.vmap(one)(rows))
            return jax.tree.map(jnp.add, total, squares), None

        return jax.lax.scan(turn, total, turns)[0]

    add = meshes.on_mesh(add_batch if kind == "batch" else add_samples, mesh)
    return jax.jit(add, donate_argnums=(0,), out_shardings=meshes.replicated(mesh), compiler_options=options and dict(options))


def zeros(params: PyTree, names: tuple[str, ...]) -> PyTree:
    """Where a sum begins."""
    return jax.tree.map(lambda leaf: jnp.zeros(np.shape(leaf), jnp.float32), chosen(params, names))


def fill(batch: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
    """The rows of a batch from `first` on only fill it: they lose their labels."""
    here = np.arange(len(batch["label_mask"])) < first
    return batch | {"label_mask": batch["label_mask"] & here[:, None], "valid": batch["valid"] & here}


def filled_size(size: int, ways: int) -> int:
    """The next multiple of `ways` rows."""
    return -(-size // ways) * ways
