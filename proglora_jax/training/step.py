"""The jitted programs: one training step for the whole sequence, the probe of training samples, and generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree
from proglora_jax.data.batch import INSTRUCTION
from proglora_jax.evaluation.generate import generate
from proglora_jax.methods.base import PROJECTOR, GateInputs, Method
from proglora_jax.training import losses, optim
from proglora_jax.training.processes import FAILED, FLAG
from proglora_jax.training.settings import TrainSettings

Batch = Mapping[str, jax.Array]


def embed_batch(llava: Any, params: PyTree, batch: Batch) -> jax.Array:
    """Input embeddings [B, T, D] of a batch, images through the frozen tower and the state's projector."""
    features = llava.project(llava.encode_image(batch["image"]), params[PROJECTOR])
    return llava.embed(batch["tokens"], features)


def gate_inputs(llava: Any, method: Method, x: jax.Array, batch: Batch, stage: jax.Array, progress=1.0, training=False) -> GateInputs:
    """What the method's gates may see of a batch."""
    segments = batch["segments"]
    if batch.get("new_token"):  # one generated token on its own: it is all the instruction there is
        segments = jnp.full(x.shape[:2], INSTRUCTION, segments.dtype)
    routed = llava.hidden_after(x, method.routing_layer) if method.routing_layer else None
    return GateInputs(x, segments, batch["task_id"], stage, jnp.float32(progress), training, routed)


