"""Answers whose prompts share their beginnings against answers to whole prompts, for every method whose adapter is fixed at test."""

from __future__ import annotations

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.methods.registry import METHODS, NAMES
from proglora_jax.training import step as steps_of
from proglora_jax.training.collectives import collectives
from proglora_jax.training.flops import matmul_work
from proglora_jax.training.prefix import make_prefix_generator

NEW, IMAGES = 6, 4
START = 1 + tiny_llava.PATCHES  # BOS and the image
# By row its image: groups of 4, 2 and 1, in no order; the last place for an image stays empty, and so does the last row.
SLOTS = [0, 2, 0, 1, 0, 2, 0, 0]
FIXED = [name for name in NAMES if METHODS[name].fixed_at_test]


def noisy(tree, seed):
    """A tree whose float leaves are far from what they begin as."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(np.shape(leaf)).astype(np.float32), tree)


@functools.cache
def world(name: str, shape: tuple = ()):
    """A harness, and a state of its third task with blocks that all do something."""
    run = harness.Harness(harness.small(name), shape=dict(shape))
    state = run.initial()
    for index in range(3):
        state = dataclasses.replace(run.method.start_task(state, run.info(index), run.probe))
        state = dataclasses.replace(state, params=noisy(state.params, index))
    return run, state


def prompts(slots=SLOTS, seed=0):
    """Questions of unequal lengths about the images of their slots; the last is a filler."""
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((len(slots), tiny_llava.SIDE, tiny_llava.SIDE, 3)).astype(np.float32)
    rows = [tiny_llava.row(rng, index % 3, answer=0, words=1 + index, example=index) for index in range(len(slots))]
    return [dataclasses.replace(row, image=pixels[slot], valid=index + 1 < len(slots))
            for index, (row, slot) in enumerate(zip(rows, slots, strict=True))]  # fmt: skip


def whole(rows):
    return tiny_llava.batch(rows, 20, 0)


def shared(rows, slots=SLOTS, images=IMAGES):
    """The same rows as a batch grouped by image, made by hand."""
    rest = [dataclasses.replace(row, tokens=row.tokens[START:], segments=row.segments[START:], image=None) for row in rows]
    batch = tiny_llava.batch(rest, 20 - START, 0)
    pixels = np.zeros((images, tiny_llava.SIDE, tiny_llava.SIDE, 3), np.float32)
    for row, slot in zip(rows, slots, strict=True):
        pixels[slot] = row.image
    fields = {name: batch[name] for name in ("tokens", "segments", "length", "task_id", "example", "valid")}
    return fields | {
        "slot": np.asarray(slots, np.int32), "image": pixels,
        "prefix_tokens": np.tile(rows[0].tokens[:START], (images, 1)), "prefix_segments": np.tile(rows[0].segments[:START], (images, 1)),
        "prefix_task_id": np.full(images, rows[0].task_id, np.int32),
    }  # fmt: skip


def traced(make, run, state, batch, eos=tiny_llava.EOS, new=NEW):
    generate = make(run.method, run.mesh, new, eos, tiny_llava.PAD, tiny_llava.VOCAB)
    held = meshes.put_replicated((state.params, state.memory), run.mesh)
    arguments = (*held, run.llava, meshes.put_batch(batch, run.mesh), state.stage)
    return generate, arguments


def answers(make, run, state, batch, **options):
    generate, arguments = traced(make, run, state, batch, **options)
    return jax.tree.map(np.asarray, generate(*arguments))


@pytest.mark.parametrize("name", FIXED)
def test_answers_are_those_to_whole_prompts(name):
    run, state = world(name)
    rows = [dataclasses.replace(row, task_id=1) for row in prompts()]
    free = answers(steps_of.make_generator, run, state, whole(rows), eos=-5)
    assert len(np.unique(free["tokens"])) > 4 and free["hit_cap"][:-1].all()
    eos = int(free["tokens"][0, 2])  # some rows end by it, others at the cap
    for stop in (-5, eos):
        expected = free if stop == -5 else answers(steps_of.make_generator, run, state, whole(rows), eos=stop)
        found = answers(make_prefix_generator, run, state, shared(rows), eos=stop)
        assert found.keys() == expected.keys()
        for field, value in expected.items():
            np.testing.assert_array_equal(found[field], value, err_msg=field)
    assert expected["hit_cap"][:-1].any() and not expected["hit_cap"][:-1].all()


@pytest.mark.parametrize("name", ["lora", "proglora_static"])
def test_scores_of_the_first_token_are_those_of_whole_prompts(name, monkeypatch):
    run, state = world(name)
    rows = [dataclasses.replace(row, task_id=2) for row in prompts()]
    scores = []
    original = type(run.llava).logits

    def noted(self, hidden):
        found = original(self, hidden)
        jax.debug.callback(lambda value: scores.append(np.asarray(value)), found)
        return found

    monkeypatch.setattr(type(run.llava), "logits", noted)
    for make, batch in ((steps_of.make_generator, whole(rows)), (make_prefix_generator, shared(rows))):
        answers(make, run, state, batch, new=1)
        jax.effects_barrier()
    assert len(scores) == 2 and np.abs(scores[0]).max() > 1
    np.testing.assert_allclose(scores[1][:-1], scores[0][:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_methods_say_whether_their_adapter_is_fixed_at_test(name):
    """Prompts that are not numbers show in every gate that is made of them."""
    run, state = world(name)
    batch = tiny_llava.batch(prompts(), 20, 0)
    blank = jnp.full((8, 20, 32), jnp.nan)
    inputs = steps_of.gate_inputs(run.llava, run.method, blank, batch, state.stage, image=jnp.full((8, 16), jnp.nan))
    gates = run.method.gates(state.params, state.memory, inputs)
    adapter = run.method.adapter(state.params, gates, None)
    reads = any(np.isnan(leaf).any() for leaf in jax.tree.leaves(gates) if jnp.issubdtype(leaf.dtype, jnp.floating))
    late = adapter is not None and (adapter.layer_gate is not None or adapter.observe is not None or not adapter.by_position)
    assert run.method.fixed_at_test == (not reads and not late and not run.method.adapts_projector)
    assert not run.method.fixed_at_test or not (
        run.method.regates or run.method.gates_in_layers or run.method.observes or run.method.wants_image)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED])
def test_methods_whose_adapter_depends_on_the_prompt_are_refused(name):
    run = harness.Harness(harness.small(name))
    with pytest.raises(ValueError, match=f"{name}: the adapter depends on the prompt"):
        make_prefix_generator(run.method, run.mesh, NEW, tiny_llava.EOS, tiny_llava.PAD, tiny_llava.VOCAB)


def test_the_program_does_less_by_what_is_read_once():
    run, state = world("lora")
    slots = [0, 0, 0, 0, 1, 1, 1, 1]
    rows = prompts(slots)
    work = []
    for make, batch in ((steps_of.make_generator, whole(rows)), (make_prefix_generator, shared(rows, slots, 2))):
        generate, arguments = traced(make, run, state, batch)
        work.append(matmul_work(generate.trace(*arguments).jaxpr))
    # Places 8 x 20 against 2 x 5 + 8 x 15, of which the images' are read by the tower as well; a token costs the same.
    assert work[1].total < work[0].total * (2 * 5 + 8 * 15) / (8 * 20)
    assert work[1].turn == pytest.approx(work[0].turn, rel=0.01)


@pytest.mark.parametrize("shape", [{"data": 2}, {"data": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "model": 2}], ids=str)
def test_devices_keep_the_keys_of_their_own_images(shape):
    single, state = world("proglora_static")
    run = harness.Harness(harness.small("proglora_static"), shape=shape)
    each = IMAGES // meshes.batch_ways(run.mesh)
    slots = [0, 0, 1, 1, 2, 2, 3, 3] if each == 1 else [0, 1, 0, 1, 2, 3, 3, 2]
    rows = [dataclasses.replace(row, task_id=1) for row in prompts(slots)]
    expected = answers(steps_of.make_generator, single, state, whole(rows))
    batch = shared(rows, slots)
    batch["slot"] = batch["slot"] % each
    generate, arguments = traced(make_prefix_generator, run, state, batch)
    compiled = generate.lower(*arguments).compile()
    np.testing.assert_array_equal(compiled(*arguments)["tokens"], expected["tokens"])
    if list(shape) == ["data"]:  # before the first token nothing is sent that has the size of an image's keys
        config = single.llava.config.text_config
        sent = [one.bytes for one in collectives(compiled.as_text()) if not one.turn]
        assert max(sent) < START * config.num_key_value_heads * config.head_dim * 4
