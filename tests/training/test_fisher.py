"""Squared gradients over training samples: the means that their definition says, row by row, on one device and on eight."""

from __future__ import annotations

import dataclasses
import functools

import harness
import jax
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees

NUMBERS = np.array([3, 9, 0, 7, 12, 30, 21, 5, 18, 2, 11, 29, 6, 14])
NAMES = ("block", "mm_projector/linear_2")


@functools.cache
def prepared(**shape):
    """LoRA in its second stage with every parameter moved, dropout on (the Fisher information must not see it)."""
    run = harness.Harness(harness.small("lora", dropout=0.3), shape=shape, backbone="stub")
    state, _ = run.begin(run.initial(), 0)
    state, _ = run.begin(state, 1)
    rng = np.random.default_rng(2)
    moved = lambda leaf: (np.array(leaf) + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return run, jax.tree.map(moved, state.params), state


@functools.cache
def gradient_of(numbers: tuple[int, ...]):
    """Gradient of the mean over supervised tokens of some rows, through the method's forward pass at test."""
    run, params, state = prepared()
    batch = tiny_llava.batch([run.rows(1)[i] for i in numbers])
    loss = lambda params: run.forward(params, state.memory, run.llava, batch, state.stage)["loss"]
    return trees.flatten(jax.tree.map(np.asarray, jax.grad(loss)(params)))


def by_hand(kind: str, size: int) -> dict[str, np.ndarray]:
    """The mean of squares by its definition, a batch or a row at a time."""
    step = size if kind == "batch" else 1
    parts = [tuple(NUMBERS[start : start + step]) for start in range(0, len(NUMBERS), step)]
    gradients = [gradient_of(part) for part in parts]
    return {path: np.mean([gradient[path] ** 2 for gradient in gradients], axis=0) for path in gradients[0]}


@pytest.mark.parametrize("shape", [{}, {"data": 4, "fsdp": 2}], ids=["one device", "eight devices"])
@pytest.mark.parametrize("kind, size", [("batch", 6), ("per_sample", 6)])
def test_squares_are_the_means_of_their_definition(kind, size, shape):
    """Fourteen rows in batches of six: the last batch has two rows, and eight devices must fill each up to eight."""
    _, params, state = prepared()
    run = prepared(**shape)[0]
    found = trees.flatten(run.probe.squared_gradients(dataclasses.replace(state, params=params), NUMBERS, size, kind, NAMES))
    expected = by_hand(kind, size)
    assert set(found) == {path for path in expected if path.startswith(NAMES)} and len(found) == 6
    for path, leaf in found.items():
        assert len(leaf.devices()) == run.mesh.size
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6 * expected[path].max(), err_msg=path)
    assert run.fisher_step(NAMES, kind)._cache_size() == 1


def test_the_two_kinds_differ_and_order_matters_to_batches_only():
    run, params, state = prepared()
    state = dataclasses.replace(state, params=params)
    ask = lambda numbers, kind: np.asarray(run.probe.squared_gradients(state, numbers, 6, kind, NAMES)["block"]["q_proj"]["b"])
    turned = np.roll(NUMBERS, 1)
    assert ask(NUMBERS, "per_sample").sum() > 1.5 * ask(NUMBERS, "batch").sum(), "a mean's square is less than the mean of squares"
    np.testing.assert_allclose(ask(turned, "per_sample"), ask(NUMBERS, "per_sample"), rtol=1e-4, atol=1e-9)
    assert np.abs(ask(turned, "batch") / ask(NUMBERS, "batch") - 1).max() > 0.01


def test_the_parameters_are_left_alone():
    run, params, state = prepared()
    before = trees.digest(params)
    placed = meshes.put_replicated(params, run.mesh)
    run.probe.squared_gradients(dataclasses.replace(state, params=placed), NUMBERS[:2], 2, "batch", ("block",))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(placed)) and trees.digest(params) == before
