"""BranchLoRA: one shared trunk A and eight branches B per linear, a router per task, branches frozen by use, a task selector by keys."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import experts, keys, lowrank
from proglora_jax.adapters.gates import mean_feature
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.data import replay
from proglora_jax.methods.base import (
    ADAPTER, GATE, PROJECTOR, Cost, GateInputs, Method, Passes, Phase, Probe, TaskInfo, dropped, require, require_choice,
)
from proglora_jax.methods.routing import LinearRouting

KEY_DEVIATION = 0.02
PER_TASK = ("router", "text_key", "image_key")


def branch_gates(leaves: PyTree, context: PyTree, gates: PyTree, name: str, x: jax.Array, method: BranchLoRA) -> jax.Array:
    """f32[B, T or 1, E] gates of a linear by the router of each row's task."""
    seen = context.get("linears", {}) if context else {}
    if method.router_input != "token" and name in seen:
        return seen[name]["gates"]
    router = leaves["router"]
    if gates["task"] is not None:
        newest = (gates["task"] == gates["stage"])[:, None, None]
        router = jnp.where(newest, router, leaves["routers"][gates["task"]])  # [B, d_in, E]
    logits = experts.router_logits(experts.pick_positions(x, gates["prompt"], method.router_input), router)
    return experts.top_k_gates(logits, method.topk, method.renorm)


def branch_delta(names, leaves, context, gates, x, *, method: BranchLoRA, rate: float):
    """`Adapter.delta`: the routers read x as it is, the trunks with dropout."""
    weights = [branch_gates(leaves[name], context, gates, name, x, method) for name in names]
    read = dropped(names, context, x, rate)
    return tuple(
        experts.shared_trunk(read, leaves[name]["a"], leaves[name]["b"], own, method.scale)
        for name, own in zip(names, weights, strict=True))


def observe_branches(name, leaves, context, gates, x, *, method: BranchLoRA):
    """`Adapter.observe`: each branch's routing mass over the prompt, and the gates where later tokens need them."""
    weights = branch_gates(leaves, context, gates, name, x, method)
    return {"mass": experts.mass(weights, gates["prompt"])} | ({} if method.router_input == "token" else {"gates": weights})


