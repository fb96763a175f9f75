"""ProgLoRA (dynamic): gates, keys, memory and the recall loss, stage after stage."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world
import tiny_llava

from proglora_jax.adapters import gates as gating
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.data.replay import replay_count, replay_indices
from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR
from proglora_jax.methods.proglora import ProgLoRADynamic

SMALL = dict(rank=2, alpha=4.0, proj_width=5, recall_per_task=8)


def dynamic(**fields) -> ProgLoRADynamic:
    return ProgLoRADynamic(**(SMALL | fields))


# ---- the first stage


def test_the_first_stage_gives_routing_no_gradient():
    state = world.begin(dynamic(), world.start(dynamic()), 0)
    batch = world.batch_of()

    def loss(params):
        gates = dynamic().gates(params, state.memory, world.inputs(batch, 0, training=True))
        extra, _ = dynamic().extra_loss(params, state.memory, world.inputs(batch, 0), jax.random.key(0))
        return (gates["new"] ** 2).sum() + (gates["pool"] * 3).sum() + extra

    for path, gradient in trees.flatten(jax.grad(loss)(state.params)).items():
        assert not np.any(gradient), path


# ---- gates


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gates_are_the_softmax_over_the_blocks_so_far(stage):
    method = dynamic()
    state, batch = world.stages(method, stage + 1), world.batch_of(stage)
    z = np.stack([world.embed(batch)[row][batch["segments"][row] == codes.INSTRUCTION].max(0) for row in range(6)])
    h = np.asarray(gating.query_projector(state.params["query_projector"], z))
    keys = np.concatenate([np.asarray(state.params["keys"])[:stage], np.asarray(state.params["key"])[None]])
    logits = h @ keys.T / np.sqrt(world.WIDTH)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    gates = method.gates(state.params, state.memory, world.inputs(batch, stage))
    np.testing.assert_allclose(gates["blocks"][:, : stage + 1], expected, rtol=1e-4, atol=1e-6)
    assert not np.any(gates["blocks"][:, stage + 1 :])
    np.testing.assert_allclose(gates["blocks"].sum(1), 1, rtol=1e-6)
    # Frozen slots carry the gates of their blocks, the trainable block that of the newest; no weight is given twice.
    frozen = np.repeat(expected[:, :stage], 2, axis=1)
    np.testing.assert_allclose(gates["pool"][:, 0, : 2 * stage], frozen, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gates["new"][:, 0], np.repeat(expected[:, stage:], 2, axis=1), rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_projector_and_the_new_key_alone():
    method = dynamic()
    state, batch = world.begin(method, world.stages(method, 2), 2), world.batch_of(2)
    loss = lambda params: (method.gates(params, state.memory, world.inputs(batch, 2, training=True))["blocks"] ** 2).sum()
    moved = {path for path, leaf in trees.flatten(jax.grad(loss)(state.params)).items() if np.any(leaf)}
    assert "key" in moved and "query_projector/linear_1/kernel" in moved
    assert all(path == "key" or path.startswith("query_projector/") for path in moved)


def test_a_stage_freezes_the_last_block_and_key_where_they_belong():
    method = dynamic()
    ended = [world.stages(method, count) for count in (1, 2)]
    state = world.begin(method, ended[1], 2)
    for index, before in enumerate(ended):
        np.testing.assert_array_equal(state.params["keys"][index], before.params["key"])
        for name, leaf in before.params["block"].items():
            np.testing.assert_array_equal(state.params["pool"][name]["a"][..., 2 * index : 2 * index + 2], leaf["a"])
            np.testing.assert_array_equal(state.params["pool"][name]["b"][:, 2 * index : 2 * index + 2], leaf["b"])
    for name, leaf in state.params["block"].items():
        assert not np.any(leaf["b"]) and np.any(leaf["a"])
        assert not np.array_equal(leaf["a"], ended[1].params["block"][name]["a"])
    assert trees.digest(jax.tree.map(np.asarray, state.params["query_projector"])) == trees.digest(ended[1].params["query_projector"])
    mask = method.trainable_mask(state, world.info(2))
    assert {path.split("/")[0] for path, trains in mask.items() if trains} == {"block", "key", "query_projector", "mm_projector"}
    assert {path.split("/")[0]: method.group(path) for path in mask} == {
        "block": ADAPTER, "pool": ADAPTER, "key": GATE, "keys": GATE, "query_projector": GATE, "mm_projector": PROJECTOR}  # fmt: skip


# ---- what gates may not see


def variations(batch):
    """The same prompts with more padding, with other answers, and each row alone or beside other rows."""
    rows = [tiny_llava.row(np.random.default_rng([7, i]), 0, image=i % 2 == 0) for i in range(4)]
    longer = tiny_llava.batch(rows, positions=30)
    answered = tiny_llava.batch([extended(row) for row in rows])
    return {"padding": longer, "answers": answered, "neighbours": tiny_llava.batch([rows[0], *[row_of(i) for i in range(3)]])}


def extended(row: codes.BatchRow) -> codes.BatchRow:
    """The row with its answer replaced by a longer one."""
    prompt = row.segments != codes.ANSWER
    tokens = np.concatenate([row.tokens[prompt], np.int32([50, 51, 52, 53, 2])])
    return dataclasses.replace(row, tokens=tokens, segments=np.concatenate([row.segments[prompt], np.full(5, codes.ANSWER, np.int8)]))


def row_of(seed: int) -> codes.BatchRow:
    """A long row of another task."""
    return tiny_llava.row(np.random.default_rng([8, seed]), 1, words=8, answer=3)


@pytest.mark.parametrize("tokens", ["instruction", "text_prompt", "multimodal_prompt", "released_code"])
def test_gates_see_neither_padding_nor_answers_nor_neighbours_but_in_the_released_code(tokens):
    method = dynamic(routing_tokens=tokens)
    state = world.stages(method, 3)
    base = tiny_llava.batch([tiny_llava.row(np.random.default_rng([7, i]), 0, image=i % 2 == 0) for i in range(4)])
    expected = world.gates(method, state, base)
    differences = {name: np.abs(world.gates(method, state, batch)[:1] - expected[:1]).max() for name, batch in variations(base).items()}
    assert differences["padding"] < 1e-6
    if tokens == "released_code":
        assert differences["answers"] > 1e-3 and differences["neighbours"] > 1e-3
    else:
        assert max(differences.values()) < 1e-6


# ---- memory and recall


def test_memory_holds_features_and_gates_of_the_routers_last_moment():
    method = dynamic()
    state = world.stages(method, 2)
    rows = tiny_llava.rows_of(1, world.SIZE)
    batch = tiny_llava.batch([rows[i] for i in replay_indices(world.SIZE, 8, 0, "task1")])
    inputs = world.inputs(batch, 1)
    np.testing.assert_allclose(state.memory["features"][1], method.route(inputs), rtol=1e-6)
    np.testing.assert_allclose(state.memory["targets"][1], world.gates(method, state, batch), rtol=1e-5, atol=1e-7)
    assert not np.any(state.memory["targets"][1, :, 2]) and not np.any(state.memory["features"][2])
    np.testing.assert_array_equal(state.memory["targets"][0], np.eye(3)[[0] * 8])


@pytest.mark.parametrize("count,expected", [("similarity", [4, 2]), ("fixed", [8, 8]), ("random_phi", [8, 8])])
def test_less_similar_tasks_are_recalled_more(count, expected):
    method = dynamic(recall_count=count)
    state = world.begin(method, world.stages(method, 2), 2)  # similarities 0.5 and 0.75
    np.testing.assert_array_equal(state.memory["mask"].sum(1), expected + [0])
    assert all(np.all(np.diff(row) <= 0) for row in state.memory["mask"])  # the first of the permutation
    assert [replay_count(s, 200) for s in (0.0, 0.25, 1.0)] == [200, 150, 0]


def test_a_task_smaller_than_its_memory_counts_what_is_stored_only():
    method = dynamic(recall_count="fixed")
    state = world.begin(method, world.stages(method, 1, size=5), 1)
    np.testing.assert_array_equal(state.memory["mask"], [[1] * 5 + [0] * 3, [0] * 8, [0] * 8])


def naive_recall(method, state, stage):
    """The divergence sample by sample, in numpy: list of (task, KL(target || gates))."""
    values = []
    for task, row in np.argwhere(np.asarray(state.memory["mask"]) > 0):
        z, target = np.asarray(state.memory["features"])[task, row], np.asarray(state.memory["targets"], np.float64)[task, row]
        pred = np.asarray(method.weights(state.params, z[None], jnp.int32(stage)), np.float64)[0]
        kept = target > 0
        values.append((target[kept] * np.log(target[kept] / pred[kept])).sum())
    return values


@pytest.mark.parametrize("reduction,weight", [("mean", 2.0), ("sum", 0.5)])
def test_recall_is_the_divergence_between_stored_and_present_gates(reduction, weight):
    method = dynamic(recall_reduction=reduction, recall_weight=weight)
    state = world.begin(method, world.stages(method, 2), 2)
    inputs = world.inputs(world.batch_of(2), 2, training=True)
    extra, logged = method.extra_loss(state.params, state.memory, inputs, jax.random.key(0))
    values = naive_recall(method, state, 2)
    assert len(values) == 6 and min(values) > 0
    np.testing.assert_allclose(logged["recall"], np.mean(values) if reduction == "mean" else np.sum(values), rtol=1e-4)
    np.testing.assert_allclose(extra, weight * logged["recall"], rtol=1e-6)
    gradient = jax.grad(lambda params: method.extra_loss(params, state.memory, inputs, jax.random.key(0))[0])(state.params)
    reached = {path for path, leaf in trees.flatten(gradient).items() if np.any(leaf)}
    assert "key" in reached and all(path == "key" or path.startswith("query_projector/") for path in reached)


def test_recall_vanishes_while_the_router_is_unchanged_and_in_the_first_stage():
    method = dynamic()
    state = world.stages(method, 2)
    last = dict(state.memory, mask=jnp.zeros((3, 8)).at[1].set(1.0))  # samples of the task that has just ended
    inputs = world.inputs(world.batch_of(1), 1)
    np.testing.assert_allclose(method.extra_loss(state.params, last, inputs, jax.random.key(0))[0], 0, atol=1e-6)
    fresh = world.begin(method, world.start(method), 0)
    extra, _ = method.extra_loss(fresh.params, fresh.memory, world.inputs(world.batch_of(0), 0), jax.random.key(0))
    assert extra == 0


def test_a_restored_state_routes_and_recalls_as_before():
    method = dynamic()
    ended = [world.stages(method, count) for count in (1, 2, 3)]
    restored = method.from_disk(world.on_disk(method, ended[:2]), world.start(method), 1)
    for state in (restored, ended[1]):
        assert state.params["keys"].shape == (3, world.WIDTH)
    one, two = (world.begin(method, state, 2) for state in (restored, ended[1]))
    batch = world.batch_of(0)
    np.testing.assert_array_equal(world.gates(method, one, batch), world.gates(method, two, batch))
    losses = [method.extra_loss(state.params, state.memory, world.inputs(batch, 2), jax.random.key(0))[0] for state in (one, two)]
    assert losses[0] == losses[1] > 0
    assert trees.digest(jax.tree.map(np.asarray, one.params)) == trees.digest(jax.tree.map(np.asarray, two.params))
    assert trees.digest(jax.tree.map(np.asarray, one.memory)) == trees.digest(jax.tree.map(np.asarray, two.memory))
