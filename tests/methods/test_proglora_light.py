"""ProgLoRA (light): what its bottom layers have and lack, what is saved, one loop over all layers, and gates that travel with the cache."""

from __future__ import annotations

import functools

import harness
import hlo_dots
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world
import tiny_llava

from proglora_jax.core import tree as trees
from proglora_jax.data.errors import UserError
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.proglora_light import ProgLoRALight
from proglora_jax.training import step as steps_of

SMALL = dict(rank=2, alpha=4.0, proj_width=5, recall_per_task=8, dropout=0.0)


def light(**fields) -> ProgLoRALight:
    return ProgLoRALight(**(SMALL | {"shared_layers": 1} | fields))


@functools.cache
def third(**fields):
    """A state after three stages."""
    return world.stages(light(**fields), 3)


def test_it_starts_as_the_full_variant_cut_in_two():
    """Bottom layers become the shared block, the others the first block; keys and query projector are the same."""
    whole, cut = world.start(ProgLoRADynamic(**SMALL)), world.start(light())
    for path, leaf in trees.flatten(whole.params["block"]).items():
        joined = np.concatenate([trees.flatten(cut.params["shared"])[path], trees.flatten(cut.params["block"])[path]])
        np.testing.assert_array_equal(joined, leaf)
    rest = ("key", "keys", "query_projector", "mm_projector")
    assert trees.digest({name: whole.params[name] for name in rest}) == trees.digest({name: cut.params[name] for name in rest})
    assert trees.digest(whole.memory) == trees.digest(cut.memory)


@pytest.mark.parametrize("bottom, tie, layers", [("shared_trained", False, 1), ("shared_trained", True, 1), ("none", False, 0)])
def test_a_stage_saves_its_upper_block_and_the_shared_one(bottom, tie, layers):
    state = third(bottom=bottom, tie_bottom_layers=tie)
    tree = light(bottom=bottom, tie_bottom_layers=tie).to_disk(state)
    assert list(tree["pool"]) == ["block_02"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(tree["pool"])} == {world.LAYERS - 1}
    assert {np.shape(leaf)[0] for leaf in jax.tree.leaves(tree["params"].get("shared", {}))} == ({layers} if layers else set())
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.params["pool"])} == {world.LAYERS - 1}
    assert "pool" not in tree["params"] and "block" not in tree["params"]


def test_the_shared_block_goes_on_or_stops():
    for bottom, trains in (("shared_trained", [True] * 3), ("shared_frozen_after_first", [True, False, False])):
        method = light(bottom=bottom)
        found = [method.trainable_mask(third(bottom=bottom), world.info(index))["shared/q_proj/a"] for index in range(3)]
        assert found == trains
    assert not any(path.startswith("shared") for path in light(bottom="none").trainable_mask(third(bottom="none"), world.info(0)))


def test_bottom_layers_do_not_see_gates_and_upper_ones_do():
    method, state, batch = light(), third(), world.batch_of(2)
    gates = method.gates(state.params, state.memory, world.inputs(batch, 2))
    adapter = method.adapter(state.params, gates, None)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, world.WIDTH)), jnp.float32)
    outputs = []
    for layer in range(world.LAYERS):
        once = jax.tree.map(lambda leaf: leaf[layer], adapter.layer)  # noqa: B023
        context = adapter.layer_gate(once, adapter.gates, x)
        own = {name: leaf[layer] for name, leaf in adapter.leaves["q_proj"].items()}
        outputs.append(np.asarray(adapter.delta(("q_proj",), {"q_proj": own}, context, adapter.gates, x)[0]))
    shared = state.params["shared"]["q_proj"]
    np.testing.assert_allclose(outputs[0], 2 * np.asarray(x) @ shared["a"][0] @ shared["b"][0], rtol=1e-4, atol=1e-5)
    weights, expected = np.asarray(gates["blocks"]), 0.0
    for index in range(3):
        block = {name: np.asarray(leaf)[-1] for name, leaf in method.block(state, index)["q_proj"].items()}
        expected = expected + weights[:, index, None, None] * (2 * np.asarray(x) @ block["a"] @ block["b"])
    np.testing.assert_allclose(outputs[1], expected, rtol=1e-4, atol=1e-5)
    assert np.std(weights, axis=0).max() > 1e-3


def test_one_loop_over_all_layers():
    """As many loops as the full variant has, and no matmul more."""
    texts = []
    for method in (ProgLoRADynamic(**SMALL), light()):
        run = harness.Harness(method)
        state = jax.tree.map(np.asarray, run.begin(run.initial(), 0)[0])
        batch = tiny_llava.batch(run.rows(0)[:4])
        texts.append(run.forward.lower(state.params, state.memory, run.llava, batch, state.stage).compile().as_text())
    loops, work = ([measure(text) for text in texts] for measure in (hlo_dots.loop_bodies, hlo_dots.dots))
    assert len(loops[0]) == len(loops[1]) >= 1
    assert sum(work[0]) == sum(work[1])


def test_gates_travel_with_the_cache():
    """Prefill and one step of generation give what the whole sequence gives."""
    run = harness.Harness(light(rank=4))
    state, _ = run.begin(run.initial(), 0)
    state = run.method.end_task(world.train(run.method, state, 0), run.info(0), run.probe)
    state = world.train(run.method, run.begin(state, 1)[0], 1)
    batch = tiny_llava.batch([tiny_llava.row(np.random.default_rng(3), 1, words=4, answer=2) for _ in range(3)])
    n = int(batch["length"][0])
    assert set(batch["length"]) == {n}
    x = tiny_llava.embed_batch(run.llava, state.params, batch)
    gates = run.method.gates(state.params, state.memory, steps_of.gate_inputs(run.llava, run.method, x, batch, state.stage))
    adapter = run.method.adapter(state.params, gates, None)
    whole = run.llava.decode(x[:, :n], adapter=adapter).hidden
    first = run.llava.decode(x[:, : n - 1], adapter=adapter, cache_size=n)
    last = run.llava.decode(
        x[:, n - 1 : n], adapter=adapter, cache=first.cache, position=jnp.full((3,), n - 1), contexts=first.contexts).hidden
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)
    assert first.contexts["pool"].shape[0] == 2


@pytest.mark.parametrize("field, value, sentence", [
    ("shared_layers", 0, "must be >= 1"), ("bottom", "shared", "must be one of 'shared_trained', 'none', 'shared_frozen_after_first'"),
    ("routing_scope", "per_layer", "must be 'global': the bottom layers have no router"),
])  # fmt: skip
def test_bad_values_are_named(field, value, sentence):
    with pytest.raises(UserError, match=rf"config\.method\.{field}=.*{sentence}"):
        light(**{field: value})


def test_a_model_needs_a_layer_above():
    with pytest.raises(UserError, match=r"config\.method\.shared_layers=2: must be less than the model's 2 layers"):
        world.start(light(shared_layers=2))
    with pytest.raises(UserError, match="nothing to tie with bottom='none'"):
        light(bottom="none", tie_bottom_layers=True)
