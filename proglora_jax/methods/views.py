"""What the hooks of a method see and say: batches, tasks, phases, replay, forward passes of a batch, training samples of a task."""

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
class GateInputs:
    """What gates and extra losses may look at in a batch.

    Attributes:
        embeddings: [B, T, D] input embeddings, image features in place.
        segments: i8[B, T] segment codes of data/batch.py.
        task_id: i32[B]; only methods that declare `uses_task_id` may read it.
        stage: i32[] index of the current task.
        progress: f32[] share of the phase's steps done, 1 outside training.
        training: whether this is a training step (static).
        routed: [B, T, D] hidden states that route where `routing_layer` > 0, else None.
        contexts: what the layers decided for themselves, stacked [L, ...], where the method `gates_in_layers` or `observes`; for
            `probe` only.
        image: f32[B, Dv] class token of the vision tower, where the method `wants_image`, else None.
        image_mask: bool[B] rows with an image.
        draw: PRNG key of the step, the same for all its micro-batches; None outside training.
        running: the statistics that the steps of a phase update (`CLState.carry["running"]`); {} outside training.
        phase: kind of the training phase (static).
        probing: whether a hook asks about samples of the current task by `Probe` (static).
    """

    embeddings: jax.Array
    segments: jax.Array
    task_id: jax.Array
    stage: jax.Array
    progress: jax.Array
    training: bool = dataclasses.field(metadata=dict(static=True))
    routed: jax.Array | None = None
    contexts: PyTree = None
    image: jax.Array | None = None
    image_mask: jax.Array | None = None
    draw: jax.Array | None = None
    running: PyTree = dataclasses.field(default_factory=dict)
    phase: str = dataclasses.field(default="train", metadata=dict(static=True))
    probing: bool = dataclasses.field(default=False, metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """The current task as a method sees it (host side).

    Attributes:
        index: place in the sequence, from 0.
        name: the task's name.
        total: number of tasks in the sequence.
        size: number of training examples.
        similarity: f32[index] similarity to each earlier task in [0, 1] (empty for the first); NaN for methods that do not declare
            `uses_similarity`.
        seed: the run's seed.
    """

    index: int
    name: str
    total: int
    size: int
    similarity: np.ndarray
    seed: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training phase of a stage; a field that is 0 or "" follows config.train.

    Attributes:
        name: of the phase, unlike the others of its stage; names its progress on disk.
        kind: which program it runs; phases of one kind share a compile over the whole sequence.
        cross_entropy: whether the answers' cross-entropy is part of the loss; without it `extra_loss` is all.
        states: whether `extra_loss` reads the hidden states of all positions; else the last layer computes those that predict a label.
        features: name of what `Method.probe` returns; the phase then trains on these values of the rows by `feature_loss`, and the
            language model is not run again.
        rows: most rows of the task that a phase on features uses, chosen by seed.
        epochs: passes over the rows.
        batch_size: rows of a step.
        learning_rate: of the adapter's group.
    """

    name: str = "train"
    kind: str = "train"
    cross_entropy: bool = True
    states: bool = False
    features: str = ""
    rows: int = 0
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0

    def program(self) -> Phase:
        """What of a phase its compiled step depends on."""
        return Phase(kind=self.kind, cross_entropy=self.cross_entropy, states=self.states, features=self.features)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a method adds to the backbone's passes, for estimates of memory and work; widths are those of every adapted linear.

    Attributes:
        frozen: ranks that rest.
        down: columns that train on the side of the input: those of A, and of a router.
        up: rows that train on the side of the output: those of B.
        teacher: ranks of one more forward pass without gradient; 0 where there is none.
        words: whose scores the two passes are compared by: "labels" (the supervised positions, all held), "all" (every position, piece
            by piece, computed again for the gradient) or "" where hidden states are compared, or nothing is.
        whole: whether the last layer runs at all positions, see `Phase.states` and `Adapter.by_position`; else where a word is predicted.
    """

    frozen: int = 0
    down: int = 0
    up: int = 0
    teacher: int = 0
    words: str = ""
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Replay:
    """Which old examples are mixed into a stage's data.

    Attributes:
        counts: examples of each earlier task.
        weight: loss weight of a replayed example.
        mix: "concat" (shuffled into the data) or "separate_batch" (own rows in each batch, own mean, added to the loss).
        share: share of a batch's rows that "separate_batch" gives to replay.
    """

    counts: tuple[int, ...]
    weight: float
    mix: str
    share: float = 0.25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """What one forward pass gave.

    Attributes:
        states: [B, T, D] hidden states of all positions after the final norm; None unless the phase asks for `states`.
        hidden: [B, K, D] those that predict a label.
        logits: f32[B, K, V] their scores.
    """

    states: jax.Array | None
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
        earlier: (index of an earlier task) -> the Probe of that task's training samples; None where there is none to ask.
    """

    samples: Callable[[CLState, np.ndarray], dict[str, np.ndarray]]
    squared_gradients: Callable[[CLState, np.ndarray, int, str, tuple[str, ...]], PyTree]
    earlier: Callable[[int], Probe] | None = None

    def __call__(self, state: CLState, numbers: np.ndarray) -> dict[str, Any]:
        """As `samples`."""
        return self.samples(state, numbers)
