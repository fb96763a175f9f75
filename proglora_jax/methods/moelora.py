"""MoELoRA: eight low-rank experts in each linear, mixed token by token by a router of the linear's own; all train in every task."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import experts, lowrank
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.methods.base import Cost, GateInputs, Method, Phase, TaskInfo, dropped, require, require_choice
from proglora_jax.methods.routing import LinearRouting


def expert_gates(leaves: PyTree, context: PyTree, gates: PyTree, name: str, x: jax.Array, router_input: str) -> jax.Array:
    """f32[B, T or 1, E] gates of a linear; where the prompt decided them, one new token takes those."""
    seen = context.get("linears", {}) if context else {}
    if router_input != "token" and name in seen:
        return seen[name]["gates"]
    return jax.nn.softmax(experts.router_logits(experts.pick_positions(x, gates["prompt"], router_input), leaves["router"]), axis=-1)


def expert_delta(names, leaves, context, gates, x, *, scale: float, rate: float, rank: int, router_input: str):
    """`Adapter.delta`: the routers read x as it is, the experts with dropout; one fused pair over all of a linear's."""

    def pair(name: str) -> lowrank.Pair:
        weights = expert_gates(leaves[name], context, gates, name, x, router_input)
        a, b, ranks = leaves[name]["a"], leaves[name]["b"], jnp.repeat(weights, rank, axis=-1)  # [B, T, E*r]
        return lowrank.Pair(a[:, :0], b[:0], jnp.zeros((1, 1, 0), jnp.float32), a, b, ranks)

    return lowrank.pooled_low_rank_group(dropped(names, context, x, rate), tuple(pair(name) for name in names), scale, "delta")


def observe_experts(name, leaves, context, gates, x, *, router_input: str):
    """`Adapter.observe`: each expert's mean gate over the prompt, and the gates where later tokens need them."""
    weights = expert_gates(leaves, context, gates, name, x, router_input)
    return {"mass": experts.mass(weights, gates["prompt"])} | ({} if router_input == "token" else {"gates": weights})


@dataclasses.dataclass(frozen=True)
class MoELoRA(Method):
    """y = W x + (alpha / r) sum_k g_k B_k A_k x with g = softmax(W_R x_t) over K experts of rank r / K, for each token t.

    What is open: the ProgLoRA papers describe the router's input as the first token of x, CoIN's code gives every token gates by its own
    activation. In a causal model the first is degenerate: position 0 holds BOS and sees only itself, so its activation, and with it the
    mixture, is a constant. Hence "token" is the default. There is no balancing loss and no top-k in either.

    The published "320M" are the experts alone; with routers and mm_projector 349.9 M train (the "350M" of a later paper).

    Attributes:
        rank: r, the ranks of all experts together.
        experts: K.
        router_input: "token", "first_token" or "mean_prompt" (mean over the prompt's positions), see `experts.pick_positions`.

    Source: CoIN (NeurIPS 2024), section 4, and its code.
    """

    rank: int = 128
    alpha: float = 256.0
    experts: int = 8
    router_input: str = "token"

    name: ClassVar[str] = "moelora"
    gate_unit: ClassVar[str] = "expert"
    isolated_as: ClassVar[str] = "self"
    observes: ClassVar[bool] = True
    blocks_are_tasks: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(self.experts >= 1, "experts", self.experts, "must be >= 1 (8 in CoIN)")
        require(self.rank % self.experts == 0, "rank", self.rank, f"must be a multiple of config.method.experts={self.experts}")
        require_choice("router_input", self.router_input, experts.ROUTER_INPUTS)

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """The experts side by side along rank (A_k random, B_k zero), and a router per linear."""
        state = super().init(targets, projector, total, seed)
        router = experts.init_routers(trees.named_generator(seed, "router"), targets, self.experts)
        return dataclasses.replace(state, params=state.params | {"router": router})

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """Experts and routers, in every task."""
        del info
        return ("block", "router")

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """What the routers need to know of the batch; the gates themselves are made in each linear."""
        del params, memory
        codes = jnp.asarray((segments.TEMPLATE, segments.INSTRUCTION, segments.IMAGE), inputs.segments.dtype)
        return {"prompt": jnp.isin(inputs.segments, codes), "blocks": jnp.ones((1, 1), jnp.float32)}

    def leaves(self, params: PyTree) -> PyTree:
        """Experts and router of each linear."""
        return {name: {**leaf, "router": params["router"][name]} for name, leaf in params["block"].items()}

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter:
        """The adapter; each linear makes gates of its own."""
        plain = super().adapter(params, gates, key)
        rate = self.dropout if key is not None else 0.0
        delta = partial(expert_delta, scale=self.scale, rate=rate, rank=self.rank // self.experts, router_input=self.router_input)
        observe = partial(observe_experts, router_input=self.router_input)
        return dataclasses.replace(plain, delta=delta, observe=observe, by_position=self.router_input == "token")

    def shown_gates(self, gates: PyTree, contexts: PyTree) -> jax.Array:
        """f32[B, E] mean gate of each expert over a prompt's positions, linears and layers."""
        del gates
        return jnp.mean(jnp.stack([seen["mass"] for seen in contexts["linears"].values()]), axis=(0, 1))

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """The routers read what the experts read."""
        plain = super().cost(params, info, phase)
        return dataclasses.replace(plain, down=plain.down + self.experts, whole=phase is None or self.router_input != "token")

    def blocks(self, state: CLState) -> int:
        """The experts."""
        return self.experts

    def block(self, state: CLState, index: int) -> PyTree:
        """One expert."""
        whole, rank = super().block(state, index), self.rank // self.experts
        at = slice(index * rank, (index + 1) * rank)
        return {name: {"a": leaf["a"][:, :, at], "b": leaf["b"][:, at]} for name, leaf in whole.items()}

    def fold(self, state: CLState, task: int) -> PyTree:
        """Not possible: every token has gates of its own."""
        raise ValueError(f"{self.name} cannot be folded into one adapter: a router in each linear gives every token gates of its own")

    def routing(self, state: CLState) -> LinearRouting:
        """The routers of all linears, with all experts on."""
        routers = {name: np.asarray(router)[:, None] for name, router in state.params["router"].items()}
        return LinearRouting(routers, self.router_input, self.experts)
