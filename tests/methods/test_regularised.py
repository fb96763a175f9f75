"""LwF, EWC, O-LoRA and MoCL: what their losses are at special places, what of the past they keep, and bad values by name."""

from __future__ import annotations

import dataclasses

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import TaskInfo
from proglora_jax.methods.ewc import EWC, _merge
from proglora_jax.methods.lwf import LwF
from proglora_jax.methods.mocl import MoCL
from proglora_jax.methods.olora import OLoRA
from proglora_jax.methods.views import Probe

SMALL = dict(rank=2, alpha=4.0)


def loss_of(method, state, batch, stage: int):
    """(extra loss, its gradient by path)."""
    function = lambda params: method.extra_loss(params, state.memory, world.inputs(batch, stage, training=True), jax.random.key(0))[0]
    value, gradient = jax.value_and_grad(function)(state.params)
    return float(value), trees.flatten(gradient)


# ------------------------------------------------------------------------------------------------------------------------ LwF


def test_the_teacher_agrees_at_the_start_of_a_stage():
    """With dropout off; the first step's gradient is that of the cross-entropy alone, later the teacher pulls."""
    run = harness.Harness(LwF(**SMALL, dropout=0.0), backbone="stub")
    state, _ = run.stage(run.initial(), 0, 6)
    state, mask = run.begin(state, 1)
    plain = harness.Harness(dataclasses.replace(run.method, distill_weight=0.0), backbone="stub")
    (after, seen), (free, also) = (way.fit(jax.tree.map(np.array, state), mask, 1, 2) for way in (run, plain))
    np.testing.assert_allclose(seen[0], also[0], rtol=1e-6)
    assert seen[1] > also[1] + 1e-4
    assert trees.digest(after.params) != trees.digest(free.params)


def test_the_teacher_is_the_end_of_the_stage_before():
    run = harness.Harness(LwF(**SMALL), backbone="stub")
    ended = jax.tree.map(np.array, run.stage(run.initial(), 0, 3)[0])
    state, _ = run.begin(ended, 1)
    assert trees.digest(state.memory["teacher"]) == trees.digest({name: ended.params[name] for name in ("block", "mm_projector")})
    assert "memory" not in run.method.to_disk(state)  # it is the checkpoint before


def test_the_teacher_keeps_its_projector_where_each_task_begins_with_another():
    """As with config.train.projector_init_per_task='random', also after a restart between the two stages."""
    run = harness.Harness(LwF(**SMALL), backbone="stub")
    ended = jax.tree.map(np.array, run.stage(run.initial(), 0, 3)[0])
    taught = trees.digest({name: ended.params[name] for name in ("block", "mm_projector")})
    restored = run.method.from_disk(meshes.to_host(run.method.to_disk(ended)), run.initial(), 0)
    for state in (ended, restored):
        other = jax.tree.map(lambda leaf: leaf + 1, state.params["mm_projector"])
        begun, _ = run.begin(dataclasses.replace(state, params=state.params | {"mm_projector": other}), 1)
        assert trees.digest(begun.memory["teacher"]) == taught
        assert trees.digest(begun.params["mm_projector"]) == trees.digest(other)


# ------------------------------------------------------------------------------------------------------------------------ EWC


def ewc_state(method, squares: float = 0.5):
    """A state at the end of its first task, whose information is everywhere the same."""
    fake = Probe(None, lambda state, numbers, size, kind, names: jax.tree.map(
        lambda leaf: np.full(np.shape(leaf), squares, np.float32), {name: state.params[name] for name in names}))
    state = world.train(method, world.begin(method, world.start(method), 0), 0)
    return method.end_task(state, world.info(0), fake)


