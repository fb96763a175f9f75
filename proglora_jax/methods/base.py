"""What a method is: a frozen dataclass of hyper-parameters with pure hooks; the defaults make plain LoRA a short file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import lowrank
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.data.errors import UserError
from proglora_jax.methods.routing import Way
from proglora_jax.methods.views import Cost, GateInputs, Passes, Phase, Probe, Replay, TaskInfo

ADAPTER, GATE, PROJECTOR = "adapter", "gate", "mm_projector"
FROZEN = ("pool_a", "pool_b")
"""Leaves of an adapter with the blocks of earlier tasks."""
__all__ = [
    "ADAPTER", "GATE", "PROJECTOR", "Adapter", "Cost", "GateInputs", "Method", "Passes", "Phase", "Probe", "Replay", "TaskInfo",
    "check_contract", "dropped", "pooled_delta", "require", "require_choice",
]


def pooled_delta(names, leaves, context, gates, x, *, scale: float, mix: str, rate: float):
    """`Adapter.delta` of every method with a pool: dropout on the adapter's input, then the fused pairs."""
    x = dropped(names, context, x, rate)
    gates = context if "pool" in context else gates  # a layer that gates itself

    def pair(own: PyTree) -> lowrank.Pair:
        pool_a = own.get("pool_a", jnp.zeros((x.shape[-1], 0), jnp.float32))
        pool_b = own.get("pool_b", jnp.zeros((0, own["b"].shape[-1]), jnp.float32))
        return lowrank.Pair(pool_a, pool_b, gates["pool"], own["a"], own["b"], gates["new"])

    return lowrank.pooled_low_rank_group(x, tuple(pair(leaves[name]) for name in names), scale, mix)


def dropped(names: tuple[str, ...], context: PyTree, x: jax.Array, rate: float) -> jax.Array:
    """An adapter's input with dropout, if the layer's context has a key for it: one mask for all linears that read x."""
    if not (rate and context):
        return x
    return lowrank.dropout(trees.fold_in_name(context["dropout_key"], names[0]), x, rate)


