"""What every method must do, as checks of one method each; the files `test_battery*.py` run them over the registry.

A new method is tested by its row in the registry. What a method declares not to have (training phases, a fold) is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import numpy as np
import optax
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, CLState, each_linear
from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR, Method
from proglora_jax.models.layers import gather_positions
from proglora_jax.training import loop, losses

STEPS = 30
# Weight decay would move what is frozen if the optimizer saw it; the large epsilon keeps Adam smooth where gradients are near zero.
TRAIN = dataclasses.replace(harness.TRAIN, weight_decay=0.01, epsilon=1e-3)


def make(name: str, **fields) -> harness.Harness:
    """A small version of a method on the stand-in backbone."""
    return harness.Harness(harness.small(name), **({"backbone": "stub", "train": TRAIN} | fields))


@dataclasses.dataclass(frozen=True)
class Walk:
    """A method's way through three tasks.

    Attributes:
        run: the harness.
        begun: state at the start of each stage's training.
        masks: trainable masks.
        fitted: state after each stage's training.
        ended: state at each stage's end.
        losses: training losses of each stage.
        compiles: programs compiled for the training step after each stage.
        phases: of each stage, what `Harness.fit` records of its phases.
    """

    run: harness.Harness
    begun: list[CLState]
    masks: list[dict[str, bool]]
    fitted: list[CLState]
    ended: list[CLState]
    losses: list[list[float]]
    compiles: list[int]
    phases: list[list]


def copy(state: CLState) -> CLState:
    """The state in arrays of its own: training donates its buffers."""
    return jax.tree.map(np.array, state)


def walk_from(run: harness.Harness, state: CLState, first: int = 0) -> Walk:
    """Walks through the tasks from `first` on."""
    walk = Walk(run, [], [], [], [], [], [], [])
    for index in range(first, run.total):
        state, mask = run.begin(state, index)
        walk.begun.append(copy(state))
        walk.masks.append(mask)
        walk.phases.append([])
        state, seen = run.fit(state, mask, index, STEPS, walk.phases[-1])
        walk.fitted.append(copy(state))
        state = run.method.end_task(state, run.info(index), run.probe)
        walk.ended.append(copy(state))
        walk.losses.append(seen)
        walk.compiles.append(run.compiles())
    return walk


@functools.cache
def walked(name: str) -> Walk:
    """The walk of a method; every check of it looks at the same one."""
    run = make(name)
    return walk_from(run, run.initial())


def needs_training(name: str) -> Walk:
    """The walk, or a skip for a method without a training phase."""
    run = make(name)
    if not run.method.phases(run.info(0)):
        pytest.skip(f"{name} has no training phase")
    return walked(name)


def check_no_effect_at_the_start(name: str) -> None:
    run = walked(name).run
    batch = tiny_llava.batch(run.rows(0)[:8])
    expected = np.asarray(plain_logits(run.llava, run.initial().params, batch, None))
    np.testing.assert_allclose(run.answer(run.initial(), batch)["logits"], expected, rtol=1e-5, atol=1e-5)
    if run.method.phases(run.info(0)):  # the comparison can tell
        assert np.abs(run.answer(walked(name).ended[-1], batch)["logits"] - expected).max() > 0.1


def check_only_what_the_mask_says_changes(name: str) -> None:
    """Bit by bit, with weight decay, in every phase; and something does change."""
    walk = needs_training(name)
    for _, before, mask, after, _ in [phase for stage in walk.phases for phase in stage]:
        old, new = trees.flatten(before.params), trees.flatten(after.params)
        assert list(old) == list(new) and set(mask) == set(old)
        changed = {path for path in old if not np.array_equal(old[path], new[path])}
        assert changed and changed <= {path for path, trains in mask.items() if trains}
        assert all(np.asarray(leaf).dtype == np.float32 for leaf in new.values())


def check_memory_is_read_only_in_training(name: str) -> None:
    walk = needs_training(name)
    for _, before, _, after, _ in [phase for stage in walk.phases for phase in stage]:
        assert trees.digest(before.memory) == trees.digest(meshes.to_host(after.memory))


def check_optimizer_state_is_for_what_trains(name: str) -> None:
    walk = needs_training(name)
    for state, mask in zip(walk.begun, walk.masks):
        trainable, _ = trees.partition(state.params, mask)
        optimizer = loop.start_phase(trainable, TRAIN, walk.run.mesh).optimizer
        adam = next(part for part in optimizer if isinstance(part, optax.ScaleByAdamState))
        assert set(trees.flatten(adam.mu)) == set(trees.flatten(adam.nu)) == {path for path, trains in mask.items() if trains}
        scalars = sum(leaf.size for leaf in jax.tree.leaves(optimizer) if leaf.ndim)
        assert scalars == 2 * trees.count_parameters(trainable)


def check_loss_falls(name: str) -> None:
    walk = needs_training(name)
    for index, stage in enumerate(walk.phases):
        for phase, _, _, _, seen in stage:
            assert np.all(np.isfinite(seen)), f"stage {index}"
            share = 0.5 if phase.cross_entropy and not phase.features else 1.0
            assert np.mean(seen[-3:]) < share * np.mean(seen[:3]), f"stage {index}, {phase.name}: {seen[:3]} ... {seen[-3:]}"


def check_first_task_is_kept_no_worse_than_by_plain_lora(name: str) -> None:
    walk, plain = needs_training(name), walked("lora")
    mine, theirs = (way.run.loss(way.ended[-1], 0) for way in (walk, plain))
    assert mine <= theirs * 1.05 + 0.05


def check_restart_goes_on_bit_for_bit(name: str) -> None:
    """The merged trees of the stages so far restore a state whose third stage equals the uninterrupted one's."""
    walk = walked(name)
    method, run = walk.run.method, walk.run
    on_disk: dict = {}
    for index, ended in enumerate(walk.ended):
        on_disk = trees.merge(on_disk, meshes.to_host(method.to_disk(ended)))
        restored = method.from_disk(on_disk, run.initial(), index)
        assert int(restored.stage) == index
        batch = tiny_llava.batch(run.rows(0)[:8])
        for key, value in run.answer(restored, batch).items():
            np.testing.assert_array_equal(value, run.answer(ended, batch)[key], err_msg=f"{key} after stage {index}")
        if index == run.total - 2:
            resumed = walk_from(run, restored, first=index + 1)
            assert resumed.losses[-1] == walk.losses[-1]
            assert trees.digest(meshes.to_host(resumed.ended[-1].params)) == trees.digest(meshes.to_host(walk.ended[-1].params))
            saved = [trees.digest(meshes.to_host(method.to_disk(way.ended[-1]))) for way in (resumed, walk)]
            assert saved[0] == saved[1]


