"""The jitted programs: one training step for the whole sequence, the probe of training samples, and generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree
from proglora_jax.data.batch import INSTRUCTION
from proglora_jax.evaluation.generate import Generated, generate
from proglora_jax.methods.base import PROJECTOR, GateInputs, Method, Phase
from proglora_jax.methods.views import Pass, Passes
from proglora_jax.models.layers import gather_positions
from proglora_jax.training import losses, optim
from proglora_jax.training.processes import FAILED, FLAG
from proglora_jax.training.settings import TrainSettings

Batch = Mapping[str, jax.Array]
Remat = str | Mapping[int, str]
"""A rematerialisation policy by name, or one for each padded length."""


def policy_at(remat: Remat, batch: Batch) -> str:
    """The policy for a batch."""
    return remat if isinstance(remat, str) else remat[batch["tokens"].shape[1]]


def gate_inputs(llava: Any, method: Method, x: jax.Array, batch: Batch, stage: jax.Array, **known: Any) -> GateInputs:
    """What the method's gates may see of a batch; `known` are further fields of GateInputs."""
    segments = batch["segments"]
    if batch.get("new_token"):  # one generated token on its own: it is all the instruction there is
        segments = jnp.full(x.shape[:2], INSTRUCTION, segments.dtype)
    routed = llava.hidden_after(x, method.routing_layer) if method.routing_layer else None
    known = {"progress": jnp.float32(1), "training": False} | known
    return GateInputs(x, segments, batch["task_id"], stage, routed=routed, image_mask=batch.get("image_mask"), **known)


class Sight(NamedTuple):
    """A batch as a method sees it.

    Attributes:
        inputs: what its gates see; the embeddings have image features in place.
        gates: what it makes of them.
        features: [B, P, Dv] of the vision tower.
    """

    inputs: GateInputs
    gates: PyTree
    features: jax.Array


def look(llava: Any, method: Method, params: PyTree, memory: PyTree, batch: Batch, stage: jax.Array, **known: Any) -> Sight:
    """Runs the vision tower, the projector and the method's gates; `known` as for `gate_inputs`."""
    if method.wants_image:
        features, known["image"] = llava.image_parts(batch["image"])
    else:
        features = llava.encode_image(batch["image"])
    return _see(llava, method, params, memory, features, batch, stage, None, known)


def _see(llava, method, params, memory, features, batch, stage, gates, known) -> Sight:
    """The rest of `look` from the tower's features on; `gates` stand in for the method's own."""
    if method.adapts_projector:  # its gates cannot depend on what they change
        if gates is None:
            gates = method.gates(params, memory, gate_inputs(llava, method, llava.embed(batch["tokens"], None), batch, stage, **known))
        adapter = method.projector_adapter(params, gates)
        x = llava.embed(batch["tokens"], llava.project(features, params[PROJECTOR], adapter))
    else:
        x = llava.embed(batch["tokens"], llava.project(features, params[PROJECTOR]))  # [B, T, D]
    inputs = gate_inputs(llava, method, x, batch, stage, **known)
    return Sight(inputs, method.gates(params, memory, inputs) if gates is None else gates, features)


