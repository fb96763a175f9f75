"""Memory and work that are planned for each method and phase: the bytes of real states, and the matmuls of the traced steps."""

from __future__ import annotations

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import backbone, settings_of
from test_shapes import TASKS, stages

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.methods.registry import METHODS, NAMES
from proglora_jax.training import memory, optim, programs, roofline, shapes
from proglora_jax.training.flops import matmul_work
from proglora_jax.training.memory import Load

PER_RANK, PROJECTOR_RANK = 2_498_560, 1_024 + 3 * 4_096  # parameters of a rank in seven linears of 32 layers, and in the mm_projector


def planned_phases(method, llava, tasks, size: int = 1000) -> list[shapes.StageShapes]:
    """All phases of all stages that are planned."""
    mesh = meshes.abstract_mesh({"data": 1}, 1)
    return [phase for stage in shapes.abstract_stages(method, llava, tasks, [size] * len(tasks), mesh) for phase in stage.phases]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_is_what_a_run_holds(name):
    """Phase by phase: three stages of the real hooks on real arrays, their steps left out."""
    run = harness.Harness(harness.small(name))
    state, held = run.initial(), []
    for index in range(run.total):
        state, _ = run.begin(state, index)
        for phase in run.method.phases(run.info(index)):
            trainable, frozen = trees.partition(state.params, run.method.phase_mask(state, run.info(index), phase))
            held.append((index, phase.name, *map(trees.count_bytes, (trainable, frozen, state.memory))))
            state = run.method.after_phase(state, run.info(index), phase, run.probe)
        state = run.method.end_task(state, run.info(index), run.probe)
    settings = dataclasses.replace(settings_of(), method=run.method)
    planned = []
    for one in planned_phases(run.method, run.llava, ["a", "b", "c"], run.count):
        parts = {part.name: part.bytes for part in memory.training_memory(settings, run.llava, one, Load(1, 8, 2), run.mesh)}
        names = ("trainable", "frozen blocks and keys", "memory of the method")
        planned.append((one.info.index, one.phase.name, *(parts[part] for part in names)))
    assert planned == held and bool(held) == (name != "zero_shot")


@functools.cache
def steps_of(name: str) -> list[shapes.StageShapes]:
    """The last stage's phase of every kind that runs the 7B model."""
    found = planned_phases(METHODS[name](), backbone("llava15_7b"), TASKS)
    return list({one.phase.kind: one for one in found if not one.phase.features}.values())


def causal_half(layers: int) -> float:
    """Operations of half of attention's two products over 704 positions in so many layers of the 7B model, for one row."""
    return 2.0 * 704**2 * 4096 * layers


KINDS = [(name, "qkvo_mlp") for name in ("lora", "moelora", "lwf", "sema", "branchlora", "pclr", "proglora_light")]


@pytest.mark.parametrize("name, remat", [*KINDS, ("lwf", "full"), ("pclr", "full")])
def test_the_steps_of_every_kind_compute_what_is_planned(name, remat):
    settings = settings_of(model__remat=remat, model__attention="xla", train__loss_groups=0)
    settings, llava = dataclasses.replace(settings, method=METHODS[name]()), backbone("llava15_7b")
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    for one in steps_of(name):
        cost = settings.method.cost(one.state.params, one.info, one.phase)
        planned = roofline.training_work(llava.config, llava.targets(), 704, 64, remat, cost).total
        traced = matmul_work(programs.trace_train_step(settings, llava, one, 8, (704, 64), mesh).jaxpr).total / 8
        # XLA's attention computes both halves of the causal square, and what is over the diagonal is thrown away
        square = causal_half(32 if cost.whole else 31) * ((4 if remat == "full" else 3) + (cost.teacher > 0))
        assert traced == pytest.approx(planned + square, rel=0.01), one.phase.kind


def test_a_teacher_costs_a_forward_pass_and_its_scores():
    llava, last = backbone("llava15_7b"), stages("lwf")[-1]
    first, plain = stages("lwf", tasks=TASKS[:1])[0], stages("lora", tasks=TASKS[:1])[0]
    cost = lambda method, stage: method.cost(stage.state.params, stage.info, stage.phase)
    lwf = METHODS["lwf"]()
    assert cost(lwf, first) == cost(METHODS["lora"](), plain), "nobody is asked in the first stage"
    assert lwf.cost(last.state.params, last.info, None) == cost(lwf, first), "nor when answers are wanted"
    works = [roofline.training_work(llava.config, llava.targets(), 704, 64, "qkvo_mlp", cost(lwf, stage)) for stage in (first, last)]
    assert 1.45 < works[1].total / works[0].total < 1.55
    settings, load = dataclasses.replace(settings_of(), method=lwf), Load(4, 704, 2048)
    parts = [memory.activation_bytes(settings, llava, cost(lwf, stage), load) for stage in (first, last)]
    assert parts[0][0] == parts[1][0] and parts[1][1] == 2 * parts[0][1] == 6 * 4 * 4 * 2048 * 32_064
    hidden = METHODS["lwf"](mode="hidden")
    assert memory.activation_bytes(settings, llava, cost(hidden, last), load) == parts[0], "no second set of scores"