def test_the_penalty_and_its_gradient_are_zero_where_the_task_ended():
    method = EWC(**SMALL)
    state, batch = ewc_state(method), world.batch_of(1)
    value, gradient = loss_of(method, state, batch, 1)
    assert value == 0 and not any(np.any(leaf) for leaf in gradient.values())
    value, gradient = loss_of(method, dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf + 0.1, state.params)), batch, 1)
    count = trees.count_parameters(state.params)
    np.testing.assert_allclose(value, 0.5 * 5000 * count * 0.5 * 0.01, rtol=1e-4)
    for leaf in gradient.values():
        np.testing.assert_allclose(leaf, 5000 * 0.5 * 0.1, rtol=1e-4)


def test_a_sum_of_quadratics_is_one_quadratic_without_cancellation():
    """Twelve tasks whose ends are large and lie close together, against float64."""
    rng = np.random.default_rng(0)
    ends = [np.float32(30 + 1e-2 * rng.standard_normal(200)) for _ in range(12)]
    infos = [np.float32(10.0 ** rng.uniform(-8, 0, 200) * (rng.random(200) > 0.3)) for _ in range(12)]
    fisher, anchor, constant = np.zeros(200, np.float32), np.zeros(200, np.float32), 0.0
    for info, end in zip(infos, ends):
        fisher, anchor, more = _merge(fisher, anchor, info, end)
        constant += more
    theta = np.float32(30 + 1e-2 * rng.standard_normal(200))
    pairs = list(zip(np.float64(infos), np.float64(ends)))
    expected = sum((info * (theta - end) ** 2).sum() for info, end in pairs)
    np.testing.assert_allclose((fisher * (theta - anchor) ** 2).sum() + constant, expected, rtol=1e-3)
    slope = sum(2 * info * (theta - end) for info, end in pairs)
    grid = np.spacing(np.float32(30))  # the anchor is rounded to it with each task
    assert np.all(np.abs(2 * fisher * (theta - anchor) - slope) <= 2 * fisher * 12 * grid + 1e-9)
    first, second = (np.float32(sum(info * end**power for info, end in pairs)) for power in (1, 2))
    expanded = (fisher * theta**2 - 2 * theta * first + second).sum()  # the same on paper
    assert abs(expanded - expected) > 0.02 * expected


@pytest.mark.parametrize("size, batches, rows", [(7, 1, 7), (30, 2, 24), (1000, 50, 600)])
def test_information_is_taken_from_whole_batches(size, batches, rows):
    asked = []

    def squares(state, numbers, size, kind, names):
        asked.append((numbers, size, kind, names))
        return jax.tree.map(np.zeros_like, {name: state.params[name] for name in names})

    method = EWC(**SMALL, fisher="per_sample", scope="lora")
    state = world.start(method)
    method.end_task(state, TaskInfo(0, "task0", 3, size, np.zeros(0), 0), Probe(None, squares))
    numbers, each, kind, names = asked[0]
    assert (len(numbers), len(numbers) // each, kind, names) == (rows, batches, "per_sample", ("block",))
    assert len(set(numbers.tolist())) == rows and numbers.max() < size


# --------------------------------------------------------------------------------------------------------------------- O-LoRA


def test_orthogonal_row_spaces_cost_nothing():
    method = OLoRA(**SMALL)
    state, batch = world.stages(method, 2), world.batch_of(1)
    assert loss_of(method, state, batch, 1)[0] > 0.1
    for name, leaf in state.params["block"].items():
        q = np.stack([np.linalg.qr(np.random.default_rng(layer).standard_normal((leaf["a"].shape[1],) * 2))[0] for layer in range(2)])
        state.params["pool"][name]["a"] = jnp.asarray(state.params["pool"][name]["a"]).at[:, :, :2].set(q[:, :, :2])
        leaf["a"] = jnp.asarray(q[:, :, 2:4], jnp.float32)
    np.testing.assert_allclose(loss_of(method, state, batch, 1)[0], 0, atol=1e-5)


def test_the_penalty_moves_the_new_rows_alone_and_empty_slots_do_not_count():
    method = OLoRA(**SMALL, norm_weight=0.5)
    state, batch = world.begin(method, world.stages(method, 1), 1), world.batch_of(1)
    value, gradient = loss_of(method, state, batch, 1)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())  # B is zero, where a norm has no derivative
    moved = {path for path, leaf in gradient.items() if np.any(leaf) and not path.startswith("pool")}
    assert moved == {"block/q_proj/a", "block/down_proj/a"}
    filled = jax.tree.map(np.array, state.params["pool"])
    for leaf in filled.values():
        leaf["a"][:, :, 2:] = 9.0
    full = dataclasses.replace(state, params=state.params | {"pool": filled})
    assert loss_of(method, full, batch, 1)[0] == value


