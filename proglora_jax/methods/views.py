"""What hooks may ask for beyond their arguments: the forward passes of a training batch, and the training samples of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core.types import CLState, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """What one forward pass gave.

    Attributes:
        states: [B, T, D] hidden states of all positions after the final norm.
        hidden: [B, K, D] those that predict a label.
        logits: f32[B, K, V] their scores.
    """

    states: jax.Array
    hidden: jax.Array
    logits: jax.Array


@dataclasses.dataclass(frozen=True)
class Passes:
    """The forward passes of a batch, as `Method.extra_loss` sees them. What a method does not use costs nothing.

    Attributes:
        student: the pass that the cross-entropy is taken from, with dropout.
        labels: i32[B, K] supervised tokens; 0 where unused.
        label_mask: bool[B, K] which of the K are used.
        row_scale: f32[B]; (loss[B, K] * label_mask * row_scale[:, None]).sum() averages a loss per token as the cross-entropy is
            averaged, over the whole batch however it is split, row weights included.
        head: (hidden[..., D]) -> f32[..., V], the backbone's scores of hidden states.
        again: (params, gates=None, key=None) -> Pass: the frozen backbone on the same batch with other parameters. The images
            go through `params["mm_projector"]`, the vision tower is not run again. `gates` None asks `Method.gates` as at test;
            `key` switches dropout on. Gradients flow into `params` and `gates` unless they are stopped.
    """

    student: Pass
    labels: jax.Array
    label_mask: jax.Array
    row_scale: jax.Array
    head: Callable[[jax.Array], jax.Array]
    again: Callable[..., Pass]

    def token_mean(self, loss: jax.Array) -> jax.Array:
        """Mean of f32[B, K] over supervised tokens, taken as that of the cross-entropy; f32[]."""
        return (jnp.where(self.label_mask, loss, 0.0).sum(axis=1) * self.row_scale).sum()


@dataclasses.dataclass(frozen=True)
class Probe:
    """What `start_task` and `end_task` may ask of the task's training samples, by their row numbers.

    Attributes:
        samples: (state, numbers i64[n]) -> {name: f32[n, ...]}, what `Method.probe` returns; also by calling the Probe itself.
        squared_gradients: (state, numbers i64[n], size, kind, names) -> pytree of f32, the mean of squared gradients of the
            cross-entropy (ground-truth labels, no dropout, gates as at test) with respect to the parameters below `names`.
            `kind` "batch": the square of the gradient of the token mean of `size` consecutive numbers, averaged over these
            batches (the last one may be smaller); "per_sample": the square of each sample's own gradient, averaged over the samples.
    """

    samples: Callable[[CLState, np.ndarray], dict[str, np.ndarray]]
    squared_gradients: Callable[[CLState, np.ndarray, int, str, tuple[str, ...]], PyTree]

    def __call__(self, state: CLState, numbers: np.ndarray) -> dict[str, Any]:
        """As `samples`."""
        return self.samples(state, numbers)
