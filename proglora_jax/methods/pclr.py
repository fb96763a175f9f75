"""PCLR: a pool of single ranks chosen by keys; each task learns new ones, a full pool is compressed and distilled from what it was."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from proglora_jax.adapters import distill, keys, lowrank, rank_pool
from proglora_jax.core import precise
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, PyTree, Targets
from proglora_jax.data import batch as segments
from proglora_jax.data import replay
from proglora_jax.methods.base import FROZEN, PROJECTOR, Cost, GateInputs, Passes, Phase, Probe, TaskInfo, pooled_delta
from proglora_jax.methods.rank_compression import compress
from proglora_jax.methods.rank_method import RankMethod
from proglora_jax.methods.rank_routing import of_ranks

POOL = ("pool", "shared", "projector_pool", "projector_shared")
NEWEST_FIRST = 10.0  # more than any score


@dataclasses.dataclass(frozen=True)
class PCLR(RankMethod):
    """y = W x + (alpha / top) sum over the chosen j of (x A_j) B_j + (alpha / shared) (x A_s) B_s in seven linears and the projector.

    The ranks of a layer (and of the mm_projector, whose own weights are frozen) have keys for text and image; the `top_ranks` whose keys
    score highest against a sample's query have gate 1, all others 0. The query is the unit mean of the word embeddings of BOS and
    instruction, and the unit class token. No task id at test.

    Learning: a task adds ranks with keys at the task's mean query; in training all of them are on (with fewer new ranks than `top_ranks`
    the best old ones too, one choice for the whole batch). L = CE + 0.2 (mean of 1 - cos between queries and new keys). Then the ranks
    join the pool. Compression, when the pool is full and a task is to come: every m-th rank of old and new part goes, with m such that the
    next task fits; the keys of what stays get the stored query of each task whose best ranks they are. Integration: the pool as it was is
    the teacher, kept ranks and the shared ones train on the current task's rows under the stored query of one task per step, drawn by the
    task's last loss; the loss is the KL over the teacher's 100 best words at temperature 2, at all positions. There is no cross-entropy.

    What the sources leave open, and what was chosen: the shared ranks take part while later tasks learn (they do at test); padding is
    left out of the KL's mean; scores are rounded to five digits and ties go to the lower index, because all new keys of a task begin equal
    and get equal gradients; the mean query comes from a sample of the rows. The ablations: integrate=False drops ranks without
    distillation (and has no shared ranks), progressive=False drops none before the last task, and then all at once.

    Cost: learning runs the new and shared ranks alone; the second phase runs teacher and student on each batch (two forward passes of
    all ranks, one backward) and holds a copy of the pool.

    The hyper-parameters are `RankMethod`'s.

    Source: PCLR (ICLR 2026) and its code.
    """

    name: ClassVar[str] = "pclr"
    gate_unit: ClassVar[str] = "ranks of"
    isolated_as: ClassVar[str] = "self"
    keeps_forward: ClassVar[bool] = False
    wants_image: ClassVar[bool] = True
    adapts_projector: ClassVar[bool] = True

    # ---- state

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """An empty pool and its keys, shared ranks (B = 0) and new ranks, for the linears and the projector."""
        size = max(turn.merged for turn in self.turns(total))
        params = {PROJECTOR: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), projector)}
        own = Targets(1, {name: tuple(leaf["kernel"].shape) for name, leaf in projector.items()}, targets.width)
        for prefix, where in (("", targets), ("projector_", own)):
            draw = lambda name, count: lowrank.init_block(trees.named_generator(seed, name, 0), where, count, self.a_init)  # noqa: B023
            ranks = {"block": draw(f"{prefix}block", self.rank), "shared": draw(f"{prefix}shared", self.shared_ranks),
                     "pool": lowrank.empty_pool(where, size, 1)}
            ranks = jax.tree.map(lambda leaf: leaf[0], ranks) if prefix else ranks  # the projector has no axis of layers
            params |= {prefix + name: leaf for name, leaf in ranks.items()}
        widths = {"text": targets.width, "image": projector["linear_1"]["kernel"].shape[0]}
        room = lambda count: {kind: jnp.zeros((targets.layers + 1, count, width), jnp.float32) for kind, width in widths.items()}
        params |= {"keys": room(size), "new_keys": room(self.rank)}
        memory = {
            "count": jnp.int32(0), "sharing": jnp.float32(0), "origin": jnp.zeros(size, jnp.int32),
            "queries": {kind: jnp.zeros((total, width), jnp.float32) for kind, width in widths.items()},
        }  # fmt: skip
        return CLState(params, memory, {}, jnp.int32(0))

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """New ranks, at random or near the task's mean query, with their keys at that query."""
        state = dataclasses.replace(state, stage=jnp.int32(info.index))
        rows = replay.replay_indices(info.size, min(self.query_samples or info.size, info.size), info.seed, info.name)
        seen = probe(state, rows)
        image = jnp.asarray(seen["image"]).sum(axis=0) / jnp.maximum(jnp.asarray(seen["shown"]).sum(), 1)
        query = {"text": jnp.asarray(seen["text"]).mean(axis=0), "image": image}
        params, count = state.params, self.turns(info.total)[info.index].before
        new = {kind: jnp.broadcast_to(mean, params["new_keys"][kind].shape) for kind, mean in query.items()}
        fresh = {"new_keys": new}
        if self.near_from and info.index + 1 >= self.near_from and count >= self.rank:
            score = self._scores(params, {kind: keys.unit(mean)[None] for kind, mean in query.items()})[:, 0]  # [L + 1, C]
            places = jax.lax.top_k(jnp.where(jnp.arange(score.shape[-1]) < count, jnp.round(score, keys.DIGITS), -jnp.inf), self.rank)[1]
            gather = lambda name, where: rank_pool.gather(params[name], where)
            fresh |= {"block": gather("pool", places[:-1]), "projector_block": gather("projector_pool", places[-1])}
        elif info.index:
            for name in ("block", "projector_block"):
                fresh[name] = lowrank.init_like(trees.named_generator(info.seed, name, info.index), params[name], self.a_init)
        return dataclasses.replace(state, params=params | fresh)

    def phases(self, info: TaskInfo) -> tuple[Phase, ...]:
        """Learning, and integration where the pool is compressed."""
        narrow = self.new_ranks(info.index) < self.rank
        learn = Phase("learn", "learn_narrow" if narrow else "learn")
        again = Phase("integrate", "integrate", cross_entropy=False, states=True, epochs=self.integrate_epochs,
                      batch_size=self.integrate_batch_size, learning_rate=self.integrate_learning_rate)
        return (learn, again) if self.integrate and self.turns(info.total)[info.index].every else (learn,)

    def trainable(self, info: TaskInfo) -> tuple[str, ...]:
        """In the first phase the new ranks and their keys."""
        del info
        return ("block", "projector_block", "new_keys")

    def phase_mask(self, state: CLState, info: TaskInfo, phase: Phase) -> dict[str, bool]:
        """In the phase "integrate" the kept and the shared ranks instead."""
        return trees.mask_by_prefix(state.params, POOL) if phase.kind == "integrate" else self.trainable_mask(state, info)

    def after_phase(self, state: CLState, info: TaskInfo, phase: Phase, probe: Probe) -> CLState:
        """After learning the new ranks join the pool, which is then compressed if it is full; after integration the teacher goes."""
        if phase.kind == "integrate":
            memory = {name: leaf for name, leaf in state.memory.items() if name != "teacher"}
            return dataclasses.replace(state, memory=memory, carry={k: v for k, v in state.carry.items() if k != "running"})
        turn, params, memory = self.turns(info.total)[info.index], state.params, dict(state.memory)
        at = slice(turn.before, turn.merged)
        joined = {name: rank_pool.put(params[name], params[name.replace("pool", "block")], turn.before, turn.new)
                  for name in ("pool", "projector_pool")}
        joined["keys"] = {kind: jnp.asarray(leaf).at[:, at].set(params["new_keys"][kind][:, : turn.new])
                          for kind, leaf in params["keys"].items()}
        mean = {kind: keys.unit(leaf[:, : turn.new].mean(axis=(0, 1))) for kind, leaf in params["new_keys"].items()}
        memory["queries"] = {kind: jnp.asarray(leaf).at[info.index].set(mean[kind]) for kind, leaf in memory["queries"].items()}
        memory |= {"count": jnp.int32(turn.merged), "origin": jnp.asarray(memory["origin"]).at[at].set(info.index)}
        state = dataclasses.replace(state, params=params | joined, memory=memory)
        return compress(self, state, info, turn, POOL) if turn.every else state

    # ---- gates

    def _scores(self, params: PyTree, query: PyTree) -> jax.Array:
        """f32[L + 1, B, C] scores of the pool's ranks against unit queries."""
        own = params["keys"]
        return keys.rank_scores(query["text"], query["image"], own["text"], own["image"], self.image_weight_of(params))

    def queries(self, inputs: GateInputs) -> dict[str, jax.Array]:
        """{"text": f32[B, D], "image": f32[B, Dv]} unit queries of a batch; BOS counts as text."""
        first = jnp.arange(inputs.segments.shape[1]) == 0
        return {
            "text": keys.text_query(inputs.embeddings, (inputs.segments == segments.INSTRUCTION) | first),
            "image": keys.image_query(inputs.image, inputs.image_mask),
        }

    def task_drawn(self, running: PyTree, draw: jax.Array, stage: jax.Array) -> jax.Array:
        """i32[] the task whose query a step of the integration uses, drawn by the tasks' weights."""
        weights = running["weights"]
        known = jnp.where(jnp.arange(weights.shape[0]) <= stage, weights, 0.0)
        return jax.random.categorical(trees.fold_in_name(draw, "task"), jnp.log(known))

    def _parts(self, params: PyTree, memory: PyTree, query: PyTree, allowed: jax.Array, first: jax.Array | None = None) -> PyTree:
        """Gates f32[L + 1, B, 1, R] of the pool and the shared ranks for unit queries; ranks marked `first` go before the others."""
        score = self._scores(params, query)
        chosen = keys.top_ranks(score if first is None else score + NEWEST_FIRST * first, allowed, self.top_ranks)
        return {"pool": self.scale * chosen[:, :, None], "shared": self._shared(params, memory)}

    def _shared(self, params: PyTree, memory: PyTree) -> jax.Array:
        gate = self.alpha / self.shared_ranks * memory["sharing"]
        return jnp.full((params["keys"]["text"].shape[0], 1, 1, lowrank.ranks_of(params["shared"])), gate)

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """Which ranks are on: by phase in training, at test the best of all for each sample."""
        valid = jnp.arange(memory["origin"].shape[0]) < memory["count"]
        one = jnp.ones((1, 1), jnp.float32)
        if not inputs.training:
            parts = self._parts(params, memory, self.queries(inputs), valid)
            by_task = jax.nn.one_hot(memory["origin"], memory["queries"]["text"].shape[0])
            shares = precise.einsum("lbr,rn->bn", parts["pool"][:, :, 0], by_task)
            return {"parts": parts, "blocks": shares / jnp.maximum(shares.sum(axis=1, keepdims=True), 1e-9)}
        if inputs.phase == "integrate":
            task = self.task_drawn(inputs.running, inputs.draw, inputs.stage)
            query = {kind: leaf[task][None] for kind, leaf in memory["queries"].items()}
            return {"parts": self._parts(params, memory, query, valid), "blocks": one}
        pools = params["keys"]["text"].shape[0]
        new, fill = self.learning(inputs.phase)
        own = (jnp.arange(self.rank) < new).astype(jnp.float32)
        parts = {"shared": self._shared(params, memory), "block": jnp.broadcast_to(self.scale * own, (pools, 1, 1, self.rank))}
        if fill:  # the best old ones of the whole batch fill up
            query = self.queries(inputs)
            score = self._scores(params, query).mean(axis=1)  # [L + 1, C]
            old = keys.top_ranks(score, valid, fill)
            parts["pool"] = self.scale * old[:, None, None]
        return {"parts": parts, "blocks": one}

    def adapter(self, params: PyTree, gates: PyTree, key: jax.Array | None) -> Adapter:
        """The adapter of the decoder; each layer takes its own gates."""
        leaves, own = rank_pool.pair(params, gates["parts"], "")
        rate = self.dropout if key is not None else 0.0
        layer = {name: gate[:-1] for name, gate in own.items()}
        if rate:
            layer["dropout_key"] = jax.random.split(key, own["new"].shape[0] - 1)
        return Adapter(leaves, layer, {}, partial(pooled_delta, scale=1.0, mix="delta", rate=rate), resting=FROZEN)

    def projector_adapter(self, params: PyTree, gates: PyTree) -> Adapter:
        """The adapter of the mm_projector, by the last of the pools."""
        leaves, own = rank_pool.pair(params, gates["parts"], "projector_")
        layer = {name: gate[-1] for name, gate in own.items()}
        return Adapter(leaves, layer, {}, partial(pooled_delta, scale=1.0, mix="delta", rate=0.0))

    # ---- losses

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """The keys' loss in learning, the divergence from the teacher in integration."""
        if inputs.phase == "integrate":
            loss = self._distillation(params, memory, inputs, passes)
            return loss, {"distillation": loss}
        (count, _), query = self.learning(inputs.phase), self.queries(inputs)
        near = lambda kind: precise.einsum("bd,lrd->blr", query[kind], keys.unit(params["new_keys"][kind][:, :count]))
        apart = lambda kind: 1.0 - near(kind).mean(axis=(1, 2))
        align = (apart("text") + apart("image") * inputs.image_mask).mean()
        return self.align_weight * align, {"align": align}

    def _distillation(self, params: PyTree, memory: PyTree, inputs: GateInputs, passes: Passes) -> jax.Array:
        teacher = jax.lax.stop_gradient(memory["teacher"])
        task = self.task_drawn(inputs.running, inputs.draw, inputs.stage)
        query = {kind: leaf[task][None] for kind, leaf in memory["queries"].items()}
        newest, old = teacher["newest"], jnp.arange(teacher["newest"].shape[0]) < teacher["count"]
        own = newest | (old & (newest.sum() < self.top_ranks))
        then = params | {name: teacher[name] for name in (*POOL, "keys")}
        parts = self._parts(then, teacher, query, jnp.where(task == inputs.stage, own, old & ~newest), newest)
        taught = passes.again(jax.lax.stop_gradient(then), {"parts": parts, "blocks": jnp.ones((1, 1), jnp.float32)})
        mask = inputs.segments != segments.PAD
        return distill.mean_top_divergence(
            passes.head, passes.student.states, taught.states, mask, self.top_words, self.distill_temperature)

    def update_running(self, running: PyTree, seen: PyTree, draw: jax.Array, stage: jax.Array) -> PyTree:
        """The drawn task's weight becomes the root of its loss."""
        if "distillation" not in seen:
            return running
        root = jnp.sqrt(jnp.maximum(seen["distillation"], 0.0) + 1e-4)
        return {"weights": running["weights"].at[self.task_drawn(running, draw, stage)].set(root)}

    def probe(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> dict[str, jax.Array]:
        """Queries of samples, and whether they have an image."""
        return self.queries(inputs) | {"shown": inputs.image_mask.astype(jnp.float32)}

    # ---- sizes, disk and export

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """Learning runs new and shared ranks (and old ones to fill up), integration the pool twice, and at test it runs alone."""
        new, pool, shared = (lowrank.ranks_of(params[name]) for name in ("block", "pool", "shared"))
        if phase is None or phase.kind == "integrate":
            taught = {"teacher": pool + shared, "words": "all", "whole": True} if phase else {}
            return Cost(0, pool + shared, pool + shared, **taught)
        return Cost(shared + (pool if self.learning(phase.kind)[1] else 0), new, new)

    def fill(self, params: PyTree, info: TaskInfo) -> dict[str, str]:
        """The ranks that the tasks before left."""
        before, size = self.turns(info.total)[info.index].before, lowrank.ranks_of(params["pool"])
        return dict.fromkeys(("pool", "projector_pool"), f"{before} of {size} ranks filled")

    def stored_parameters(self, state: CLState, info: TaskInfo) -> int:
        """Old ranks that no compression dropped, the task's own, and the shared ones from the first integration on; projector's too."""
        turns, params = self.turns(info.total), state.params
        own, shared = (trees.count_parameters((params[name], params[f"projector_{name}"])) for name in ("block", "shared"))
        return turns[info.index].merged * own // self.rank + shared * (self.integrate and any(turn.every for turn in turns[: info.index]))

    def to_disk(self, state: CLState):
        """The whole pool: an integration changes all of it."""
        return {"params": {name: state.params[name] for name in (*POOL, "keys", PROJECTOR)}, "memory": state.memory}

    def from_disk(self, tree, fresh: CLState, stage: int) -> CLState:
        """The pool as it was; new ranks are made when the next task starts."""
        return dataclasses.replace(fresh, params=fresh.params | tree["params"], memory=tree["memory"], stage=jnp.int32(stage))

    def blocks(self, state: CLState) -> int:
        """One set of ranks per task."""
        return int(state.stage) + 1

    def block(self, state: CLState, index: int) -> PyTree:
        """Not possible: a task's ranks in the decoder belong to those in the mm_projector."""
        raise ValueError(f"{self.name} has ranks in the mm_projector too, which no adapter of the language model can hold")

    def fold(self, state: CLState, task: int) -> PyTree:
        """Not possible: the ranks are chosen sample by sample."""
        raise ValueError(f"{self.name} cannot be folded into one adapter: its ranks are chosen by each sample's instruction and image")

    routing = of_ranks
