"""SEMA: each upper layer adds a module when its descriptors find a task's features new; a softmax router per layer mixes its modules."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import descriptors, lowrank
from proglora_jax.adapters.gates import mean_feature
from proglora_jax.core import precise
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.data import replay
from proglora_jax.methods.base import PROJECTOR, GateInputs, Phase, Probe, TaskInfo, require, require_choice
from proglora_jax.methods.pooled import Pooled
from proglora_jax.methods.routing import Block, LayerRouting

BUFFER = 500
ROUTER = ("row", "row_bias", "rows", "row_biases")
OWN = ("row", "row_bias", "descriptor")


def layer_gate(leaves: PyTree, gates: PyTree, h: jax.Array, *, rank: int, slots: int) -> PyTree:
    """One layer's gates from the residual stream before it.

    Args:
        leaves: the layer's router ("row" [D], "row_bias" [], "rows" [M, D], "row_biases" [M]), "modules" [M] (1 for those that exist),
            and what else a layer has.
        gates: {"prompt": bool[B, T], "stage": i32[]}.
        h: [B, T, D].
        rank: r.
        slots: frozen slots of the pool.

    Returns:
        The leaves that are no router's, the primitive's gates, and "xbar" f32[B, D], the mean over the prompt.
    """
    xbar, stage = mean_feature(h, gates["prompt"]), gates["stage"]
    newest = jnp.arange(leaves["rows"].shape[0]) == stage
    rows = jnp.where(newest[:, None], leaves["row"], jax.lax.stop_gradient(leaves["rows"]))
    biases = jnp.where(newest, leaves["row_bias"], jax.lax.stop_gradient(leaves["row_biases"]))
    logits = jnp.where(leaves["modules"] > 0, precise.matmul(xbar, rows.T) + biases, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)  # [B, M]
    frozen = weights[:, :slots]
    rest = {name: leaf for name, leaf in leaves.items() if name not in (*ROUTER, "modules")}
    return rest | {
        "pool": lowrank.repeat_gates(jnp.pad(frozen, ((0, 0), (0, slots - frozen.shape[1]))), rank),
        "new": lowrank.repeat_gates(jnp.take(weights, stage, axis=1)[:, None], rank), "blocks": weights, "xbar": xbar,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SEMA(Pooled):
    """y = W x + s sum_k g_k B_k A_k x with g = softmax(W_r xbar + b_r) in each layer; modules are added where features are new.

    The original adapts the last three of a ViT's twelve layers with bottlenecks. No code exists for a language model; the family evidence
    of the ProgLoRA paper (its SEMA row has the first accuracy of every r = 16 method) says that a module is a block of rank 16 in the
    seven linears. Chosen here: the last quarter of the layers may grow, the others keep the first task's module, frozen; xbar is the mean
    over prompt positions of what enters the layer; a module that a task adds lies in the slot of that task, so that shapes stay.

    A task begins with a pass over a sample of its rows: a layer grows when the mean over some batch of z = |error - mu| / sigma is above
    the threshold for all its modules. The original grows the lowest such layer, trains it, and looks again ("sequential", a pair of
    phases for each layer that may grow; empty ones are skipped). "parallel" grows all of them at once, for one training of the task.
    Then the phases: "func" trains new modules, their router rows and the mm_projector by cross-entropy; "rd" trains the new modules'
    descriptors on the features xbar by reconstruction (mean over features, sum over layers; AdamW 1e-3 for the original's SGD 0.01).
    mu and sigma are those of the last 500 errors seen in training. Where nothing grows, the mm_projector alone trains.

    Attributes:
        most_turns: layers that one task may grow where they do so one after the other.
        layer_share: share of the layers, from the top, that may grow.
        threshold: on z (1 or 2 in the original, by data set).
        expansion: "parallel" or "sequential".
        detect_samples: rows that the task's first pass looks at; 0 takes all.
        detect_batch: rows whose mean z counts.
        descriptor_width: inner width of a descriptor.
        descriptor_rows: most rows that descriptors train on.
        descriptor_epochs: passes over them.
        descriptor_batch_size: rows of a step.
        descriptor_learning_rate: AdamW's.

    Source: SEMA (CVPR 2025), sections 3.2 to 3.4, and its code; the adaptation is our own.
    """

    most_turns: int = 8
    layer_share: float = 0.25
    threshold: float = 1.0
    expansion: str = "parallel"
    detect_samples: int = 2048
    detect_batch: int = 128
    descriptor_width: int = 128
    descriptor_rows: int = 5000
    descriptor_epochs: int = 20
    descriptor_batch_size: int = 128
    descriptor_learning_rate: float = 1e-3

    name: ClassVar[str] = "sema"
    gate_unit: ClassVar[str] = "modules of"
    stored_beside: ClassVar[tuple[str, ...]] = ("modules",)
    grows_by_data: ClassVar[bool] = True
    keeps_forward: ClassVar[bool] = False
    gates_in_layers: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.fuse == "delta", "fuse", repr(self.fuse), "must be 'delta': modules are summed by their outputs")
        require(0 < self.layer_share <= 1, "layer_share", self.layer_share, "must be in (0, 1] (0.25 as in the original)")
        require(self.threshold >= 0, "threshold", self.threshold, "must be >= 0 (1 or 2 in the original)")
        require_choice("expansion", self.expansion, ("parallel", "sequential"))
        for field in ("most_turns", "detect_batch", "descriptor_width", "descriptor_rows", "descriptor_epochs", "descriptor_batch_size"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be >= 1")
        require(self.detect_samples >= 0, "detect_samples", self.detect_samples, "must be 0 (all) or a number of rows")
        require(self.descriptor_learning_rate > 0, "descriptor_learning_rate", self.descriptor_learning_rate, "must be positive")

    def growing(self, layers: int) -> int:
        """Number of layers, from the top, that may grow."""
        return max(1, round(layers * self.layer_share))

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """The first module of every layer with its router row, the growing layers' first descriptors, and room for one module per task."""
        state = super().init(targets, projector, total, seed)
        layers, width, grow = targets.layers, targets.width, self.growing(targets.layers)
        own = self._fresh(layers, width, seed, 0)
        room = lambda leaf: jnp.zeros((leaf.shape[0], total, *leaf.shape[1:]), jnp.float32)
        router = {"rows": room(own["row"]), "row_biases": room(own["row_bias"])}
        memory = {
            "modules": jnp.zeros((layers, total), jnp.float32).at[:, 0].set(1.0), "training": jnp.ones(layers, jnp.float32),
            "mean": jnp.zeros((grow, total), jnp.float32), "deviation": jnp.zeros((grow, total), jnp.float32),
            "records": jnp.zeros((grow, total), jnp.float32),
        }  # fmt: skip
        carry = {"running": {"errors": jnp.zeros((BUFFER, grow), jnp.float32), "count": jnp.int32(0)}}
        params = state.params | own | router | {"descriptors": jax.tree.map(room, own["descriptor"])}
        return dataclasses.replace(state, params=params, memory=memory, carry=carry)

    def _fresh(self, layers: int, width: int, seed: int, task: int) -> PyTree:
        """Router row (a linear layer's default start) and descriptors of a task's modules."""
        draw = lambda name, *shape: trees.named_generator(seed, name, task).uniform(-(width**-0.5), width**-0.5, shape)
        descriptor = trees.named_generator(seed, "descriptor", task)
        return {
            "row": jnp.asarray(draw("row", layers, width), jnp.float32), "row_bias": jnp.asarray(draw("row_bias", layers), jnp.float32),
            "descriptor": descriptors.init_descriptor(descriptor, self.growing(layers), width, self.descriptor_width),
        }  # fmt: skip

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Freezes the last task's modules into their slots, and grows where the task's features are new."""
        if info.index == 0:
            return dataclasses.replace(state, stage=jnp.int32(0))
        params = state.params
        stored = self._store(params, {name: params[name] for name in OWN}, info.index - 1)
        state = super().start_task(dataclasses.replace(state, params=params | stored), info, probe)
        layers, width = params["row"].shape
        memory = state.memory | {"training": jnp.zeros(layers, jnp.float32)}
        state = dataclasses.replace(state, params=state.params | self._fresh(layers, width, info.seed, info.index), memory=memory)
        return self._grow(state, info, self.features(state, info, probe))  # a module without a mark has no gate yet

    def _store(self, params: PyTree, own: PyTree, task: int) -> PyTree:
        """The places of all tasks with one task's router row and descriptors in them."""
        put = lambda places, value: jnp.asarray(places).at[:, task].set(value)
        return {
            "rows": put(params["rows"], own["row"]), "row_biases": put(params["row_biases"], own["row_bias"]),
            "descriptors": jax.tree.map(put, params["descriptors"], own["descriptor"]),
        }  # fmt: skip

    def features(self, state: CLState, info: TaskInfo, probe: Probe) -> jax.Array:
        """xbar f32[n, E, D] of a sample of the task's rows."""
        count = min(self.detect_samples or info.size, info.size)
        return jnp.asarray(probe(state, replay.replay_indices(info.size, count, info.seed, info.name))["xbar"])

    def _grow(self, state: CLState, info: TaskInfo, features: jax.Array) -> CLState:
        """Marks the layers that get a module of this task now, and lets these alone train."""
        memory, grow = state.memory, features.shape[1]
        earlier = jnp.arange(info.total) < info.index
        by_task = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state.params["descriptors"])
        found = jax.lax.map(lambda own: descriptors.errors(own, features), by_task)  # [M, n, E]
        z = descriptors.deviations(jnp.moveaxis(found, 0, 2), memory["mean"], memory["deviation"], memory["records"])
        new = descriptors.is_new(z, (memory["modules"][-grow:] > 0) & earlier, self.detect_batch, self.threshold)
        new = new & (memory["modules"][-grow:, info.index] == 0)  # at most one per task
        if self.expansion == "sequential":
            new = new & (jnp.cumsum(new) == 1)
        added = jnp.zeros(memory["modules"].shape[0], jnp.float32).at[-grow:].set(new)
        modules = jnp.asarray(memory["modules"]).at[:, info.index].max(added)
        return dataclasses.replace(state, memory=memory | {"modules": modules, "training": added})

    def phases(self, info: TaskInfo) -> tuple[Phase, ...]:
        """func and rd; a pair for each turn where layers grow one after the other."""
        rd = dict(kind="rd", features="xbar", rows=self.descriptor_rows, epochs=self.descriptor_epochs,
                  batch_size=self.descriptor_batch_size, learning_rate=self.descriptor_learning_rate)
        turns = ("",) if self.expansion == "parallel" or info.index == 0 else ("", *map(str, range(1, self.most_turns)))
        return tuple(phase for turn in turns for phase in (Phase(f"func{turn}", "func"), Phase(f"rd{turn}", **rd)))

    def skips(self, state: CLState, info: TaskInfo, phase: Phase) -> bool:
        """Whether there is no new module to train; the first phase then trains the mm_projector alone."""
        return not np.any(state.memory["training"]) and not (phase.name == "func" and self.train_mm_projector)

    def after_phase(self, state: CLState, info: TaskInfo, phase: Phase, probe: Probe) -> CLState:
        """After "rd": mean and deviation of the newest errors go with the modules; in turns, the next layer is looked for."""
        training, running, memory = state.memory["training"], state.carry["running"], state.memory
        idle = not isinstance(training, jax.core.Tracer) and not np.any(training)
        if phase.kind != "rd" or idle:
            return state
        grow = memory["mean"].shape[0]
        mean, deviation = descriptors.statistics(running["errors"], running["count"])
        seen = {"mean": mean, "deviation": deviation, "records": jnp.minimum(running["count"], BUFFER)}
        put = lambda places, value: jnp.asarray(places).at[:, info.index].set(jnp.where(training[-grow:] > 0, value, places[:, info.index]))
        memory = memory | {name: put(memory[name], value) for name, value in seen.items()}
        state = dataclasses.replace(state, memory=memory, carry=state.carry | {"running": jax.tree.map(jnp.zeros_like, running)})
        if self.expansion == "parallel" or info.index == 0:
            return state
        return self._grow(state, info, self.features(state, info, probe))

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """Modules of the layers that grew; where `state` is shapes, as if every task had grown all that may."""
        modules, layers = state.memory["modules"], state.params["row"].shape[0]
        one = trees.count_parameters(state.params["block"]) // layers
        if isinstance(modules, jax.ShapeDtypeStruct):
            return one * (layers + info.index * self.growing(layers))
        return one * int(np.sum(np.asarray(modules)))

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """Of the first phase: the task's modules and router rows (those that are new, see `update_factors`)."""
        del info
        return ("block", "row", "row_bias")

    def phase_mask(self, state: CLState, info: TaskInfo, phase: Phase) -> dict[str, bool]:
        """In the phase "rd" the descriptors instead."""
        return trees.mask_by_prefix(state.params, ("descriptor",)) if phase.kind == "rd" else self.trainable_mask(state, info)

    def update_factors(self, memory: PyTree) -> dict[str, jax.Array]:
        """Layers without a module in training rest."""
        training = memory["training"]
        return {"block": training, "row": training, "row_bias": training, "descriptor": training[-memory["mean"].shape[0] :]}

    def feature_loss(self, params: PyTree, memory: PyTree, features: jax.Array, stage: jax.Array):
        """Reconstruction error of the new modules' descriptors, summed over their layers; all errors go into the buffer."""
        error = descriptors.errors(params["descriptor"], features)  # [B, E]
        loss = (error.mean(axis=0) * memory["training"][-error.shape[1] :]).sum()
        return loss, {}, {"errors": error}

    def update_running(self, running: PyTree, seen: PyTree, draw: jax.Array, stage: jax.Array) -> PyTree:
        """The newest errors, and how many there were; nothing in the phase "func"."""
        if "errors" not in seen:
            return running
        error = seen["errors"]
        return {"errors": descriptors.push(running["errors"], error), "count": running["count"] + error.shape[0]}

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """What the layers' routers need to know of the batch; the gates themselves are made in each layer."""
        codes = jnp.asarray((segments.TEMPLATE, segments.INSTRUCTION, segments.IMAGE), inputs.segments.dtype)
        prompt = jnp.isin(inputs.segments, codes)
        return {"prompt": prompt, "stage": inputs.stage, "modules": memory["modules"], "blocks": jnp.ones((1, 1), jnp.float32)}

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter:
        """The adapter; each layer makes gates of its own."""
        plain = super().adapter(params, gates, key)
        layer = plain.layer | {name: params[name] for name in ROUTER} | {"modules": gates["modules"]}
        own = partial(layer_gate, rank=self.rank, slots=self.pool_slots(params))
        return dataclasses.replace(plain, layer=layer, layer_gate=own)

    def shown_gates(self, gates: PyTree, contexts: PyTree) -> jax.Array:
        """f32[B, M] gate of each task's modules, mean over the layers that may grow."""
        blocks = contexts["blocks"]
        return blocks[-self.growing(blocks.shape[0]) :].mean(axis=0)

    def probe(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> dict[str, jax.Array]:
        """xbar f32[B, E, D] of the layers that may grow."""
        xbar = inputs.contexts["xbar"]
        return {"xbar": jnp.moveaxis(xbar[-self.growing(xbar.shape[0]) :], 0, 1)}

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Clears the block in layers that did not grow, where nothing reads it: the state is that which checkpoints restore."""
        state, layers = super().end_task(state, info, probe), state.memory["modules"][:, info.index]
        clear = lambda leaf: jnp.where(layers[:, None, None] > 0, leaf, 0.0)
        return dataclasses.replace(state, params=state.params | {"block": jax.tree.map(clear, state.params["block"])})

    def to_disk(self, state: CLState):
        """The task's modules (of the layers that grew), router rows and descriptors; which modules there are, and their statistics."""
        stage = int(state.stage)
        grown = np.flatnonzero(np.asarray(state.memory["modules"])[:, stage])
        own, block = {name: state.params[name] for name in OWN}, jax.tree.map(lambda leaf: leaf[grown], state.params["block"])
        return {
            "pool": {f"block_{stage:02d}": block} if grown.size else {}, "params": {PROJECTOR: state.params[PROJECTOR]},
            "tasks": {f"task_{stage:02d}": own}, "modules": state.memory,
        }  # fmt: skip

    def from_disk(self, tree, fresh: CLState, stage: int) -> CLState:
        """Puts the earlier tasks' modules, router rows and descriptors into their places."""
        params = {}
        for task in range(stage):
            params = self._store(fresh.params | params, tree["tasks"][f"task_{task:02d}"], task)
        own = {"params": tree["params"] | tree["tasks"][f"task_{stage:02d}"]}
        rest = {name: params.get(name, fresh.params[name]) for name in ("rows", "row_biases", "descriptors")}
        pool, modules = tree.get("pool", {}), np.asarray(tree["modules"]["modules"])
        names = [f"block_{task:02d}" for task in range(stage + 1)]
        blocks = {name: self._spread(pool.get(name), fresh.params["block"], modules[:, task]) for task, name in enumerate(names)}
        state = super().from_disk(tree | {"params": own["params"] | rest, "pool": blocks}, fresh, stage)
        return dataclasses.replace(state, memory=tree["modules"])

    @staticmethod
    def _spread(block: PyTree | None, like: PyTree, layers: np.ndarray) -> PyTree:
        """A block of the layers that grew (None where none did; all layers in checkpoints of earlier versions) in its layers, else 0."""
        empty = jax.tree.map(jnp.zeros_like, like)
        if block is None:
            return empty
        grown = np.flatnonzero(layers)
        put = lambda leaf, own: leaf.at[grown].set(own[grown] if len(own) == len(leaf) else own)
        return jax.tree.map(put, empty, block)

    def fold(self, state: CLState, task: int) -> PyTree:
        """Possible while every layer has a single module; then its gate is 1."""
        if np.any(np.asarray(state.memory["modules"])[:, 1:]):
            raise ValueError(f"{self.name} cannot be folded into one adapter: a router in each layer mixes its modules sample by sample")
        return self.fold_weighted(state, np.eye(1, state.memory["modules"].shape[1], dtype=np.float32)[0])

    def routing(self, state: CLState) -> LayerRouting:
        """Each layer's router over the modules of the tasks so far; a task's block lies in the layers that grew."""
        params, stage = jax.tree.map(np.asarray, state.params), int(state.stage)
        exists = np.asarray(state.memory["modules"])[:, : stage + 1]
        join = lambda places, newest: np.concatenate([places[:, :stage], newest[:, None]], axis=1)
        layers = lambda task: tuple(np.flatnonzero(exists[:, task]).tolist())
        return LayerRouting(
            join(params["rows"], params["row"]), join(params["row_biases"], params["row_bias"]), exists, self.growing(len(exists)),
            blocks={f"block_{task:02d}": Block(self.block(state, task), layers(task)) for task in range(stage + 1)},
        )
