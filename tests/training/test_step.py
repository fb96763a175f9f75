"""The training step on the stand-in backbone: what it minimises, how rows are averaged and split."""

from __future__ import annotations

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stub_llava
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data.batch import ANSWER
from proglora_jax.training import loop

TRAIN = dataclasses.replace(harness.TRAIN, beta1=0.9, epsilon=1e-3)
KINDS = [(5, 1, True), (2, 3, True), (3, 2, False), (4, 0, True), (2, 1, True), (6, 3, True), (2, 2, False), (3, 1, True)]


@functools.cache
def batch(**changed):
    """Eight rows with 2, 4, 3, 0, ... supervised tokens, some without an image, tasks 0 and 1 in turn."""
    rng = np.random.default_rng(4)
    rows = [tiny_llava.row(rng, i % 2, words=words, answer=answer, image=image) for i, (words, answer, image) in enumerate(KINDS)]
    return tiny_llava.batch(rows) | changed


@functools.cache
def prepared(name: str, dropout: float = 0.0, stage: int = 1):
    """A harness and a state of a method in its second stage, every parameter moved at random."""
    run = harness.Harness(harness.small(name, dropout=dropout), backbone="stub", train=TRAIN)
    state, _ = run.begin(run.method.end_task(run.begin(run.initial(), 0)[0], run.info(0), run.probe), 1)
    rng = np.random.default_rng(2)
    moved = lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    state = dataclasses.replace(state, params=jax.tree.map(moved, jax.tree.map(np.array, state.params)))
    return run, state, run.method.trainable_mask(state, run.info(stage))


def one_step(run, state, mask, rows, *, train=None, separate=False, control=None):
    """Runs one step: (metrics, gradients as Adam's first moment tells them, new trainable parameters)."""
    run = run if train is None else dataclasses.replace(run, train=train)
    trainable, frozen = trees.partition(state.params, mask)
    begin = loop.start_phase(jax.tree.map(np.array, trainable), run.train, run.mesh)
    frozen, memory = meshes.put_replicated((frozen, state.memory), run.mesh)
    control = run.control(1, 0, 10) | (control or {})
    after, optimizer, metrics = run.step(separate)(
        begin.trainable, begin.optimizer, frozen, memory, run.llava, meshes.put_batch(rows, run.mesh), control)
    adam = next(part for part in optimizer if isinstance(part, optax.ScaleByAdamState))
    gradients = {path: np.asarray(leaf) / 0.1 for path, leaf in trees.flatten(adam.mu).items()}
    return {name: float(value) for name, value in metrics.items()}, gradients, trees.flatten(after)


def naive_rows(params, rows):
    """Summed loss f32[B] of each row from the scores of the whole sequence, shifted by one; LoRA as merged kernels."""
    llava = stub_llava.stub()
    features = llava.project(llava.encode_image(rows["image"]), params["mm_projector"])
    layers = dict(llava.layers)
    for name, leaf in params["block"].items():
        layers[name] = layers[name] + 2.0 * jnp.einsum("lir,lro->lio", leaf["a"], leaf["b"])
    hidden = dataclasses.replace(llava, layers=layers).decode(llava.embed(rows["tokens"], features)).hidden
    scores = jax.nn.log_softmax(llava.logits(hidden))[:, :-1]
    nll = -jnp.take_along_axis(scores, rows["tokens"][:, 1:, None], axis=-1)[..., 0]
    return (nll * (rows["segments"][:, 1:] == ANSWER)).sum(1)


def naive_groups(params, rows, groups):
    """Mean over groups of rows of their mean over supervised tokens, weighted by row."""
    sums, counts = naive_rows(params, rows) * rows["weight"], (rows["segments"] == ANSWER).sum(1)
    return jnp.mean(jnp.stack([sums[group].sum() / counts[group].sum() for group in groups]))


@pytest.mark.parametrize("norm,groups", [("global_token_mean", [range(8)]), ("micro_batch_mean", [range(0, 4), range(4, 8)])])
def test_loss_and_gradients_are_those_of_the_whole_sequence(norm, groups):
    run, state, mask = prepared("lora")
    train = dataclasses.replace(TRAIN, loss_norm=norm, loss_group_size=4)
    rows = batch() | {"weight": np.float32([1, 2, 1, 1, 0.5, 1, 1, 3])}
    metrics, gradients, after = one_step(run, state, mask, rows, train=train)
    function = jax.jit(jax.value_and_grad(lambda params: naive_groups(params, rows, [np.array(group) for group in groups])))
    value, expected = function(state.params)
    np.testing.assert_allclose([metrics["loss"], metrics["ce"]], value, rtol=1e-5)
    expected = trees.flatten(expected)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-3, atol=2e-6 + 1e-5 * np.abs(expected[path]).max(), err_msg=path)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in expected.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["supervised_tokens"] == batch()["label_mask"].sum() == sum(answer + bool(answer) for _, answer, _ in KINDS)
    # Adam's first step is -rate * g / (|g| + epsilon), with the rate of the leaf's group.
    for path, rate in (("block/q_proj/a", 1e-2), ("mm_projector/linear_2/kernel", 1e-3)):
        step = rate * gradients[path] / (np.abs(gradients[path]) + 1e-3)
        np.testing.assert_allclose(after[path], trees.flatten(state.params)[path] - step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name,norm,size,splits", [
    ("proglora_dynamic", "global_token_mean", 8, (1, 4)), ("lora", "micro_batch_mean", 4, (1, 2, 8))])  # fmt: skip