def batch_losses(
    llava: Any, method: Method, remat: str, params: PyTree, memory: PyTree, batch: Batch, scale: jax.Array, control: PyTree, share: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of some rows of a batch.

    Args:
        llava: the frozen backbone.
        method: the method.
        remat: rematerialisation policy.
        params: all parameters of the state.
        memory: the method's memory.
        batch: rows of a Batch.
        scale: f32[B] from `losses.row_scales`.
        control: {"stage": i32[], "progress": f32[], "key": PRNG key}.
        share: share of the whole batch's rows, the weight of the extra loss.

    Returns:
        (f32[] summed loss, {"ce": f32[], ...what the extra loss logs}).
    """
    x = embed_batch(llava, params, batch)  # [B, T, D]
    inputs = gate_inputs(llava, method, x, batch, control["stage"], control["progress"], training=True)
    gates = method.gates(params, memory, inputs)
    adapter = method.adapter(params, gates, trees.fold_in_name(control["key"], "dropout"))
    hidden = llava.decode(x, adapter=adapter, remat=remat).hidden
    logits = llava.logits(losses.gather_positions(hidden, batch["label_index"]))  # [B, K, V]
    nll = losses.token_nll(logits, batch["labels"], batch["label_mask"])
    ce = (nll.sum(axis=1) * scale).sum()
    extra, logged = method.extra_loss(params, memory, inputs, trees.fold_in_name(control["key"], "extra"))
    blocks = gates["blocks"]
    if blocks.shape[-1] > 1:  # how much of a training sample the newest block gets
        logged = logged | {"newest_gate": jnp.take(blocks, control["stage"], axis=1).mean()}
    logged = {name: share * value for name, value in logged.items()}
    return ce + share * extra, {"ce": ce} | logged


def make_train_step(method: Method, train: TrainSettings, remat: str, separate_replay: bool, mesh: Mesh) -> Callable:
    """The training step of a whole sequence: compiled once, since stage, step and learning rates are arguments.

    Returns:
        (trainable, opt_state, frozen, memory, llava, batch, control) -> (trainable, opt_state, metrics); the first two are
        donated. `control` is {"stage": i32[], "step": i32[], "progress": f32[], "key": key, "rates": {group: f32[]}}.
    """
    optimizer = optim.transform(train)

    def loss_and_gradients(trainable, frozen, memory, llava, batch, control):
        norm, group = train.loss_norm, losses.group_rows(batch["label_mask"].shape[0], train.loss_groups, train.loss_group_size)
        separate = batch["task_id"] != control["stage"] if separate_replay else None
        scale = losses.row_scales(batch["label_mask"], batch["weight"], norm, group, separate)
        parts, share = train.micro_batches, 1.0 / train.micro_batches

        def loss(trainable, rows, scale, key):
            params = trees.merge(frozen, trainable)
            return batch_losses(llava, method, remat, params, memory, rows, scale, control | {"key": key}, share)

        gradient = jax.value_and_grad(loss, has_aux=True)
        key = jax.random.fold_in(control["key"], control["step"])
        if parts == 1:
            return gradient(trainable, dict(batch), scale, key)
        # Each device keeps its own rows: consecutive rows go to different parts.
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), (dict(batch), scale))

        def accumulate(total, part):
            index, (rows, scale) = part[0], meshes.split_rows(part[1])
            return jax.tree.map(jnp.add, total, gradient(trainable, rows, scale, jax.random.fold_in(key, index))), None

        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                            jax.eval_shape(gradient, trainable, *jax.tree.map(lambda leaf: leaf[0], split), key))
        return jax.lax.scan(accumulate, zero, (jnp.arange(parts), split))[0]

    def step(trainable, opt_state, frozen, memory, llava, batch, control):
        before, (batch, flag) = (trainable, opt_state), _without_flag(batch)
        (loss, logged), gradients = loss_and_gradients(trainable, frozen, memory, llava, batch, control)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        trainable = optax.apply_updates(trainable, optim.apply_rates(updates, method, control["rates"]))
        tokens = batch["label_mask"].sum()
        metrics = logged | {"loss": loss, "grad_norm": optim.global_norm(gradients), "supervised_tokens": tokens}
        if flag is not None:  # a step in which a process had no rows is undone
            keep = lambda old, new: jnp.where(flag == FAILED, old, new)
            trainable, opt_state = jax.tree.map(keep, before, (trainable, opt_state))
            metrics[FLAG] = flag
        return trainable, opt_state, metrics

    same = meshes.replicated(mesh)
    return jax.jit(meshes.on_mesh(step, mesh), donate_argnums=(0, 1), out_shardings=(same, same, same))


def _without_flag(batch: Batch) -> tuple[Batch, jax.Array | None]:
    """A batch without its rows' flags, and the largest of all processes' flags; None in a run of one process, which has none."""
    if FLAG not in batch:
        return batch, None
    return {name: value for name, value in batch.items() if name != FLAG}, batch[FLAG].max()


def make_probe(method: Method, mesh: Mesh) -> Callable:
    """(params, memory, llava, batch, stage) -> what `Method.probe` returns for the rows of a batch, on every device."""

    def probe(params, memory, llava, batch, stage):
        x = embed_batch(llava, params, batch)
        inputs = gate_inputs(llava, method, x, batch, stage)
        if method.gates_in_layers:
            adapter = method.adapter(params, method.gates(params, memory, inputs), None)
            contexts = llava.decode(x, adapter=adapter, cache_size=x.shape[1]).contexts
            inputs = dataclasses.replace(inputs, contexts=contexts)
        return method.probe(params, memory, inputs)

    return jax.jit(meshes.on_mesh(probe, mesh), out_shardings=meshes.replicated(mesh))


def make_generator(method: Method, mesh: Mesh, max_new_tokens: int, eos_id: int, pad_id: int, vocab_limit: int) -> Callable:
    """(params, memory, llava, batch, stage) -> answers of all processes' rows; gates are computed once, from the prompt.

    The answers are {"tokens": i32[B, N], "count": i32[B], "hit_cap": bool[B], "gates": f32[B, M], "example": i32[B], "valid": bool[B]}.
    """

    def answer(params, memory, llava, batch, stage) -> dict[str, jax.Array]:
        seen, (batch, flag) = {}, _without_flag(batch)

        def make_adapter(x, rows):
            gates = method.gates(params, memory, gate_inputs(llava, method, x, rows, stage))
            seen.setdefault("gates", gates)  # those of the prompt are recorded
            return method.adapter(params, gates, None)

        out = generate(
            llava, batch, make_adapter, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id,
            vocab_limit=vocab_limit, projector=params[PROJECTOR], regate=method.regates,
        )
        blocks = seen["gates"]["blocks"] if not method.gates_in_layers else out.contexts["blocks"].mean(axis=0)
        return {
            "tokens": out.tokens, "count": out.count, "hit_cap": out.hit_cap, "example": batch["example"], "valid": batch["valid"],
            "gates": jnp.broadcast_to(blocks, (batch["tokens"].shape[0], blocks.shape[-1])),
        } | ({} if flag is None else {FLAG: flag})

    return jax.jit(meshes.on_mesh(answer, mesh), out_shardings=meshes.replicated(mesh))