# ----------------------------------------------------------------------------------------------------------------------- MoCL


def test_weights_see_the_instruction_alone():
    """Not answers, padding, images or neighbours; they add up to 1."""
    method = MoCL(**SMALL)
    state, batch = world.stages(method, 3), world.batch_of(2)
    weights = world.gates(method, state, batch)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    other = {name: value.copy() for name, value in batch.items()}
    other["tokens"][batch["segments"] != codes.INSTRUCTION] = 9
    np.testing.assert_array_equal(world.gates(method, state, other), weights)
    few = {name: value[2:4] for name, value in batch.items()}
    np.testing.assert_allclose(world.gates(method, state, few), weights[2:4], rtol=1e-6)
    mean = world.gates(MoCL(**SMALL, batch_mean=True), state, batch)
    np.testing.assert_allclose(mean, np.broadcast_to(weights.mean(0), mean.shape), rtol=1e-6)
    empty = batch | {"segments": np.where(batch["segments"] == codes.INSTRUCTION, codes.TEMPLATE, batch["segments"])}
    np.testing.assert_allclose(world.gates(method, state, empty), 1 / 3, rtol=1e-6)


def test_the_matching_loss_draws_the_newest_key_alone():
    method = MoCL(**SMALL)
    state, batch = world.stages(method, 2), world.batch_of(1)
    value, gradient = loss_of(method, state, batch, 1)
    assert 0 < value < 2 and {path for path, leaf in gradient.items() if np.any(leaf)} == {"key"}
    keys = world.begin(method, state, 2).params
    np.testing.assert_array_equal(keys["keys"][1], state.params["key"])
    assert 0 <= np.min(keys["key"]) and np.max(keys["key"]) < 1 and not np.allclose(keys["key"], world.start(method).params["key"])


# ------------------------------------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize("cls, field, value, sentence", [
    (LwF, "distill_weight", -1.0, "must be >= 0"), (LwF, "temperature", 0.0, "must be positive"), (LwF, "mode", "scores", "must be one of"),
    (EWC, "penalty_weight", -1.0, "must be >= 0"), (EWC, "accumulate", "list", "must be one of 'separate', 'online'"),
    (EWC, "gamma", 0.5, "must be 1 with accumulate='separate'"), (EWC, "gamma", 1.5, "must be in"),
    (EWC, "fisher", "true", "must be one of"),
    (EWC, "fisher_batches", 0, "must be >= 1"), (EWC, "fisher_batch_size", 0, "must be >= 1"), (EWC, "scope", "all", "must be one of"),
    (OLoRA, "orthogonal_weight", -0.1, "must be >= 0"), (OLoRA, "norm_weight", -1.0, "must be >= 0"),
    (OLoRA, "reduction", "max", "must be one of"), (OLoRA, "train_forward", "old", "must be one of"),
    (MoCL, "weights", "softmax", "must be one of 'softmax8', 'cosine'"), (MoCL, "match_weight", -1.0, "must be >= 0"),
])  # fmt: skip
def test_bad_values_are_named(cls, field, value, sentence):
    with pytest.raises(UserError, match=rf"config\.method\.{field}=.*{sentence}"):
        cls(**{field: value})