def batch_losses(
    llava: Any, method: Method, remat: Remat, params: PyTree, memory: PyTree, batch: Batch, scale: jax.Array, control: PyTree, share: float,
    phase: Phase = Phase(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of some rows of a batch.

    Args:
        llava: the frozen backbone.
        method: the method.
        remat: rematerialisation policy, see `Remat`.
        params: all parameters of the state.
        memory: the method's memory.
        batch: rows of a Batch.
        scale: f32[B] from `losses.row_scales`.
        control: {"stage": i32[], "progress": f32[], "key": PRNG key} and, where there are, "draw" and "running" of GateInputs.
        share: share of the whole batch's rows, the weight of the extra loss.
        phase: what the loss consists of.

    Returns:
        (f32[] summed loss, {"ce": f32[] where it counts, ...what the extra loss logs}).
    """
    stage, seen = control["stage"], {"phase": phase.kind, "running": control.get("running", {})}
    sight = look(llava, method, params, memory, batch, stage, progress=control["progress"], training=True, draw=control.get("draw"), **seen)
    inputs, gates = sight.inputs, sight.gates
    student = _label_pass(
        llava, method, remat, params, gates, inputs.embeddings, batch, trees.fold_in_name(control["key"], "dropout"), phase)
    nll = losses.token_nll(student.logits, batch["labels"], batch["label_mask"])
    ce = (nll.sum(axis=1) * scale).sum()

    def again(params: PyTree, gates: PyTree | None = None, key: jax.Array | None = None) -> Pass:
        other = _see(llava, method, params, memory, sight.features, batch, stage, gates, {"image": inputs.image, "phase": phase.kind})
        return _label_pass(llava, method, remat, params, other.gates, other.inputs.embeddings, batch, key, phase)

    passes = Passes(student, batch["labels"], batch["label_mask"], scale / share, llava.logits, again)
    extra, logged = method.extra_loss(params, memory, inputs, trees.fold_in_name(control["key"], "extra"), passes)
    blocks = gates["blocks"]
    if blocks.shape[-1] > 1:  # how much of a training sample the newest block gets
        logged = logged | {"newest_gate": jnp.take(blocks, stage, axis=1).mean()}
    logged = {name: share * value for name, value in logged.items()}
    return (ce + share * extra, {"ce": ce} | logged) if phase.cross_entropy else (share * extra, logged)


def _label_pass(llava, method, remat, params, gates, x, batch, key, phase) -> Pass:
    """The backbone with the method's adapter on embeddings x[B, T, D]; scores at the label positions."""
    options = dict(adapter=method.adapter(params, gates, key), remat=policy_at(remat, batch))
    if not phase.states:
        hidden = llava.decode(x, positions=batch["label_index"], **options).hidden  # [B, K, D]
        return Pass(None, hidden, llava.logits(hidden))
    states = llava.decode(x, **options).hidden
    hidden = gather_positions(states, batch["label_index"])
    return Pass(states, hidden, llava.logits(hidden))


def make_train_step(
    method: Method, train: TrainSettings, remat: Remat, separate_replay: bool, mesh: Mesh, phase: Phase = Phase(),
    options: Mapping[str, Any] | None = None,
) -> Callable:
    """The training step of a kind of phase in a whole sequence: compiled once, since stage, step and learning rates are arguments.

    Args:
        method, train, remat, mesh, phase: of the run.
        separate_replay: whether replayed rows are a mean of their own.
        options: of the compiler, see `loop_choice.compiler_options`.

    Returns:
        (trainable, opt_state, frozen, memory, llava, batch, control) -> (trainable, opt_state, metrics); the first two are
        donated. `control` is {"stage": i32[], "step": i32[], "progress": f32[], "key": key, "rates": {group: f32[]}}, and "running",
        the statistics that the step updates: those after it are in the metrics under that name. In a phase on features the batch
        holds these alone.
    """
    if phase.features:
        return _make_feature_step(method, train, mesh)

    optimizer = optim.transform(train)

    def loss_and_gradients(trainable, frozen, memory, llava, batch, control):
        norm, group = train.loss_norm, losses.group_rows(batch["label_mask"].shape[0], train.loss_groups, train.loss_group_size)
        separate = batch["task_id"] != control["stage"] if separate_replay else None
        scale = losses.row_scales(batch["label_mask"], batch["weight"], norm, group, separate)
        parts, share = train.micro_batches, 1.0 / train.micro_batches

        def loss(trainable, rows, scale, key):
            params = trees.merge(frozen, trainable)
            return batch_losses(llava, method, remat, params, memory, rows, scale, control | {"key": key, "draw": draw}, share, phase)

        gradient = jax.value_and_grad(loss, has_aux=True)
        key = draw = jax.random.fold_in(control["key"], control["step"])
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
        before, (batch, flag) = (trainable, opt_state), without_flag(batch)
        (loss, logged), gradients = loss_and_gradients(trainable, frozen, memory, llava, batch, control)
        trainable, opt_state = _update(method, optimizer, gradients, trainable, opt_state, memory, control)
        tokens = batch["label_mask"].sum()
        metrics = logged | {"loss": loss, "grad_norm": optim.global_norm(gradients), "supervised_tokens": tokens}
        return _unless_failed(flag, before, control, trainable, opt_state, metrics | _running(method, control, logged))

    same = meshes.replicated(mesh)
    return jax.jit(
        meshes.on_mesh(step, mesh), donate_argnums=(0, 1), out_shardings=(same, same, same), compiler_options=options and dict(options))


def without_flag(batch: Batch) -> tuple[Batch, jax.Array | None]:
    """A batch without its rows' flags, and the largest of all processes' flags; None in a run of one process, which has none."""
    if FLAG not in batch:
        return batch, None
    return {name: value for name, value in batch.items() if name != FLAG}, batch[FLAG].max()


def _unless_failed(flag, before, control, trainable, opt_state, metrics) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """What a step returns; one in which a process had no rows is undone, the running statistics too."""
    if flag is None:
        return trainable, opt_state, metrics
    keep = lambda old, new: jnp.where(flag == FAILED, old, new)
    trainable, opt_state = jax.tree.map(keep, before, (trainable, opt_state))
    if "running" in metrics:
        metrics = metrics | {"running": jax.tree.map(keep, control["running"], metrics["running"])}
    return trainable, opt_state, metrics | {FLAG: flag}


def _make_feature_step(method: Method, train: TrainSettings, mesh: Mesh) -> Callable:
    """As `make_train_step`, for a phase on features."""
    optimizer = optim.transform(train)

    def step(trainable, opt_state, frozen, memory, llava, batch, control):
        del llava
        before, (batch, flag) = (trainable, opt_state), without_flag(batch)

        def loss(trainable):
            total, logged, seen = method.feature_loss(trees.merge(frozen, trainable), memory, batch["features"], control["stage"])
            return total, (logged, seen)

        (total, (logged, seen)), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        trainable, opt_state = _update(method, optimizer, gradients, trainable, opt_state, memory, control)
        metrics = logged | {"loss": total, "grad_norm": optim.global_norm(gradients)}
        return _unless_failed(flag, before, control, trainable, opt_state, metrics | _running(method, control, seen))

    same = meshes.replicated(mesh)
    return jax.jit(meshes.on_mesh(step, mesh), donate_argnums=(0, 1), out_shardings=(same, same, same))


def _update(method, optimizer, gradients, trainable, opt_state, memory, control) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state after a step."""
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    return optax.apply_updates(trainable, optim.apply_rates(updates, method, control["rates"], memory)), opt_state


def _running(method: Method, control: PyTree, seen: PyTree) -> dict[str, PyTree]:
    """{"running": statistics after a step} where the phase has any."""
    running = control.get("running", {})
    if not running:
        return {}
    return {"running": method.update_running(running, seen, jax.random.fold_in(control["key"], control["step"]), control["stage"])}


def make_probe(method: Method, mesh: Mesh) -> Callable:
    """(params, memory, llava, batch, stage) -> what `Method.probe` returns for the rows of a batch, on every device."""

    def probe(params, memory, llava, batch, stage):
        sight = look(llava, method, params, memory, batch, stage, probing=True)
        inputs = sight.inputs
        if method.gates_in_layers or method.observes:
            x, adapter = inputs.embeddings, method.adapter(params, sight.gates, None)
            inputs = dataclasses.replace(inputs, contexts=llava.decode(x, adapter=adapter, cache_size=x.shape[1]).contexts)
        return method.probe(params, memory, inputs)

    return jax.jit(meshes.on_mesh(probe, mesh), out_shardings=meshes.replicated(mesh))


def make_generator(method: Method, mesh: Mesh, max_new_tokens: int, eos_id: int, pad_id: int, vocab_limit: int) -> Callable:
    """(params, memory, llava, batch, stage) -> answers of all processes' rows; gates are computed once, from the prompt.

    The answers are {"tokens": i32[B, N], "count": i32[B], "hit_cap": bool[B], "gates": f32[B, M], "example": i32[B], "valid": bool[B]}.
    """

    def answer(params, memory, llava, batch, stage) -> dict[str, jax.Array]:
        batch, flag = without_flag(batch)
        sight = look(llava, method, params, memory, batch, stage)

        def make_adapter(x, rows):
            gates = sight.gates  # those of the prompt, which are recorded
            if "new_token" in rows:
                gates = method.gates(params, memory, gate_inputs(llava, method, x, rows, stage, image=sight.inputs.image))
            return method.adapter(params, gates, None)

        out = generate(
            llava, batch, make_adapter, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id,
            vocab_limit=vocab_limit, embedded=sight.inputs.embeddings, regate=method.regates,
        )
        return answers_of(method, sight.gates, out, batch, flag)

    return jax.jit(meshes.on_mesh(answer, mesh), out_shardings=meshes.replicated(mesh))


def answers_of(method: Method, gates: PyTree, out: Generated, batch: Batch, flag: jax.Array | None) -> dict[str, jax.Array]:
    """What `make_generator` says its program returns."""
    blocks = method.shown_gates(gates, out.contexts)
    return {
        "tokens": out.tokens, "count": out.count, "hit_cap": out.hit_cap, "example": batch["example"], "valid": batch["valid"],
        "gates": jnp.broadcast_to(blocks, (batch["tokens"].shape[0], blocks.shape[-1])),
    } | ({} if flag is None else {FLAG: flag})
