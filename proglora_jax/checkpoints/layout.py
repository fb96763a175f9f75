"""Between pytrees and what a checkpoint stores of them: leaf paths, a description of every leaf, and whether two trees fit.

A tree is stored as nested dicts whatever its containers are (tuples by index, named tuples by field), so that a checkpoint can be read
without the classes that made it; the structure to return comes from the reader's abstract tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from proglora_jax.data.errors import raise_collected

PyTree = Any
SCALARS = {"bool": bool, "int": int, "float": float}


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """Flattens a tree to leaf paths ("pool/block_00/a"), counting empty containers and None as leaves.

    Returns:
        ({leaf path: leaf}, the structure for `jax.tree_util.tree_unflatten`).

    Raises:
        ValueError: a key that is empty or has '/' or '.', or a tree that is a single array.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    named = {}
    for path, leaf in leaves:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any(not part or set(part) & set("/.") for part in parts) or not (parts or is_empty(leaf)):
            raise ValueError(f"the leaf with keys {parts} cannot be stored: a tree needs keys, without '/' and '.' in them")
        named["/".join(parts)] = leaf
    if len(named) != len(leaves):
        raise ValueError("two leaves have the same path")
    return named, structure


def nest(flat: Mapping[str, Any]) -> PyTree:
    """Nested dicts from {leaf path: leaf}, the inverse of `flatten` for dicts; the path "" alone is the whole tree."""
    if list(flat) == [""]:
        return flat[""]
    nested: dict = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = nested
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def is_empty(node: Any) -> bool:
    """Whether a node is None or a dict, list or tuple without entries."""
    return node is None or (isinstance(node, (dict, list, tuple)) and not node)


def describe(leaves: Mapping[str, Any]) -> dict[str, dict]:
    """What is to be known of each leaf: {"empty": true}, {"scalar": "int"} or {"dtype": "float32", "shape": [2, 3]}.

    Args:
        leaves: {leaf path: leaf}; a leaf is empty, a Python scalar, or has `dtype` and `shape` (arrays, `jax.ShapeDtypeStruct`).

    Raises:
        ValueError: a leaf of another type, with its path.
    """
    layout = {}
    for name, leaf in leaves.items():
        if is_empty(leaf):
            layout[name] = {"empty": True}
        elif type(leaf) in SCALARS.values():
            layout[name] = {"scalar": type(leaf).__name__}
        elif not hasattr(leaf, "dtype") or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype == object:
            kind = type(leaf).__name__
            raise ValueError(f"{name}: a checkpoint stores arrays and Python scalars, not {kind} (of a key, store its key_data)")
        else:
            layout[name] = {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}
    return layout


def has_elements(entry: Mapping[str, Any]) -> bool:
    """Whether a described leaf has numbers to store."""
    return "scalar" in entry or ("shape" in entry and 0 not in entry["shape"])


def check_fit(what: str, saved: Mapping[str, dict], expected: Mapping[str, dict]) -> None:
    """Compares the description of a saved tree with the one that is asked for.

    Args:
        what: how the message begins, e.g. "checkpoint 03_gqa, tree 'adapter' does not fit".
        saved: `describe` of what was saved.
        expected: `describe` of what is asked for.

    Raises:
        UserError: "<what>: <count> problem(s): <leaf> is float32[4, 2] in the checkpoint, expected float32[8, 2]; ... Was it ..."
    """
    problems = [f"{k} is not in the checkpoint" for k in expected if k not in saved]
    problems += [f"{k} is in the checkpoint but not expected" for k in saved if k not in expected]
    for name in sorted(saved.keys() & expected.keys()):
        if saved[name] != expected[name]:
            problems.append(f"{name} is {_in_words(saved[name])} in the checkpoint, expected {_in_words(expected[name])}")
    raise_collected(problems, what, "Was it written with another method, rank or backbone? Compare the configs.")


def _in_words(entry: Mapping[str, Any]) -> str:
    if "empty" in entry:
        return "empty"
    return f"a Python {entry['scalar']}" if "scalar" in entry else f"{entry['dtype']}{entry['shape']}"
