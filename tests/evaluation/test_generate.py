"""Greedy generation against transformers' generate, in batches and alone, and its stopping rules."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import torch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.core.types import Adapter, each_linear
from proglora_jax.evaluation.generate import generate

NEW = 8


@functools.partial(jax.jit, static_argnames=("with_images", "new"))
def compiled(llava, batch, limits, with_images, new):
    return generate(llava, batch, max_new_tokens=new, with_images=with_images, **limits)


def run(llava, batch, eos_id, vocab_limit=tiny_hf.VOCAB, with_images=True, new=NEW, pad_id=0):
    """One program for most tests: all but the shapes is an argument of it."""
    return compiled(llava, batch, dict(eos_id=eos_id, pad_id=pad_id, vocab_limit=vocab_limit), with_images, new)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(transformers' model, ours, a mixed batch, transformers' answers alone and without EOS: i64[B, NEW])."""
    theirs = tiny_hf.make("grouped", seed=1)
    folder = tmp_path_factory.mktemp("generate")
    theirs.save_pretrained(folder)
    tokens, length, image = tiny_hf.batch(theirs, np.random.default_rng(5), lengths=(14, 9, 6, 11), images=(True, True, False, True))
    batch = dict(tokens=tokens, length=length, image=image, valid=np.ones(4, bool))
    return theirs, load_llava(folder, jnp.float32), batch, reference(theirs, batch, eos=None)


def reference(theirs, batch, eos):
    """transformers' answers, one row at a time, padded with -1 after EOS."""
    answers = np.full((len(batch["length"]), NEW), -1)
    for row, length in enumerate(batch["length"]):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        inputs = tiny_hf.torch_inputs(one["tokens"][:, :length], one["length"], one["image"])
        with torch.no_grad():
            ids = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0)[0, length:]
        answers[row, : len(ids)] = ids
    return answers


def test_a_batch_gives_transformers_tokens(models):
    theirs, ours, batch, expected = models
    assert len(np.unique(expected)) > 4, "the oracle should not repeat one token"
    result = run(ours, batch, eos_id=-5)
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_array_equal(result.count, [NEW] * 4)
    assert np.all(result.hit_cap)


def test_rows_end_at_eos_as_in_transformers(models):
    theirs, ours, batch, free = models
    eos = int(free[0, 3])
    expected = reference(theirs, batch, eos)
    result = run(ours, batch, eos_id=eos, pad_id=7)
    np.testing.assert_array_equal(result.tokens, np.where(expected == -1, 7, expected))
    ended = (expected == eos).any(axis=1)
    assert 0 < ended.sum()
    np.testing.assert_array_equal(result.hit_cap, ~ended)
    np.testing.assert_array_equal(result.count, np.where(ended, (expected == eos).argmax(axis=1), NEW))


def test_a_row_alone_and_padded_further_gives_the_same_tokens(models):
    _, ours, batch, expected = models
    for row in (1, 2):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        wide = {**one, "tokens": np.pad(one["tokens"], ((0, 0), (0, 5)), constant_values=tiny_hf.PAD)}
        np.testing.assert_array_equal(run(ours, wide, eos_id=-5).tokens[0], expected[row])
    text = {name: value[2:3] for name, value in batch.items()}
    np.testing.assert_array_equal(run(ours, text, eos_id=-5, with_images=False).tokens[0], expected[2])


def test_filler_rows_get_nothing_and_do_not_prolong_the_loop(models):
    _, ours, batch, expected = models
    valid = np.array([True, False, True, False])
    result = run(ours, {**batch, "valid": valid}, eos_id=-5)
    np.testing.assert_array_equal(result.tokens, np.where(valid[:, None], expected, 0))
    np.testing.assert_array_equal(result.count, valid * NEW)
    np.testing.assert_array_equal(result.hit_cap, valid)


def test_ids_past_the_limit_are_never_chosen(models):
    _, ours, batch, expected = models
    limit = int(np.median(expected))
    result = run(ours, batch, eos_id=-5, vocab_limit=limit)
    assert result.tokens.max() < limit <= expected.max()


def test_the_cap_counts(models):
    _, ours, batch, expected = models
    result = run(ours, batch, eos_id=int(expected[0, 0]), new=1)
    np.testing.assert_array_equal(result.tokens, expected[:, :1])
    np.testing.assert_array_equal(result.hit_cap, expected[:, 0] != expected[0, 0])


def test_gates_are_asked_once_and_travel_with_the_cache(models):
    """Gates per row from the prompt; the oracle decodes without a cache, whole sequence by whole sequence, gates held."""
    _, ours, batch, bare = models
    rng = np.random.default_rng(2)
    targets = ours.targets()
    leaves = {
        name: {
            "a": jnp.asarray(rng.standard_normal((targets.layers, d, 2)), jnp.float32),
            "b": jnp.asarray(rng.standard_normal((targets.layers, 2, o)), jnp.float32),
        }
        for name, (d, o) in targets.linears.items()
    }
    asked = []

    def delta(name, leaves, context, gates, x):
        return gates * (x @ leaves["a"] @ leaves["b"])

    def make_adapter(x, batch):
        asked.append(x.shape)
        return Adapter(leaves, {}, 0.2 * jnp.tanh(x[:, :3].sum(axis=(1, 2)))[:, None, None], each_linear(delta))

    # Also without the entries that may be left out: valid and vocab_limit.
    bare_batch = {name: batch[name] for name in ("tokens", "length", "image")}
    result = jax.jit(lambda llava, batch: generate(llava, batch, make_adapter, max_new_tokens=NEW, eos_id=-5, pad_id=0))(ours, bare_batch)
    assert len(asked) == 1
    image = ours.project(ours.encode_image(jnp.asarray(batch["image"])))
    adapter = make_adapter(ours.embed(batch["tokens"], image), batch)
    whole = jax.jit(lambda tokens: ours.logits(ours.decode(ours.embed(tokens, image), adapter=adapter).hidden))
    tokens = np.pad(batch["tokens"], ((0, 0), (0, NEW)))
    rows = np.arange(len(tokens))
    for step in range(NEW):
        position = batch["length"] + step
        tokens[rows, position] = np.argmax(whole(tokens)[rows, position - 1], axis=-1)
        np.testing.assert_array_equal(result.tokens[:, step], tokens[rows, position])
    assert np.any(result.tokens != bare)