def test_the_second_pool_of_pclr_is_held_while_it_is_distilled():
    method = METHODS["pclr"]()
    learn, integrate = (one for one in planned_phases(method, backbone("llava15_7b"), TASKS) if one.info.index == 4)
    assert (learn.phase.kind, integrate.phase.kind) == ("learn", "integrate")
    size = lambda one, name: trees.count_bytes(one.state.memory.get(name, {}))
    ranks = (256 + 32) * (PER_RANK + PROJECTOR_RANK)
    assert size(learn, "teacher") == 0
    assert trees.count_parameters({name: integrate.state.memory["teacher"][name] for name in integrate.state.memory["teacher"]
                                   if name not in ("keys", "count", "newest", "sharing")}) == ranks
    trains = lambda one: trees.count_parameters(trees.partition(one.state.params, one.mask)[0])
    assert trains(integrate) == ranks > 3 * trains(learn)


# -------------------------------------------------------------------------------------------------- what the start-up table says


def described(name: str, stage: shapes.StageShapes) -> str:
    """The table of a stage."""
    return shapes.describe_parameters(METHODS[name](), stage, {})


def test_modules_that_depend_on_the_data_are_counted_as_a_bound():
    block = 16 * PER_RANK  # of 32 layers, of which the upper eight may grow
    for index, stage in enumerate(stages("sema")):
        assert f"blocks learned so far and now: at most {block + index * block // 4:,} (" in described("sema", stage)
    run = harness.Harness(harness.small("sema"))
    state, mask = run.begin(run.initial(), 0)
    begun = shapes.StageShapes(run.info(0), state, mask)
    assert "blocks learned so far and now: 3,968 (" in shapes.describe_parameters(run.method, begun, {})


@pytest.mark.parametrize("name", ["branchlora", "sema"])
def test_entries_that_rest_are_not_counted_as_training(name):
    """Counted one by one: the entries that a step with gradients everywhere moves."""
    run = harness.Harness(harness.small(name))
    state, _ = run.begin(run.initial(), 0)
    state, mask = run.begin(run.method.end_task(state, run.info(0), run.probe), 1)
    held = dict(state.memory)
    if name == "branchlora":
        held["frozen"] = {linear: jnp.zeros_like(leaf).at[0, 1].set(1.0).at[1, :].set(1.0) for linear, leaf in held["frozen"].items()}
    else:
        held["training"] = jnp.zeros_like(held["training"]).at[-1].set(1.0)
    state = dataclasses.replace(state, memory=held)
    trainable, _ = trees.partition(state.params, mask)
    rates = dict.fromkeys(("adapter", "gate", "mm_projector"), 1.0)
    moved = optim.apply_rates(jax.tree.map(jnp.ones_like, trainable), run.method, rates, held)
    expected = {group: sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(part)) for group, part in moved.items()}
    counts = shapes.trainable_counts(run.method, state, mask)
    assert counts == expected
    group = "branches" if name == "branchlora" else "block"
    assert counts[group] < trees.count_parameters(state.params[group])
    text = shapes.describe_parameters(run.method, shapes.StageShapes(run.info(1), state, mask), {})
    assert f"{group}, {counts[group]:,} of it" in text
    assert f"{sum(counts.values()) - counts['mm_projector']:,} train (" in text


def test_ranks_that_pclr_has_kept_are_counted_not_one_block_per_task():
    """Four tasks of 64 ranks fill the pool, each later one takes the place of what was dropped; the last two add 32."""
    per_rank = PER_RANK + PROJECTOR_RANK
    kept = [(64, 0), (128, 64), (192, 128), (256, 192), (256, 192), (256, 192), (256, 224), (256, 224)]
    for stage, (ranks, before) in zip(stages("pclr"), kept):
        shared = 32 * per_rank if stage.info.index > 3 else 0
        text = described("pclr", stage)
        assert f"blocks learned so far and now: {ranks * per_rank + shared:,} (" in text, stage.info.index
        assert f"\npool, {before} of 256 ranks filled" in text and f"\nprojector_pool, {before} of 256 ranks filled" in text


def test_branches_are_the_same_for_all_tasks():
    text = described("branchlora", stages("branchlora")[-1])
    assert "blocks learned so far and now: 192,282,624 (192.3 M)" in text  # trunk and branches


def test_modules_of_sema_are_counted_where_they_are():
    method = harness.small("sema", rank=4)
    run = harness.Harness(method, backbone="stub")
    state = run.initial()
    one = trees.count_parameters(state.params["block"]) // run.llava.targets().layers
    info = run.info(1)
    modules = np.zeros_like(state.memory["modules"])
    modules[:, 0] = 1
    modules[-1, 1] = 1  # the second task grew the uppermost layer
    grown = dataclasses.replace(state, memory=state.memory | {"modules": modules})
    assert method.stored_parameters(grown, info) == one * (run.llava.targets().layers + 1)
    last = stages("sema")[-1]
    assert METHODS["sema"]().stored_parameters(last.state, last.info) == PER_RANK // 32 * 16 * (32 + 7 * 8), "all that may grow"