@dataclasses.dataclass(frozen=True)
class BranchLoRA(Method):
    """y = W x + s sum over the top k of g_k B_k A x: the trunk A is shared, each task has a router of its own in every linear.

    Only the paper's abstract and public summaries were at hand. What they fix: the asymmetric trunk and branches, sparse routing with
    k = 2 of 8, freezing after each task of the branches that it used most, routers per task, and a task selector by image and text keys
    (no task id at test). The published 222 M parameters are reproduced exactly by branches of rank 16 in all seven linears with one
    router each and the mm_projector; an attachment to the MLP alone would give 142.7 M.

    What is open, and what was chosen: the router reads every token (the summaries' first token is the same BOS activation for every
    sample, see MoELoRA); gates are a softmax over the two that stay; the use of a branch is its mean gate over prompt positions of a
    sample of the task's rows under the task's router; the union of all tasks' most used branches is frozen; the text embedding is the
    mean word embedding of the instruction. Keys start small, N(0, 0.02^2): only their direction counts, and a small key turns within
    few steps of Adam.

    Cost beside a LoRA of the same rank: the routers (E * d_in multiplications per token and linear), and less on the side of A.

    Attributes:
        rank: r; trunk and branches have r / experts ranks.
        experts: E, branches of a linear.
        topk: k, branches that a token takes, and that a task freezes.
        renorm: "topk_softmax" or "softmax_then_mask", see `experts.top_k_gates`.
        router_input: "token", "first_token" or "mean_prompt", see `experts.pick_positions`.
        freeze_a_after: the trunk rests after so many tasks; 0 never (the paper's).
        align_weight: weight of the keys' loss.
        text_tokens: what the text key is compared with: "instruction" or "text_prompt" (system text and roles too).
        mass_samples: rows of a task whose routing says which branches to freeze; 0 takes all.

    Source: BranchLoRA (arXiv 2506.02041).
    """

    rank: int = 128
    alpha: float = 256.0
    experts: int = 8
    topk: int = 2
    renorm: str = "topk_softmax"
    router_input: str = "token"
    freeze_a_after: int = 0
    align_weight: float = 1.0
    text_tokens: str = "instruction"
    mass_samples: int = 1024

    name: ClassVar[str] = "branchlora"
    gate_unit: ClassVar[str] = "branch"
    isolated_as: ClassVar[str] = "self"
    stored_beside: ClassVar[tuple[str, ...]] = ("frozen",)
    keeps_forward: ClassVar[bool] = False
    observes: ClassVar[bool] = True
    wants_image: ClassVar[bool] = True
    blocks_are_tasks: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(self.experts >= 1, "experts", self.experts, "must be >= 1 (8 in the paper)")
        require(self.rank % self.experts == 0, "rank", self.rank, f"must be a multiple of config.method.experts={self.experts}")
        require(1 <= self.topk <= self.experts, "topk", self.topk, f"must be between 1 and config.method.experts={self.experts}")
        require_choice("renorm", self.renorm, ("topk_softmax", "softmax_then_mask"))
        require_choice("router_input", self.router_input, experts.ROUTER_INPUTS)
        require(self.freeze_a_after >= 0, "freeze_a_after", self.freeze_a_after, "must be 0 (never) or a number of tasks")
        require(self.align_weight >= 0, "align_weight", self.align_weight, "must be >= 0 (1 in the paper)")
        require_choice("text_tokens", self.text_tokens, ("instruction", "text_prompt"))
        require(self.mass_samples >= 0, "mass_samples", self.mass_samples, "must be 0 (all) or a number of rows")

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """Trunk random, branches zero, the first router and keys, and empty places for those of the later tasks."""
        rank, layers = self.rank // self.experts, targets.layers
        block = lowrank.init_block(trees.named_generator(seed, "block", 0), targets, rank, self.a_init)
        shapes = {name: (total, d_in, self.experts) for name, (d_in, _) in targets.linears.items()}
        vision = projector["linear_1"]["kernel"].shape[0]
        params = {
            "mm_projector": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), projector),
            "trunk": {name: leaf["a"] for name, leaf in block.items()},
            "branches": {name: jnp.zeros((layers, self.experts, rank, d_out), jnp.float32) for name, (_, d_out) in targets.linears.items()},
            "routers": {name: jnp.zeros((layers, *shape), jnp.float32) for name, shape in shapes.items()},
            "text_keys": jnp.zeros((total, targets.width), jnp.float32),
            "image_keys": jnp.zeros((total, vision), jnp.float32),
        } | self._fresh(targets, vision, seed, 0)
        memory = {"frozen": {name: jnp.zeros((layers, self.experts), jnp.float32) for name in targets.linears}}
        return CLState(params, memory, {}, jnp.int32(0))

    def _fresh(self, targets: Targets, vision: int, seed: int, task: int) -> PyTree:
        """Router and keys of a new task."""
        draw = lambda name, width: jnp.asarray(trees.named_generator(seed, name, task).normal(0.0, KEY_DEVIATION, width), jnp.float32)
        return {
            "router": experts.init_routers(trees.named_generator(seed, "router", task), targets, self.experts),
            "text_key": draw("text_key", (targets.width,)), "image_key": draw("image_key", (vision,)),
        }  # fmt: skip

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Puts the last task's router and keys into their places and makes new ones."""
        state = dataclasses.replace(state, stage=jnp.int32(info.index))
        if info.index == 0:
            return state
        params, last = state.params, info.index - 1
        stored = self._store(params, {name: params[name] for name in PER_TASK}, last)
        layers = next(iter(params["trunk"].values())).shape[0]
        linears = {name: (leaf.shape[1], params["branches"][name].shape[-1]) for name, leaf in params["trunk"].items()}
        targets = Targets(layers, linears, params["text_key"].shape[0])
        fresh = self._fresh(targets, params["image_key"].shape[0], info.seed, info.index)
        return dataclasses.replace(state, params=params | stored | fresh)

    def _store(self, params: PyTree, own: PyTree, task: int) -> PyTree:
        """The places of all tasks with one task's router and keys in them."""
        return {
            "routers": {name: jnp.asarray(leaf).at[:, task].set(own["router"][name]) for name, leaf in params["routers"].items()},
            "text_keys": jnp.asarray(params["text_keys"]).at[task].set(own["text_key"]),
            "image_keys": jnp.asarray(params["image_keys"]).at[task].set(own["image_key"]),
        }

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """The trunk, the branches (those that are not frozen, see `update_factors`), the task's router and keys."""
        trunk = () if self.freeze_a_after and info.index >= self.freeze_a_after else ("trunk",)
        return (*trunk, "branches", *PER_TASK)

    def update_factors(self, memory: PyTree) -> dict[str, jax.Array]:
        """Frozen branches rest, each linear's own."""
        return {f"branches/{name}": 1.0 - frozen for name, frozen in memory["frozen"].items()}

    def group(self, path: str) -> str:
        """The keys are the group "gate"."""
        if path.startswith(PROJECTOR):
            return PROJECTOR
        return GATE if path in ("text_key", "image_key", "text_keys", "image_keys") else ADAPTER

    def queries(self, inputs: GateInputs) -> tuple[jax.Array, jax.Array]:
        """(text f32[B, D], image f32[B, Dv]) of a batch."""
        codes = (segments.INSTRUCTION,) if self.text_tokens == "instruction" else (segments.TEMPLATE, segments.INSTRUCTION)
        mask = jnp.isin(inputs.segments, jnp.asarray(codes, inputs.segments.dtype))
        return jax.lax.stop_gradient(mean_feature(inputs.embeddings, mask)), jax.lax.stop_gradient(inputs.image)

    def select(self, params: PyTree, inputs: GateInputs) -> jax.Array:
        """i32[B] the task whose keys are nearest to each row's image and text."""
        text, image = self.queries(inputs)
        newest = (jnp.arange(params["text_keys"].shape[0]) == inputs.stage)[:, None]
        score = keys.cosines(text, jnp.where(newest, params["text_key"], params["text_keys"]))
        shown = keys.cosines(image, jnp.where(newest, params["image_key"], params["image_keys"]))
        score = score + shown * inputs.image_mask[:, None]
        return jnp.argmax(jnp.where(jnp.arange(score.shape[1]) <= inputs.stage, score, -jnp.inf), axis=1)

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """Which task's routers each row takes: the current task's in training, at test the one that the keys select."""
        del memory
        codes = jnp.asarray((segments.TEMPLATE, segments.INSTRUCTION, segments.IMAGE), inputs.segments.dtype)
        task = None if inputs.training or inputs.probing else self.select(params, inputs)
        return {"prompt": jnp.isin(inputs.segments, codes), "task": task, "stage": inputs.stage, "blocks": jnp.ones((1, 1), jnp.float32)}

    def leaves(self, params: PyTree) -> PyTree:
        """Trunk, branches and routers of each linear."""
        return {
            name: {"a": a, "b": params["branches"][name], "router": params["router"][name], "routers": params["routers"][name]}
            for name, a in params["trunk"].items()
        }

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter:
        """The adapter; each linear makes gates of its own."""
        leaves, rate = self.leaves(params), self.dropout if key is not None else 0.0
        layers = jax.tree.leaves(leaves)[0].shape[0]
        layer = {"dropout_key": jax.random.split(key, layers)} if rate else {}
        delta, observe = partial(branch_delta, method=self, rate=rate), partial(observe_branches, method=self)
        return Adapter(leaves, layer, gates, delta, observe=observe, resting=("routers",), by_position=self.router_input == "token")

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """The keys' loss: mean over rows of 1 - cos for the text, and for the image where there is one."""
        text, image = self.queries(inputs)
        apart = 1.0 - keys.cosines(text, params["text_key"][None])[:, 0]
        apart = apart + (1.0 - keys.cosines(image, params["image_key"][None])[:, 0]) * inputs.image_mask
        align = apart.mean()
        return self.align_weight * align, {"align": align}

    def probe(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> dict[str, jax.Array]:
        """Routing mass f32[B, L, J, E] of each linear's branches, the J linears in sorted order."""
        seen = inputs.contexts["linears"]
        return {"mass": jnp.moveaxis(jnp.stack([seen[name]["mass"] for name in sorted(seen)], axis=2), 0, 1)}

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe) -> CLState:
        """Freezes the branches that the task used most."""
        rows = replay.replay_indices(info.size, min(self.mass_samples or info.size, info.size), info.seed, info.name)
        used = jnp.asarray(probe(state, rows)["mass"]).mean(axis=0)  # [L, J, E]
        most = jax.nn.one_hot(jax.lax.top_k(used, self.topk)[1], self.experts, dtype=jnp.float32).sum(axis=-2)
        before = state.memory["frozen"]
        frozen = {name: jnp.maximum(before[name], most[:, place]) for place, name in enumerate(sorted(before))}
        return dataclasses.replace(state, memory={"frozen": frozen})

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """One trunk and one router read, all branches write; every row has a router of its task at test."""
        rank = self.rank // self.experts
        return Cost(0, rank + self.experts, self.rank, whole=phase is None or self.router_input != "token")

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """Trunk and branches, the same ones for all tasks."""
        return sum(trees.count_parameters(state.params[name]) for name in ("trunk", "branches"))

    def shown_gates(self, gates: PyTree, contexts: PyTree) -> jax.Array:
        """f32[B, E] mean gate of each branch over a prompt's positions, linears and layers."""
        del gates
        return jnp.mean(jnp.stack([seen["mass"] for seen in contexts["linears"].values()]), axis=(0, 1))

    def to_disk(self, state: CLState):
        """Trunk, branches and projector as they are, and the task's router and keys."""
        own = {name: state.params[name] for name in PER_TASK}
        rest = {name: state.params[name] for name in ("trunk", "branches", "mm_projector")}
        return {"params": rest, "tasks": {f"task_{int(state.stage):02d}": own}, "frozen": state.memory["frozen"]}

    def from_disk(self, tree, fresh: CLState, stage: int) -> CLState:
        """Puts the earlier tasks' routers and keys into their places."""
        params = dict(fresh.params)
        for task in range(stage):
            params |= self._store(params, tree["tasks"][f"task_{task:02d}"], task)
        params |= tree["params"] | tree["tasks"][f"task_{stage:02d}"]
        return dataclasses.replace(fresh, params=params, memory={"frozen": tree["frozen"]}, stage=jnp.int32(stage))

    def blocks(self, state: CLState) -> int:
        """The branches."""
        return self.experts

    def block(self, state: CLState, index: int) -> PyTree:
        """One branch with the trunk."""
        if not 0 <= index < self.experts:
            raise ValueError(f"{self.name} has no block {index}; it has {self.experts}, counted from 0")
        return {name: {"a": a, "b": state.params["branches"][name][:, index]} for name, a in state.params["trunk"].items()}

    def fold(self, state: CLState, task: int) -> PyTree:
        """Not possible: every token has gates of its own."""
        raise ValueError(f"{self.name} cannot be folded into one adapter: a router in each linear gives every token gates of its own")

    def routing(self, state: CLState) -> LinearRouting:
        """The routers and keys of the tasks so far."""
        params, stage = jax.tree.map(np.asarray, state.params), int(state.stage)
        newest = params["router"]
        routers = {name: np.concatenate([leaf[:, :stage], newest[name][:, None]], axis=1) for name, leaf in params["routers"].items()}
        text, image = (np.concatenate([params[f"{kind}_keys"][:stage], params[f"{kind}_key"][None]]) for kind in ("text", "image"))
        renormalise = self.renorm == "topk_softmax"
        return LinearRouting(routers, self.router_input, self.topk, renormalise, text, image, tokens=self.text_tokens)
