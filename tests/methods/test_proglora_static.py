"""ProgLoRA (static): the table of weights, which blocks a task uses, what is replayed and how, folding, restarts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world
import tiny_llava

from proglora_jax.core import tree as trees
from proglora_jax.methods.proglora_static import ProgLoRAStatic


def static(**fields) -> ProgLoRAStatic:
    return ProgLoRAStatic(**(dict(rank=2, alpha=4.0, recall_per_task=40) | fields))


def delta(method, state, batch, x, *, training=False):
    """What the adapter adds to q_proj in the first layer."""
    gates = method.gates(state.params, state.memory, world.inputs(batch, int(state.stage), training=training))
    adapter = method.adapter(state.params, gates, None)
    leaves = {key: leaf[0] for key, leaf in adapter.leaves["q_proj"].items()}
    return np.asarray(adapter.delta(("q_proj",), {"q_proj": leaves}, {}, adapter.gates, jnp.asarray(x))[0])


def blocks(state, method):
    """(A, B) of q_proj in the first layer for every block so far."""
    pool, new = state.params["pool"]["q_proj"], state.params["block"]["q_proj"]
    cut = [slice(method.rank * n, method.rank * (n + 1)) for n in range(int(state.stage))]
    old = [(np.asarray(pool["a"])[0][:, at], np.asarray(pool["b"])[0][at]) for at in cut]
    return [*old, (np.asarray(new["a"])[0], np.asarray(new["b"])[0])]


@pytest.mark.parametrize("weights,expected", [
    ("similarity", [[1, 0, 0], [0.75, 1, 0], [0.5, 0.75, 1]]), ("ones", [[1, 0, 0], [1, 1, 0], [1, 1, 1]])])  # fmt: skip
@pytest.mark.parametrize("pool_chunk", [0, 1, 2, 5])
def test_each_task_has_its_row_and_uses_blocks_up_to_its_own(rng, weights, expected, pool_chunk):
    method = static(weights=weights, pool_chunk=pool_chunk)
    state = world.stages(method, 3)
    np.testing.assert_allclose(state.memory["weights"], expected)
    x = rng.standard_normal((2, 3, world.WIDTH)).astype(np.float32)
    for task in range(3):
        batch = world.batch_of(task, 2)
        np.testing.assert_allclose(world.gates(method, state, batch), [expected[task]] * 2)
        merged = sum(weight * a @ b for weight, (a, b) in zip(expected[task], blocks(state, method)))
        np.testing.assert_allclose(delta(method, state, batch, x), method.scale * x @ merged, rtol=1e-4, atol=1e-5)


def test_rows_and_answers_of_a_task_stay_as_they_were(rng):
    """Adding tasks changes neither the weights of an earlier one nor what its samples run through."""
    method = static()
    states = [world.stages(method, count) for count in (1, 2, 3)]
    x = rng.standard_normal((2, 3, world.WIDTH)).astype(np.float32)
    for task, then in enumerate(states):
        for later in states[task:]:
            np.testing.assert_array_equal(later.memory["weights"][task], then.memory["weights"][task])
            batch = world.batch_of(task, 2)
            np.testing.assert_allclose(delta(method, later, batch, x), delta(method, then, batch, x), rtol=1e-4, atol=1e-5)


def test_a_batch_may_mix_tasks_at_test(rng):
    method = static()
    state = world.stages(method, 3)
    rows = [tiny_llava.row(rng, task) for task in (2, 0, 1)]
    np.testing.assert_allclose(world.gates(method, state, tiny_llava.batch(rows)), [[0.5, 0.75, 1], [1, 0, 0], [0.75, 1, 0]])


@pytest.mark.parametrize("block,old", [("current", [0.5, 0.75, 1]), ("own_task", [1, 0, 0])])
def test_replayed_rows_run_through_the_block_that_the_flag_says(rng, block, old):
    method = static(replay_block=block)
    state = world.begin(method, world.stages(method, 2), 2)
    batch = tiny_llava.batch([tiny_llava.row(rng, 2), tiny_llava.row(rng, 0, weight=2.0)])
    np.testing.assert_allclose(world.gates(method, state, batch, training=True), [[0.5, 0.75, 1], old])
    np.testing.assert_allclose(world.gates(method, state, batch), [[0.5, 0.75, 1], [1, 0, 0]])  # at test always their own

    def loss(free):
        params = state.params | {"block": free}
        gates = method.gates(params, state.memory, world.inputs(batch, 2, training=True))
        adapter = method.adapter(params, gates, None)
        x = jnp.ones((2, 3, world.WIDTH))
        leaves = {key: leaf[0] for key, leaf in adapter.leaves["q_proj"].items()}
        return adapter.delta(("q_proj",), {"q_proj": leaves}, {}, adapter.gates, x)[0][1].sum()  # the replayed row alone

    gradient = jax.grad(loss)(state.params["block"])
    assert np.any(gradient["q_proj"]["b"]) == (block == "current")


@pytest.mark.parametrize("fields,counts", [
    ({}, (20, 10)), ({"recall_count": "fixed"}, (40, 40)), ({"recall_count": "random_phi"}, (40, 40)),
    ({"recall_per_task": 200}, (100, 50)), ({"recall_per_task": 0}, (0, 0))])  # fmt: skip
def test_less_similar_tasks_are_replayed_more(fields, counts):
    replay = static(**fields).replay(world.info(2))  # similarities 0.5 and 0.75
    assert (replay.counts, replay.weight, replay.mix) == (counts, 2.0, "concat")


def test_replay_by_flag():
    assert static().replay(world.info(0)) is None
    assert static(recall_enabled=False).replay(world.info(2)) is None
    replay = static(recall_weight=0.5, replay_mix="separate_batch").replay(world.info(1))
    assert (replay.counts, replay.weight, replay.mix) == ((10,), 0.5, "separate_batch")
    assert 0 < replay.share < 1
    method = static(recall_per_task=200)
    counts = [method.replay(world.info(1, similarity=[value])).counts[0] for value in np.linspace(0, 1, 21)]
    assert counts[0] == 200 and counts[-1] == 0 and all(np.diff(counts) < 0)


@pytest.mark.parametrize("fields", [
    {}, {"fuse": "factor"}, {"weights": "ones"}, {"pool_chunk": 1}, {"pool_chunk": 5},
    {"pool_chunk": 1, "fuse": "factor"}], ids=str)  # fmt: skip
def test_the_folded_adapter_of_a_task_equals_the_method(rng, fields):
    method = static(**fields)
    state = world.stages(method, 3)
    x = rng.standard_normal((2, 3, world.WIDTH)).astype(np.float32)
    for task in range(3):
        folded = method.fold(state, task)["q_proj"]
        expected = delta(method, state, world.batch_of(task, 2), x)
        np.testing.assert_allclose((x @ folded["a"][0]) @ folded["b"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool_chunk", [0, 1, 2, 5])
def test_a_restored_state_goes_on_as_before(pool_chunk):
    method = static(pool_chunk=pool_chunk)
    states = [world.stages(method, count) for count in (1, 2, 3)]
    for index, ended in enumerate(states):
        restored = method.from_disk(world.on_disk(method, states[: index + 1]), world.start(method), index)
        host = lambda state: trees.digest(jax.tree.map(np.asarray, {"params": state.params, "memory": state.memory}))
        assert host(restored) == host(ended) and int(restored.stage) == index
        if index < 2:
            assert host(world.begin(method, restored, index + 1)) == host(world.begin(method, ended, index + 1))


def test_the_similarity_of_the_task_itself_is_one_whatever_is_given():
    method = static()
    state = world.start(method)
    state = method.start_task(state, world.info(0), None)
    state = method.start_task(dataclasses.replace(state), world.info(1, similarity=[0.0]), None)
    np.testing.assert_array_equal(state.memory["weights"], [[1, 0, 0], [0, 1, 0], [0, 0, 0]])
