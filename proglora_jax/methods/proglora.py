"""ProgLoRA (dynamic): a query projector and one key per block gate the pool by instruction; a recall loss pins old gates."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.adapters import gates as gating
from proglora_jax.core import precise
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.data import replay
from proglora_jax.methods import layer_routing, recall
from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR, GateInputs, Passes, Probe, TaskInfo, require, require_choice
from proglora_jax.methods.pooled import Pooled
from proglora_jax.methods.routing import Routing, of_prompt

ROUTING_TOKENS = ("instruction", "text_prompt", "multimodal_prompt", "released_code")


@dataclasses.dataclass(frozen=True)
class ProgLoRADynamic(Pooled):
    """y = W x + s sum_n w_n B_n A_n x with w = softmax(<Proj(max-pooled instruction), key_n> / tau), one w per sample.

    Attributes:
        routing_tokens: positions that the feature is pooled over; "released_code" includes answers while training.
        routing_layer: 0 pools the input embeddings, k the frozen backbone's hidden states after k layers.
        routing_scope: "global" (one query projector and key table, one gate vector per sample) or "per_layer" (each layer has its
            own and pools the hidden states that enter it).
        routing_decode: "prefill_cached" (gates of the prompt serve all new tokens) or "per_token" (the released code's).
        split_max_quirk: the released code's two separately shifted groups of logits.
        temperature: "sqrt_d" or a number; the logits are divided by it.
        proj_variant: "paper" or "code", see `gates.query_projector`.
        proj_width: d_p, inner width of the query projector (256 reproduces the published parameter count).
        key_init: "fresh_xavier", "copy_prev" (the released loader's effect) or "mean_feature" (normalised mean query).
        key_scale: factor on a fresh key.
        train_old_keys: whether the keys of earlier blocks go on training.
        gate_bonus: bonus on the newest block's logit while it trains, falling linearly to 0; 0 is the paper.
        gate_bonus_fraction: share of the stage's steps after which the bonus is gone.
        match_weight: weight of a matching loss, the mean of -log w of the newest block over the current task's samples (without the
            bonus); 0 is the paper. Without it nothing but the cross-entropy asks the gates for the new block, which a growing
            block answers as well, while the recall loss pushes its logit down for every sample.
        gate_lr_multiplier: learning rate of query projector and keys over that of the blocks.
        recall_enabled: whether the recall loss is added.
        recall_weight: lambda.
        recall_per_task: phi, memory samples of an old task that has nothing in common with the new one.
        recall_count: "similarity", "fixed" or "random_phi", see ProgLoRAStatic.
        recall_kl: "target_pred" or "pred_target_eps", see `gates.recall_divergence`.
        recall_reduction: "mean" or "sum" over the memory's samples.
        recall_batch: memory samples per step; 0 uses all.
        recall_targets: "stored" (gates at the end of the old task) or "recompute" (by the projector kept from then).

    Source: ProgLoRA (Findings of ACL 2025), section 3.3, Eqs. 5-8. Where the released code differs (no recall, split
    softmax, gates from answers, old keys lost) the paper is followed; flags reproduce what can be reproduced.
    """

    routing_tokens: str = "instruction"
    routing_layer: int = 0
    routing_scope: str = "global"
    routing_decode: str = "prefill_cached"
    split_max_quirk: bool = False
    temperature: str = "sqrt_d"
    proj_variant: str = "paper"
    proj_width: int = 256
    key_init: str = "fresh_xavier"
    key_scale: float = 1.0
    train_old_keys: bool = False
    gate_bonus: float = 0.0
    gate_bonus_fraction: float = 0.5
    match_weight: float = 0.0
    gate_lr_multiplier: float = 1.0
    recall_enabled: bool = True
    recall_weight: float = 2.0
    recall_per_task: int = 200
    recall_count: str = "similarity"
    recall_kl: str = "target_pred"
    recall_reduction: str = "mean"
    recall_batch: int = 0
    recall_targets: str = "stored"

    name: ClassVar[str] = "proglora_dynamic"
    stored_beside: ClassVar[tuple[str, ...]] = ("memory", recall.PROJECTORS, recall.ROWS)
    keeps_forward: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require_choice("routing_tokens", self.routing_tokens, ROUTING_TOKENS)
        require(self.routing_layer >= 0, "routing_layer", self.routing_layer, "must be 0 (input embeddings) or a number of layers")
        require_choice("routing_scope", self.routing_scope, ("global", "per_layer"))
        require(self.routing_scope == "global" or self.routing_decode == "prefill_cached", "routing_decode", self.routing_decode,
                "must be 'prefill_cached' with routing_scope='per_layer'")
        require(self.routing_scope == "global" or self.routing_tokens != "released_code", "routing_tokens", self.routing_tokens,
                "the released code routes globally; use routing_scope='global'")
        require(self.routing_scope == "global" or self.routing_layer == 0, "routing_layer", self.routing_layer,
                "must be 0 with routing_scope='per_layer', where every layer pools what enters it")
        require_choice("routing_decode", self.routing_decode, ("prefill_cached", "per_token"))
        require_choice("proj_variant", self.proj_variant, ("paper", "code"))
        require(self.proj_width >= 1, "proj_width", self.proj_width, "must be >= 1 (256 reproduces the published count)")
        require_choice("key_init", self.key_init, ("fresh_xavier", "copy_prev", "mean_feature"))
        require_choice("recall_count", self.recall_count, ("similarity", "fixed", "random_phi"))
        require_choice("recall_kl", self.recall_kl, ("target_pred", "pred_target_eps"))
        require_choice("recall_reduction", self.recall_reduction, ("mean", "sum"))
        require_choice("recall_targets", self.recall_targets, ("stored", "recompute"))
        require(self.recall_per_task >= 0, "recall_per_task", self.recall_per_task, "must be >= 0 (200 in the paper)")
        require(self.recall_batch >= 0, "recall_batch", self.recall_batch, "must be 0 (all) or a number of samples")
        require(self.key_scale > 0, "key_scale", self.key_scale, "must be positive (1 is the paper)")
        require(self.gate_bonus >= 0, "gate_bonus", self.gate_bonus, "must be >= 0 (0 is the paper)")
        require(self.match_weight >= 0, "match_weight", self.match_weight, "must be >= 0 (0 is the paper)")
        require(self.routing_scope == "global" or self.match_weight == 0, "match_weight", self.match_weight,
                "must be 0 with routing_scope='per_layer'")
        require(self.gate_lr_multiplier >= 0, "gate_lr_multiplier", self.gate_lr_multiplier, "must be >= 0 (1 is the paper)")
        require(self.recall_weight >= 0, "recall_weight", self.recall_weight, "must be >= 0 (2.0 in the paper)")
        require(0 < self.gate_bonus_fraction <= 1, "gate_bonus_fraction", self.gate_bonus_fraction, "must be in (0, 1]")
        self._temperature(1)

    @property
    def gates_in_layers(self) -> bool:
        """Whether each layer computes gates of its own."""
        return self.routing_scope == "per_layer"

    @property
    def regates(self) -> bool:
        """Whether each generated token gets gates of its own."""
        return self.routing_decode == "per_token"

    @property
    def features_drift(self) -> bool:
        """Whether features depend on what trains: image features, or hidden states, into which these have flowed.

        Those of the memory are then read again from their samples when a stage begins. Targets stay what they were.
        """
        images = self.routing_tokens in ("multimodal_prompt", "released_code")
        return images or self.routing_layer > 0 or self.gates_in_layers

    def _temperature(self, width: int) -> float:
        if self.temperature == "sqrt_d":
            return float(np.sqrt(width))
        try:
            value = float(self.temperature)
        except ValueError:
            value = 0.0
        require(value > 0, "temperature", repr(self.temperature), "must be 'sqrt_d' or a positive number")
        return value

    @property
    def uses_similarity(self) -> bool:
        """For how many stored features are recalled."""
        return self.recall_enabled and self.recall_count == "similarity"

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """Pool, first key, query projector, and an empty memory of fixed size.

        Raises:
            UserError: where `routing_layer` is more than the model's layers.
        """
        require(self.routing_layer <= targets.layers, "routing_layer", self.routing_layer, f"the model has {targets.layers} layers")
        state = super().init(targets, projector, total, seed)
        width = targets.width
        routing = {
            "key": gating.init_key(trees.named_generator(seed, "key", 0), width, self.key_scale),
            "keys": jnp.zeros((total, width), jnp.float32),
            "query_projector": gating.init_query_projector(
                trees.named_generator(seed, "query_projector"), width, self.proj_width, self.proj_variant),
        }
        layers = (targets.layers,) if self.gates_in_layers else ()
        if self.gates_in_layers:
            routing = layer_routing.stack_router(routing, targets.layers)
        memory = recall.empty(total, self.recall_per_task, layers, width)
        return dataclasses.replace(state, params=state.params | routing, memory=memory)

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Grows the pool, freezes the last key, makes a new one, and says which stored samples count in this stage."""
        state = super().start_task(state, info, probe)
        if info.index == 0:
            if self.key_init != "mean_feature":
                return state
            return dataclasses.replace(state, params=state.params | {"key": self._new_key(state, info, probe)})
        params = state.params
        keys = jnp.asarray(params["keys"]).at[..., info.index - 1, :].set(params["key"])
        state = dataclasses.replace(state, params=params | {"keys": keys, "key": self._new_key(state, info, probe)})
        if not self.recall_enabled:
            return state
        if self.features_drift and self.recall_per_task:
            state = recall.read_again(state, info, probe)
        memory = state.memory | {"mask": recall.counted(state.memory, info, self.recall_per_task, self.recall_count)}
        if self.recall_targets == "recompute":
            memory["targets"] = self._recomputed(state, info)
        return dataclasses.replace(state, memory=memory)

    def _new_key(self, state: CLState, info: TaskInfo, probe: Probe | None) -> jax.Array:
        if self.key_init == "copy_prev":
            return state.params["key"]
        if self.key_init == "fresh_xavier":
            shape = state.params["key"].shape
            key = gating.init_key(trees.named_generator(info.seed, "key", info.index), shape[-1], self.key_scale)
            return jnp.broadcast_to(key, shape)
        query = probe(state, replay.replay_indices(info.size, max(self.recall_per_task, 1), info.seed, info.name))["h"].mean(0)
        return jnp.asarray(self.key_scale * query / jnp.maximum(jnp.linalg.norm(query, axis=-1, keepdims=True), 1e-6), jnp.float32)

    def _recomputed(self, state: CLState, info: TaskInfo) -> jax.Array:
        targets = state.memory["targets"]
        for task in range(info.index):
            projector = state.carry[recall.PROJECTORS][recall.task_key(task)]
            params = state.params | {"query_projector": projector}
            logits = self._memory_logits(params, state.memory["features"][task], jnp.int32(info.index))
            targets = targets.at[task].set(gating.block_softmax(logits, jnp.int32(task)))
        return targets

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """The new block, its key, the query projector (and old keys by flag)."""
        return ("block", "key", "query_projector") + (("keys",) if self.train_old_keys else ())

    def group(self, path: str) -> str:
        """Keys and the query projector are the group "gate"."""
        if path.startswith(PROJECTOR):
            return PROJECTOR
        return GATE if path.split("/")[0] in ("key", "keys", "query_projector") else ADAPTER

    def gate_multiplier(self) -> float:
        """Learning rate of the group "gate" over that of the blocks."""
        return self.gate_lr_multiplier

    def route(self, inputs: GateInputs) -> jax.Array:
        """The pooled feature z f32[B, D] of a batch, by `routing_tokens` and `routing_layer`."""
        mask = self._positions(inputs)
        z = gating.route_feature(inputs.embeddings if inputs.routed is None else inputs.routed, mask)
        if self.routing_tokens == "released_code":
            count = mask.sum(1)
            z = jnp.where((count < count.max())[:, None], jnp.maximum(z, 0.0), z)  # pad rows are zero vectors there
        return z

    def _positions(self, inputs: GateInputs) -> jax.Array:
        codes = {
            "instruction": (segments.INSTRUCTION,),
            "text_prompt": (segments.TEMPLATE, segments.INSTRUCTION),
            "multimodal_prompt": (segments.TEMPLATE, segments.INSTRUCTION, segments.IMAGE),
            "released_code": (segments.TEMPLATE, segments.INSTRUCTION, segments.IMAGE, segments.ANSWER),
        }[self.routing_tokens]
        return jnp.isin(inputs.segments, jnp.asarray(codes, inputs.segments.dtype))  # [B, T]

    def _logits(self, params: PyTree, z: jax.Array, stage: jax.Array) -> jax.Array:
        h = gating.query_projector(params["query_projector"], z, self.proj_variant)
        old = params["keys"] if self.train_old_keys else jax.lax.stop_gradient(params["keys"])
        newest = (jnp.arange(old.shape[0]) == stage)[:, None]
        keys = jnp.where(newest, params["key"][None], old)  # [M, D]
        return precise.matmul(h, keys.T) / self._temperature(z.shape[-1])

    def _memory_logits(self, params: PyTree, features: jax.Array, stage: jax.Array) -> jax.Array:
        """Logits of stored features f32[..., D]; f32[..., L, D] where every layer has a router."""
        if not self.gates_in_layers:
            return self._logits(params, features, stage)
        router = {name: params[name] for name in layer_routing.ROUTER}
        return jax.vmap(lambda own, z: self._logits(own, z, stage), in_axes=(0, -2), out_axes=-2)(router, features)

    def weights(self, params: PyTree, z: jax.Array, stage: jax.Array, bonus: jax.Array | float = 0.0) -> jax.Array:
        """f32[B, M] gates of features z f32[B, D]; `bonus` is added to the newest block's logit."""
        logits = self._logits(params, z, stage)
        logits = logits + bonus * (jnp.arange(logits.shape[-1]) == stage)
        return gating.split_max_softmax(logits, stage) if self.split_max_quirk else gating.block_softmax(logits, stage)

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """One softmax over the blocks learned so far, per sample (and layer, where each gates itself)."""
        bonus = jnp.float32(0)
        if inputs.training and self.gate_bonus:
            bonus = gating.newest_bonus(self.gate_bonus, self.gate_bonus_fraction, inputs.progress)
        if self.gates_in_layers:
            return {"mask": self._positions(inputs), "stage": inputs.stage, "bonus": bonus, "blocks": jnp.ones((1, 1), jnp.float32)}
        return self.split_gates(params, self.weights(params, self.route(inputs), inputs.stage, bonus), inputs.stage)

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None):
        """The adapter; with layers that gate themselves by flag."""
        adapter = super().adapter(params, gates, key)
        if not self.gates_in_layers:
            return adapter
        split = lambda weights, stage: self.split_gates(params, weights, stage)
        return layer_routing.attach(adapter, params, self.weights, split)

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """lambda * KL between the stored gates of old samples and what the router now gives them, and the matching loss by flag."""
        loss, logged = jnp.float32(0), {}
        if self.recall_enabled:
            recall = self._recall(params, memory, inputs, key)
            loss, logged = loss + self.recall_weight * recall, logged | {"recall": recall}
        if self.match_weight:
            newest = jnp.take(self.weights(params, self.route(inputs), inputs.stage), inputs.stage, axis=1)
            own = inputs.task_id == inputs.stage
            match = -(jnp.log(jnp.maximum(newest, 1e-9)) * own).sum() / jnp.maximum(own.sum(), 1)
            loss, logged = loss + self.match_weight * match, logged | {"match": match}
        return loss, logged

    def _recall(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array) -> jax.Array:
        features, targets, mask = memory["features"], memory["targets"], memory["mask"]
        if self.recall_batch:
            draw = jax.random.uniform(key, mask.shape) + mask  # counted samples first
            pick = jax.lax.top_k(draw.reshape(-1), min(self.recall_batch, mask.size))[1]
            features, targets, mask = (leaf.reshape(1, -1, *leaf.shape[2:])[:, pick] for leaf in (features, targets, mask))
        logits = self._memory_logits(params, features, inputs.stage)
        if self.gates_in_layers:
            mask = jnp.broadcast_to(mask[..., None], logits.shape[:-1])
        return gating.recall_divergence(logits, targets, mask, inputs.stage, self.recall_kl, self.recall_reduction)

    def probe(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> dict[str, jax.Array]:
        """Feature z, query h and gates w of training samples."""
        if self.gates_in_layers:
            z = jnp.moveaxis(inputs.contexts["z"], 0, 1)  # [B, L, D]
            query = lambda own, z: gating.query_projector(own, z, self.proj_variant)
            h = jax.vmap(query, in_axes=(0, 1), out_axes=1)(params["query_projector"], z)
            return {"z": z, "h": h, "w": jnp.moveaxis(inputs.contexts["blocks"], 0, 1)}
        z = self.route(inputs)
        h = gating.query_projector(params["query_projector"], z, self.proj_variant)
        return {"z": z, "h": h, "w": self.weights(params, z, inputs.stage)}

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe) -> CLState:
        """Stores features and gates of phi random samples, as the router is now."""
        if not self.recall_per_task:
            return state
        rows = replay.replay_indices(info.size, self.recall_per_task, info.seed, info.name)
        kept = state.params["query_projector"] if self.recall_targets == "recompute" else None
        return recall.store(state, info, rows, probe(state, rows), kept)

    def to_disk(self, state: CLState):
        """The new block, keys, query projector, and the memory of this task."""
        return super().to_disk(state) | recall.to_disk(state)

    def from_disk(self, tree, fresh: CLState, stage: int) -> CLState:
        """Pool, keys, query projector, and the memories of all tasks so far."""
        return recall.from_disk(tree, fresh, super().from_disk(tree, fresh, stage), stage)

    def fold(self, state: CLState, task: int) -> PyTree:
        """Not possible: the gates depend on each sample's instruction."""
        raise ValueError(f"{self.name} cannot be folded into one adapter: its gates are computed from each sample's instruction")

    def routing(self, state: CLState) -> Routing:
        """Softmax over <query, key> / temperature; see `routing.of_prompt` for what is refused."""
        return of_prompt(self, state, self._temperature)