def test_parts_of_a_batch_add_up_to_the_whole(name, norm, size, splits):
    """Under unequal token counts, with rows of other tasks, a row without an answer, and (where there is one) the recall loss."""
    run, state, mask = prepared(name)
    rows = batch() | {"weight": np.float32([1, 2, 1, 1, 0.5, 1, 1, 3])}
    whole = None
    for parts in splits:
        train = dataclasses.replace(TRAIN, loss_norm=norm, loss_group_size=size, micro_batches=parts)
        metrics, gradients, _ = one_step(run, state, mask, rows, train=train)
        assert name == "lora" or metrics["recall"] > 0.01
        whole = whole or (metrics, gradients)
        for metric, value in metrics.items():
            np.testing.assert_allclose(value, whole[0][metric], rtol=1e-5, err_msg=f"{metric} in {parts} parts")
        for path, gradient in gradients.items():
            np.testing.assert_allclose(gradient, whole[1][path], rtol=1e-4, atol=1e-6, err_msg=f"{path} in {parts} parts")


def test_replayed_rows_have_a_mean_of_their_own():
    run, state, mask = prepared("lora")
    weight = np.where(batch()["task_id"] == 1, 1.0, 2.0).astype(np.float32)
    rows = batch() | {"weight": weight}
    metrics, _, _ = one_step(run, state, mask, rows, separate=True)
    sums, counts = np.asarray(jax.jit(lambda params: naive_rows(params, rows))(state.params)), rows["label_mask"].sum(1)
    own = rows["task_id"] == 1  # the stage is 1
    expected = sums[own].sum() / counts[own].sum() + 2.0 * sums[~own].sum() / counts[~own].sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(one_step(run, state, mask, rows)[0]["loss"] - expected) > 0.01


def test_rows_without_answer_or_image_do_no_harm():
    run, state, mask = prepared("lora")
    metrics, gradients, _ = one_step(run, state, mask, batch())
    assert np.isfinite(metrics["loss"]) and not batch()["label_mask"][3].any()
    noise = np.random.default_rng(0).standard_normal(batch()["image"].shape).astype(np.float32)
    # Pixels of rows without image positions, everything in the row without an answer, and all padding are free to change.
    image = np.where(batch()["image_mask"][:, None, None, None], batch()["image"], noise)
    image[3], tokens = noise[3], batch()["tokens"].copy()
    tokens[3] = np.roll(tokens[3], 1)
    tokens = np.where(np.arange(tokens.shape[1]) >= batch()["length"][:, None], 7, tokens)
    again, same, _ = one_step(run, state, mask, batch() | {"image": image, "tokens": tokens})
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-6)
    for path in gradients:
        np.testing.assert_allclose(same[path], gradients[path], rtol=1e-4, atol=1e-6, err_msg=path)
    image[0] = noise[0]
    assert abs(one_step(run, state, mask, batch() | {"image": image})[0]["loss"] - metrics["loss"]) > 1e-3
    unsupervised = batch() | {"label_mask": np.zeros_like(batch()["label_mask"])}
    metrics, gradients, _ = one_step(run, state, mask, unsupervised)
    assert metrics["loss"] == 0 and not any(np.any(gradient) for gradient in gradients.values())


def test_dropout_follows_the_step_and_rates_of_zero_move_nothing():
    run, state, mask = prepared("lora", dropout=0.5)
    losses = [one_step(run, state, mask, batch(), control={"step": np.int32(step)})[0]["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1] and abs(losses[2] - losses[0]) > 1e-4
    plain = prepared("lora")
    assert abs(one_step(*plain, batch())[0]["loss"] - losses[0]) > 1e-4
    rates = {name: np.float32(0) for name in ("adapter", "gate", "mm_projector")}
    _, gradients, after = one_step(run, state, mask, batch(), control={"rates": rates})
    assert all(np.array_equal(after[path], trees.flatten(state.params)[path]) for path in gradients)