def check_one_compile_per_phase(name: str) -> None:
    """One for the whole sequence: stages differ in numbers, not in shapes. Another set of what trains is another program."""
    walk, programs = needs_training(name), set()
    for index, (count, mask) in enumerate(zip(walk.compiles, walk.masks)):
        trains = frozenset(path for path, moves in mask.items() if moves)
        programs |= {(phase.kind, trains) for phase in walk.run.method.phases(walk.run.info(index))}
        assert 1 <= count <= len(programs)


def check_fold_equals_the_method(name: str) -> None:
    walk = walked(name)
    run, state = walk.run, walk.ended[-1]
    for task in range(run.total):
        try:
            folded = run.method.fold(state, task)
        except ValueError as reason:
            assert name in str(reason)
            pytest.skip(str(reason))
        batch = tiny_llava.batch(run.rows(task)[:8])
        expected = run.answer(state, batch)["logits"]
        delta = lambda name, leaf, context, gates, x: (x @ leaf["a"]) @ leaf["b"]
        adapter = Adapter({key: dict(leaf) for key, leaf in folded.items()}, {}, {}, each_linear(delta)) if folded else None
        np.testing.assert_allclose(plain_logits(run.llava, state.params, batch, adapter), expected, rtol=1e-4, atol=1e-4)


@jax.jit
def plain_logits(llava, params, batch, adapter):
    """Scores under an adapter that needs no method."""
    hidden = llava.decode(tiny_llava.embed_batch(llava, params, batch), adapter=adapter).hidden
    return llava.logits(gather_positions(hidden, batch["label_index"]))


def check_answers_need_the_task_id_only_where_declared(name: str) -> None:
    walk = walked(name)
    batch = tiny_llava.batch(walk.run.rows(0)[:8])
    told = walk.run.answer(walk.ended[-1], batch)
    lied = walk.run.answer(walk.ended[-1], batch | {"task_id": np.full_like(batch["task_id"], walk.run.total - 1)})
    same = all(np.array_equal(told[key], lied[key]) for key in told)
    assert same != walk.run.method.uses_task_id


def check_the_seed_decides_the_start(name: str) -> None:
    run = make(name)
    method = run.method
    projector = meshes.to_host(run.llava.projector_params())
    draw = lambda seed: trees.digest(meshes.to_host(method.init(run.llava.targets(), projector, 3, seed).params))
    assert draw(0) == draw(0)
    assert (draw(0) != draw(1)) == bool(method.phases(run.info(0)))


