"""Nested dicts of arrays: paths, partition into trainable and frozen, merging, counting."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core.types import PyTree


def flatten(tree: PyTree, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": leaf}} -> {"a/b": leaf}, in the order of sorted keys; empty dicts vanish."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key in sorted(tree):
        flat.update(flatten(tree[key], f"{prefix}/{key}" if prefix else str(key)))
    return flat


def unflatten(flat: Mapping[str, object]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def mask_by_prefix(tree: PyTree, prefixes: Iterable[str]) -> dict[str, bool]:
    """{path: True if the path is one of the prefixes or lies below one} for every leaf of the tree."""
    wanted = tuple(prefixes)
    return {path: any(path == p or path.startswith(p + "/") for p in wanted) for path in flatten(tree)}


def partition(tree: PyTree, mask: Mapping[str, bool]) -> tuple[dict, dict]:
    """Splits a tree into (leaves whose mask is True, the others); both are nested dicts without the other's paths.

    Raises:
        ValueError: when the mask's paths are not exactly the tree's.
    """
    flat = flatten(tree)
    if set(flat) != set(mask):
        odd = sorted(set(flat) ^ set(mask))[:5]
        raise ValueError(f"the mask and the tree differ in their paths: {odd}")
    return (
        unflatten({path: leaf for path, leaf in flat.items() if mask[path]}),
        unflatten({path: leaf for path, leaf in flat.items() if not mask[path]}),
    )


def merge(*trees: PyTree) -> dict:
    """Deep merge of nested dicts; where two have the same leaf, the later one wins."""
    out: dict = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
                out[key] = merge(out[key], value)
            else:
                out[key] = merge(value) if isinstance(value, Mapping) else value
    return out


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, by their dtypes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def digest(tree: PyTree) -> str:
    """sha256 over paths, dtypes, shapes and bytes of a nested dict: equal digests mean bit-identical trees."""
    sha = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        sha.update(f"{path}:{array.dtype}:{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """A key for a named purpose; adding a purpose does not change the others' keys."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class _ShapesOnly(int):
    """A seed whose generators draw nothing, see `SHAPES_ONLY`."""


# The seed for states of which only the shapes are wanted: under jax.eval_shape its draws cost neither time nor memory.
SHAPES_ONLY = _ShapesOnly(0)


class _NoDraws:
    """Stands in for a numpy generator: what it draws is zero, and a tracer under jax.eval_shape."""

    def normal(self, mean: float, deviation: float, shape) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    def uniform(self, low: float, high: float, shape) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)


def named_generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator for a named purpose, the same on every platform and library version; SHAPES_ONLY draws zeros."""
    if isinstance(seed, _ShapesOnly):
        return _NoDraws()
    words = [zlib.crc32(str(name).encode()) for name in names]
    return np.random.default_rng([int(seed), *words])