@dataclasses.dataclass(frozen=True)
class Method:
    """Hyper-parameters and hooks of a method; every hook is a pure function of its arguments.

    Attributes:
        rank: ranks of one block, r.
        alpha: the delta is scaled by alpha / rank.
        dropout: rate on the adapter's input while training; linears that read the same input share its mask (PEFT draws one for each).
        a_init: "normal001", "kaiming" or "fan_in", see `lowrank.draw_factor`.
        train_mm_projector: whether the mm_projector trains and is carried from stage to stage.
        gate_unit: what a recorded gate belongs to, in figures.
        isolated_as: the method that forward transfer is measured against, on each task alone: "lora" for all that are plain LoRA of
            the same rank on a single task, "self" for the method itself, "" where there is nothing to isolate; a property where
            that depends on hyper-parameters.
        joint: whether there is one stage for all tasks, instead of one for each.
        trains: whether any stage has training.
        replays_apart: whether replayed rows have a mean of their own in every batch (`Replay.mix` is "separate_batch").
        stored_beside: first names in the paths of `to_disk` below which there are no parameters of the model, but features, statistics
            or a teacher.
        grows_by_data: whether the data decide what is stored; `stored_parameters` of shapes is then the most that it can be.
        fixed_at_test: whether the adapter that answers follows from the task's id and the stage alone, whatever the prompt, and nothing
            observes the prompt; questions about one image may then share the pass over their common beginning.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    a_init: str = "normal001"
    train_mm_projector: bool = True

    name: ClassVar[str] = "base"
    uses_task_id: ClassVar[bool] = False
    keeps_forward: ClassVar[bool] = True
    routing_layer: ClassVar[int] = 0
    regates: ClassVar[bool] = False
    gates_in_layers: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    wants_image: ClassVar[bool] = False
    adapts_projector: ClassVar[bool] = False
    blocks_are_tasks: ClassVar[bool] = True
    gate_unit: ClassVar[str] = "block"
    isolated_as: ClassVar[str] = "lora"
    joint: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    replays_apart: ClassVar[bool] = False
    stored_beside: ClassVar[tuple[str, ...]] = ("memory",)
    grows_by_data: ClassVar[bool] = False
    fixed_at_test: ClassVar[bool] = False

    def __post_init__(self):
        require(self.rank >= 1, "rank", self.rank, "rank must be >= 1 (ProgLoRA uses 16)")
        require(self.alpha > 0, "alpha", self.alpha, "alpha must be positive (2 * rank in the papers)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "dropout must be in [0, 1)")
        require_choice("a_init", self.a_init, lowrank.INITS)

    @property
    def uses_similarity(self) -> bool:
        """Whether `TaskInfo.similarity` is read; where it is not, no task is embedded."""
        return False

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on every delta."""
        return self.alpha / self.rank

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """State before the first task: one block and the backbone's projector, in float32 like all that trains."""
        del total
        projector = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), projector)
        block = lowrank.init_block(trees.named_generator(seed, "block", 0), targets, self.rank, self.a_init)
        return CLState({"block": block, "mm_projector": projector}, {}, {}, jnp.int32(0))

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """State with which the task's training begins; for LoRA the same parameters go on."""
        del probe
        return dataclasses.replace(state, stage=jnp.int32(info.index))

    def phases(self, info: TaskInfo) -> tuple[Phase, ...]:
        """The training phases of a stage, in order."""
        del info
        return (Phase(),)

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """Prefixes of the parameter paths that train in this stage, the mm_projector aside."""
        del info
        return ("block",)

    def trainable_mask(self, state: CLState, info: TaskInfo) -> dict[str, bool]:
        """{path: whether it trains} over the leaves of `state.params`."""
        prefixes = self.trainable(info) + ((PROJECTOR,) if self.train_mm_projector else ())
        return trees.mask_by_prefix(state.params, prefixes)

    def phase_mask(self, state: CLState, info: TaskInfo, phase: Phase) -> dict[str, bool]:
        """{path: whether it trains} in one phase; the same in all of them unless a method says otherwise."""
        del phase
        return self.trainable_mask(state, info)

    def skips(self, state: CLState, info: TaskInfo, phase: Phase) -> bool:
        """Whether there is nothing to do in a phase."""
        del state, info, phase
        return False

    def after_phase(self, state: CLState, info: TaskInfo, phase: Phase, probe: Probe) -> CLState:
        """State after one phase, also after one that was skipped."""
        del info, phase, probe
        return state

    def update_factors(self, memory: PyTree) -> dict[str, jax.Array]:
        """{path or prefix of paths: f32 factors along the leaf's first axes} on the updates; an entry with factor 0 rests bit by bit."""
        del memory
        return {}

    def update_running(self, running: PyTree, seen: PyTree, draw: jax.Array, stage: jax.Array) -> PyTree:
        """Running statistics after a step; `seen` is what the step logs (or what `feature_loss` observed), `draw` the step's key."""
        del seen, draw, stage
        return running

    def feature_loss(self, params: PyTree, memory: PyTree, features: jax.Array, stage: jax.Array):
        """Loss of a phase on features [B, ...]: (f32[], {name: f32[]} to log, pytree for `update_running`)."""
        raise NotImplementedError(f"{self.name} has no phase on features")

    def group(self, path: str) -> str:
        """The learning-rate group of a parameter: "adapter", "gate" or "mm_projector"."""
        return PROJECTOR if path.startswith(PROJECTOR) else ADAPTER

    def gate_multiplier(self) -> float:
        """Factor on the learning rate of the group "gate"."""
        return 1.0

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """Gates of a batch: {"pool": f32[B|1, 1, C*r], "new": f32[B|1, 1, r], "blocks": f32[B|1, M]}."""
        del params, memory, inputs
        ones = jnp.ones((1, 1, self.rank), jnp.float32)
        return {"pool": jnp.zeros((1, 1, 0), jnp.float32), "new": ones, "blocks": jnp.ones((1, 1), jnp.float32)}

    def leaves(self, params: PyTree) -> PyTree:
        """{linear: leaves} of the adapter, scanned with the layers."""
        return {name: dict(leaf) for name, leaf in params["block"].items()}

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter | None:
        """The adapter of a forward pass; `key` switches dropout on."""
        leaves = self.leaves(params)
        rate = self.dropout if key is not None else 0.0
        layers = jax.tree.leaves(leaves)[0].shape[0]
        layer = {"dropout_key": jax.random.split(key, layers)} if rate else {}
        return Adapter(leaves, layer, gates, partial(pooled_delta, scale=self.scale, mix=self.mix(), rate=rate), resting=FROZEN)

    def projector_adapter(self, params: PyTree, gates: PyTree) -> Adapter | None:
        """Adapter of the mm_projector, where the method `adapts_projector`; its gates are then made before there are image features."""
        del params, gates
        return None

    def shown_gates(self, gates: PyTree, contexts: PyTree) -> jax.Array:
        """f32[B|1, M] gates that are recorded of a prompt: mean over the layers where each has its own."""
        return contexts["blocks"].mean(axis=0) if self.gates_in_layers else gates["blocks"]

    def mix(self) -> str:
        """How blocks are fused, see `lowrank.mix_ranks`."""
        return "delta"

    def extra_loss(
        self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A loss added to the cross-entropy of each micro-batch, and what to log of it.

        The training step always gives `passes`: what this batch's forward pass gave, and a way to run it again with other parameters.
        """
        del params, memory, inputs, key, passes
        return jnp.float32(0), {}

    def probe(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> dict[str, jax.Array]:
        """What `end_task` and `start_task` may ask of training samples: {name: f32[B, ...]}."""
        del params, memory, inputs
        return {}

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe) -> CLState:
        """State after the stage's training: memories and statistics of the task."""
        del info, probe
        return state

    def replay(self, info: TaskInfo) -> Replay | None:
        """Old examples to train on in this stage, or None."""
        del info
        return None

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """What the passes of a phase are made of, None for those that answer; `params` may be shapes."""
        del info, phase
        ranks = lowrank.ranks_of(params.get("block", {}))
        return Cost(0, ranks, ranks)

    def fill(self, params: PyTree, info: TaskInfo) -> dict[str, str]:
        """{group of parameters with places for later tasks: how full it is when a task begins}."""
        del params, info
        return {}

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """Parameters of the blocks of all tasks up to the current one, as the papers count what is stored; `state` may be shapes."""
        del info
        return trees.count_parameters(state.params.get("block", {}))

    def to_disk(self, state: CLState) -> dict[str, Any]:
        """What the stage's checkpoint holds; merged over the stages (later leaves win) it restores the state."""
        return {"params": state.params}

    def from_disk(self, tree: Mapping[str, Any], fresh: CLState, stage: int) -> CLState:
        """The state at the end of a stage from the merged trees of all stages up to it; `fresh` is what `init` returned."""
        return dataclasses.replace(fresh, params=tree["params"], stage=jnp.int32(stage))

    def blocks(self, state: CLState) -> int:
        """Number of blocks that a state holds."""
        return int("block" in state.params)

    def block(self, state: CLState, index: int) -> PyTree:
        """One block {linear: {"a": [L, d_in, r], "b": [L, r, d_out]}} as it was trained, without scale or gate.

        Raises:
            ValueError: "<name> has no block <index>; it has <count>, counted from 0"
        """
        if not 0 <= index < self.blocks(state):
            raise ValueError(f"{self.name} has no block {index}; it has {self.blocks(state)}, counted from 0")
        return {name: dict(leaf) for name, leaf in state.params["block"].items()}

    def fold(self, state: CLState, task: int) -> PyTree:
        """One low-rank adapter {linear: {"a": [L, d_in, R], "b": [L, R, d_out]}} equal to the method for a task, scale folded into b.

        Raises:
            ValueError: with the reason, where the gates depend on the input.
        """
        del task
        return {name: {"a": leaf["a"], "b": leaf["b"] * self.scale} for name, leaf in state.params["block"].items()}

    def routing(self, state: CLState) -> Way:
        """How the gates of the state's blocks follow from a prompt, for an export of all blocks with their gates.

        Raises:
            ValueError: with the reason, where the gates do not depend on the input, or on more than `methods.routing` can say.
        """
        try:
            self.fold(state, int(state.stage))
        except ValueError as error:
            raise ValueError(f"how the gates of {self.name} follow from a prompt is not described by the method") from error
        raise ValueError(f"{self.name} has no gates that depend on the input")


def require(holds: bool, field: str, value: object, sentence: str) -> None:
    """Raises UserError "config.method.<field>=<value>: <sentence>" unless the condition holds."""
    if not holds:
        raise UserError(f"config.method.{field}={value}: {sentence}")


def require_choice(field: str, value: object, choices: tuple) -> None:
    """Raises UserError unless the value is one of the choices."""
    require(value in choices, field, repr(value), f"must be one of {', '.join(map(repr, choices))}")


def check_contract(method: Method, before: CLState | None, state: CLState, info: TaskInfo) -> dict[str, bool]:
    """Checks a state at the start of a stage and returns its trainable mask.

    Raises:
        ValueError: "the method <name> trains nothing in stage <i>" or a mask whose paths are not those of the parameters.
    """
    mask = method.trainable_mask(state, info)
    trainable, frozen = trees.partition(state.params, mask)
    if method.phases(info) and not trees.flatten(trainable):
        raise ValueError(f"the method {method.name} trains nothing in stage {info.index + 1} ({info.name}): its trainable mask is empty")
    if int(state.stage) != info.index:
        raise ValueError(f"the method {method.name} left stage {int(state.stage)} in its state at stage {info.index}")
    if before is not None and set(trees.flatten(before.params)) - set(mask):
        raise ValueError(f"the method {method.name} lost parameters at the start of stage {info.index + 1}")
    del frozen
    return mask
