"""Batches of text alone in buckets shorter than an image: the same loss, gradients and answers as in long ones."""

from __future__ import annotations

import dataclasses

import harness
import jax
import numpy as np
import optax
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.models.llava import random_llava
from proglora_jax.training import loop
from proglora_jax.training import step as steps_of

SHORT, LONG, SIDE = 12, 40, 16
WIDE = dataclasses.replace(tiny_llava.CONFIG, vision_config=dataclasses.replace(tiny_llava.CONFIG.vision_config, image_size=SIDE))


def begun(name: str) -> tuple[harness.Harness, object, dict]:
    """A method on a backbone with images of 16 positions, in its first stage, every parameter moved at random."""
    assert WIDE.image_tokens == 16 > SHORT
    run = harness.Harness(harness.small(name, dropout=0.0), total=2)
    run.__dict__["llava"] = meshes.put_replicated(random_llava(WIDE, seed=3), run.mesh)
    state = run.method.start_task(run.initial(), run.info(0), None)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), state.params)
    return run, dataclasses.replace(state, params=moved), run.method.trainable_mask(state, run.info(0))


def texts(positions: int, labels: int = 5) -> codes.Batch:
    """Eight rows without an image, padded to so many positions; without label slots they are prompts."""
    rng = np.random.default_rng(4)
    rows = [tiny_llava.row(rng, image=False, words=2 + i % 4, answer=(1 + i % 3) * bool(labels), example=i) for i in range(8)]
    return codes.collate(rows, (positions, labels), tiny_llava.PAD, (SIDE, SIDE))


@pytest.mark.parametrize("name", ["lora", "proglora_dynamic", "branchlora"])
def test_loss_and_gradients_do_not_depend_on_the_bucket(name):
    run, state, mask = begun(name)
    trainable, frozen = trees.partition(state.params, mask)
    phase = run.method.phases(run.info(0))[0]
    found = []
    for positions in (SHORT, LONG):
        begin = loop.start_phase(jax.tree.map(np.array, trainable), run.train, run.mesh)
        held = meshes.put_replicated((frozen, state.memory), run.mesh)
        _, optimizer, metrics = run.step(False, phase.program())(
            begin.trainable, begin.optimizer, *held, run.llava, meshes.put_batch(texts(positions), run.mesh), run.control(0, 0, 10, phase))
        adam = next(part for part in optimizer if isinstance(part, optax.ScaleByAdamState))
        found.append((float(metrics["loss"]), {path: np.asarray(leaf) for path, leaf in trees.flatten(adam.mu).items()}))
    (short, ours), (long, theirs) = found
    assert np.isfinite(short) and short > 0.5
    np.testing.assert_allclose(short, long, rtol=1e-6)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in theirs.values())
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-4, atol=1e-7, err_msg=path)


def test_answers_do_not_depend_on_the_prompts_length():
    run, state, _ = begun("proglora_dynamic")
    answers = []
    for positions in (SHORT, LONG):
        generate = steps_of.make_generator(run.method, run.mesh, 4, tiny_llava.EOS, tiny_llava.PAD, tiny_llava.VOCAB)
        held = meshes.put_replicated((state.params, state.memory), run.mesh)
        answers.append(generate(*held, run.llava, meshes.put_batch(texts(positions, 0), run.mesh), state.stage))
    np.testing.assert_array_equal(answers[0]["tokens"], answers[1]["tokens"])
    np.testing.assert_allclose(answers[0]["gates"], answers[1]["gates"], rtol=1e-5)
