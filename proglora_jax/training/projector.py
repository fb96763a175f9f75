"""With which mm_projector a task begins: the one that the last task left, the backbone's own, or (CoIN's bug) a random one."""

from __future__ import annotations

import numpy as np

from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree

PROJECTOR_INITS = ("previous", "stage1", "random")


def projector_for_task(how: str, previous: PyTree, own: PyTree, index: int, seed: int) -> PyTree:
    """The projector that a task starts with.

    Args:
        how: "previous", "stage1" (the backbone's own, which the first stage of LLaVA trained) or "random".
        previous: {"linear_1": {"kernel": f32[Dv, D], "bias": f32[D]}, "linear_2": {...}}, what the last task left.
        own: the same of the backbone.
        index: the task's place in the sequence, from 0; the first task always starts with the backbone's own.
        seed: of the random ones.

    Returns:
        A projector of the same form. Random ones are uniform within 1 / sqrt(d_in), as torch begins a linear layer.

    Source: CoIN's scripts, which from the second task on build the projector anew and, loading without strictness, drop the tensors that
    should replace it; so the published LoRA and MoELoRA forgot more than their adapters did.
    """
    if index == 0 or how == "previous":
        return previous
    return own if how == "stage1" else {name: _random_linear(leaf, name, index, seed) for name, leaf in own.items()}


def _random_linear(leaf: PyTree, name: str, index: int, seed: int) -> PyTree:
    bound = leaf["kernel"].shape[0] ** -0.5
    draw = lambda part: trees.named_generator(seed, "mm_projector", name, part, index).uniform(-bound, bound, leaf[part].shape)
    return {part: np.asarray(draw(part), np.float32) for part in leaf}
