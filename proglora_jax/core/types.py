"""The dataclasses that flow between the rooms: what a method sees of a model, an adapter, and the state of a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a method knows of a backbone: the linears that it may adapt, and the sizes around them.

    Attributes:
        layers: number of decoder layers, L.
        linears: name of a linear -> (d_in, d_out), the same in every layer.
        width: model width, D (the width of the input embeddings too).
        vision_width: width of the vision tower's features.
    """

    layers: int
    linears: Mapping[str, tuple[int, int]]
    width: int
    vision_width: int = 0

    def block_size(self, rank: int) -> int:
        """Number of parameters in one low-rank block over all layers and linears."""
        return self.layers * rank * sum(d_in + d_out for d_in, d_out in self.linears.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter as data: arrays that are scanned with the layers, and the pure functions that use them.

    Attributes:
        leaves: {linear name: {leaf: array[L, ...]}}, scanned together with the backbone's layers.
        layer: {leaf: array[L, ...]}, leaves that a layer uses once (dropout keys, routers of a layer); may be empty.
        gates: pytree that every layer sees whole (gates of shape [B, M], the stage's index).
        delta: (names, {name: leaves}, layer_context, gates, x[B, T, d_in]) -> [B, T, d_out] of each, added to the outputs of the
            linears of these names, which all read x; see `each_linear` for one that looks at one linear at a time.
        layer_gate: (layer_leaves, gates, h[B, T, D]) -> layer_context, computed once per layer from the residual
            stream before the layer; None passes `layer_leaves` through as the context.
        observe: (name, leaves, layer_context, gates, x) -> pytree, asked at each linear while a prompt is read; what it returns
            is in the contexts under "linears", where `delta` finds it when the later tokens come one by one.
        resting: names of leaves that no gradient is asked of (frozen blocks): the decoder need not copy them.
        by_position: whether `delta` at a position depends on x at that position alone, so that it may be asked for some positions only.
    """

    leaves: PyTree
    layer: PyTree
    gates: PyTree
    delta: Callable = dataclasses.field(metadata=dict(static=True))
    layer_gate: Callable | None = dataclasses.field(default=None, metadata=dict(static=True))
    observe: Callable | None = dataclasses.field(default=None, metadata=dict(static=True))
    resting: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    by_position: bool = dataclasses.field(default=True, metadata=dict(static=True))


def each_linear(function: Callable) -> Callable:
    """An `Adapter.delta` from a function of one linear, (name, leaves, layer_context, gates, x) -> delta[B, T, d_out]."""
    return partial(_one_by_one, function)


def _one_by_one(function: Callable, names: tuple[str, ...], leaves: PyTree, context: PyTree, gates: PyTree, x: jax.Array) -> tuple:
    return tuple(function(name, leaves[name], context, gates, x) for name in names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CLState:
    """Everything a method carries through a sequence of tasks.

    Attributes:
        params: nested dict of arrays; a mask (`Method.trainable_mask`) says which leaves train in a phase.
        memory: nested dict of arrays that the training step reads (recall features and targets, Fisher, anchors, teacher). Its paths,
            shapes and dtypes are those of the first stage throughout: the step is compiled once for the whole sequence.
        carry: nested dict of what the training step does not see (running statistics, old projectors); it may grow.
        stage: int32 scalar, index of the current task counted from 0 (an array, so that one program serves all stages).
    """

    params: PyTree
    memory: PyTree
    carry: PyTree
    stage: jax.Array