def check_groups_are_known(name: str) -> None:
    walk = walked(name)
    for path in trees.flatten(walk.ended[-1].params):
        assert walk.run.method.group(path) in (ADAPTER, GATE, PROJECTOR)
    assert walk.run.method.group("mm_projector/linear_1/kernel") == PROJECTOR


@functools.cache
def second_stage(name: str) -> tuple[harness.Harness, CLState, dict[str, bool]]:
    """A method at the start of its second task, every parameter moved away from where it starts (pools and keys are filled)."""
    run, rng = make(name), np.random.default_rng(1)
    if not run.method.phases(run.info(0)):
        pytest.skip(f"{name} has no training phase")
    state, mask = run.begin(run.initial(), 0)
    if type(run.method).after_phase is not Method.after_phase:  # what its phases leave behind is part of a second stage
        state, _ = run.fit(state, mask, 0, 3)
    state, _ = run.begin(run.method.end_task(state, run.info(0), run.probe), 1)
    state = jax.tree.map(np.array, state)
    moved = lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    state = dataclasses.replace(state, params=jax.tree.map(moved, state.params))
    return run, state, run.method.trainable_mask(state, run.info(1))


def check_eight_devices_equal_one(name: str) -> None:
    one, state, mask = second_stage(name)
    eight = make(name, shape={"data": 4, "fsdp": 2})
    (after, seen), (spread, also) = (run.fit(state, mask, 1, 3) for run in (one, eight))
    assert len(jax.tree.leaves(spread.params)[0].devices()) == 8
    np.testing.assert_allclose(also, seen, rtol=1e-5)
    for path, leaf in trees.flatten(after.params).items():
        np.testing.assert_allclose(trees.flatten(spread.params)[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def check_half_precision_trains(name: str) -> None:
    full, state, mask = second_stage(name)
    half = make(name, dtype="bfloat16")
    np.testing.assert_allclose(half.loss(state, 1), full.loss(state, 1), rtol=0.02)  # 8 bits through four roundings per layer
    assert half.loss(state, 1) != full.loss(state, 1)
    record: list = []
    trained, _ = half.fit(state, mask, 1, STEPS, record)
    seen = record[0][-1]
    assert np.mean(seen[-3:]) < 0.6 * np.mean(seen[:3])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trained.params))


def check_routing_is_in_full_precision(name: str) -> None:
    """In a half-precision run every product of two float32 arrays that plain LoRA does not have is computed in full float32."""
    plain = {shape for shape, _ in float32_products("lora")}
    rounded = [shape for shape, precision in float32_products(name) if shape not in plain and precision != FULL]
    assert not rounded


FULL = (jax.lax.Precision.HIGHEST,) * 2


@functools.cache
def float32_products(name: str) -> list[tuple[Any, Any]]:
    """(shapes of the operands, precision asked for) of every product of float32 arrays in a method's steps and its forward pass at test."""
    run, info = make(name, dtype="bfloat16"), make(name).info(0)
    state, mask = run.begin(run.initial(), 0)
    rows = meshes.put_batch(next(run.batches(0, None)), run.mesh)
    programs = [run.forward.trace(state.params, state.memory, run.llava, rows, state.stage)]
    trainable, frozen = trees.partition(state.params, mask)
    for phase in run.method.phases(info):
        now = loop.start_phase(trainable, run.train, run.mesh, state.carry.get("running"))
        batch = next(run.features(state, phase, 0, 0)) if phase.features else rows
        control = run.control(0, 0, STEPS, phase, now.running)
        step = run.step(False, phase.program())
        programs.append(step.trace(now.trainable, now.optimizer, frozen, state.memory, run.llava, batch, control))
    products = [dot for program in programs for dot in _products(program.jaxpr)]
    operands = [tuple(value.aval for value in dot.invars) for dot in products]
    return [
        (tuple(value.shape for value in pair), dot.params["precision"])
        for dot, pair in zip(products, operands) if all(value.dtype == np.float32 for value in pair)
    ]  # fmt: skip


def _products(jaxpr: Any) -> Iterator[Any]:
    """The matrix products of a jaxpr, inner ones too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "eqns") or hasattr(part, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _products(value)


CHECKS: tuple[Callable[[str], None], ...] = (
    check_no_effect_at_the_start,
    check_only_what_the_mask_says_changes,
    check_memory_is_read_only_in_training,
    check_optimizer_state_is_for_what_trains,
    check_loss_falls,
    check_first_task_is_kept_no_worse_than_by_plain_lora,
    check_restart_goes_on_bit_for_bit,
    check_one_compile_per_phase,
    check_fold_equals_the_method,
    check_answers_need_the_task_id_only_where_declared,
    check_the_seed_decides_the_start,
    check_groups_are_known,
)
