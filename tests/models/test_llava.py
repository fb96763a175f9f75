"""The whole LLaVA against transformers', its structure as a pytree."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import torch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.models import layers
from proglora_jax.models.llava import Llava, random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig


@jax.jit
def forward(llava, tokens, image, length=None):
    return llava.logits(llava.decode(llava.embed(tokens, llava.project(llava.encode_image(image))), length=length).hidden)


@jax.jit
def forward_text(llava, tokens):
    return llava.logits(llava.decode(llava.embed(tokens, None)).hidden)


@pytest.mark.parametrize("case", [case for case in tiny_hf.CASES if case != "plain"])
def test_logits_of_a_mixed_padded_batch(case, rng, tmp_path):
    theirs = tiny_hf.make(case)
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    tokens, length, image = tiny_hf.batch(theirs, rng)
    with torch.no_grad():
        expected = theirs(**tiny_hf.torch_inputs(tokens, length, image)).logits.numpy()
    valid = np.arange(tokens.shape[1])[None] < length[:, None]
    actual = np.asarray(forward(ours, tokens, image))
    np.testing.assert_allclose(actual[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_with_lengths_padded_positions_agree_too(rng, tmp_path):
    theirs = tiny_hf.make("plain")
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    tokens, length, image = tiny_hf.batch(theirs, rng)
    with torch.no_grad():
        expected = theirs(**tiny_hf.torch_inputs(tokens, length, image)).logits.numpy()
    np.testing.assert_allclose(forward(ours, tokens, image, length), expected, rtol=1e-4, atol=1e-4)


def test_text_only_rows_ignore_their_image(rng, tmp_path):
    theirs = tiny_hf.make("plain")
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    tokens, length, image = tiny_hf.batch(theirs, rng, lengths=(7, 11), images=(False, False))
    with torch.no_grad():
        expected = theirs(**tiny_hf.torch_inputs(tokens, length, image)).logits.numpy()
    valid = np.arange(tokens.shape[1])[None] < length[:, None]
    for actual in (forward(ours, tokens, image), forward_text(ours, tokens)):
        np.testing.assert_allclose(np.asarray(actual)[valid], expected[valid], rtol=1e-4, atol=1e-4)


def _config(**fields):
    text = LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    vision = ClipConfig(hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2)
    return LlavaConfig(**{**dict(text_config=text, vision_config=vision, image_token_id=11), **fields})


def test_image_features_go_to_image_tokens_in_order(rng):
    llava = random_llava(_config())
    tokens = np.array([[1, 11, 11, 11, 11, 2], [3, 4, 5, 6, 7, 8], [11, 1, 11, 2, 11, 11]], np.int32)
    features = jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32)
    expected = np.array(llava.embed_tokens(tokens))
    for row in range(3):
        expected[row, tokens[row] == 11] = features[row, : (tokens[row] == 11).sum()]
    np.testing.assert_array_equal(llava.embed(tokens, features), expected)


def test_image_token_may_lie_past_the_embedding_table():
    llava = random_llava(_config(image_token_id=40))
    x = llava.embed(jnp.array([[1, 40, 40, 40, 40]]), jnp.ones((1, 4, 8)))
    assert np.all(np.isfinite(x)) and np.all(x[0, 1:] == 1)


def test_projector_may_be_given(rng):
    llava = random_llava(_config())
    features = jnp.asarray(rng.standard_normal((1, 4, 6)), jnp.float32)
    own = llava.projector_params()
    np.testing.assert_array_equal(llava.project(features, own), llava.project(features))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, own)
    assert np.abs(llava.project(features, moved) - llava.project(features)).max() > 0.01


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_a_given_projector_are_not_rounded_to_the_compute_dtype(rng, with_bias):
    """A loop's sums in float64 over what the linear sees: in bfloat16 they would be right to three digits."""
    x, g = (jnp.asarray(rng.standard_normal((2, 5, width)), jnp.bfloat16) for width in (6, 8))
    kernel, bias = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), jnp.zeros(8) if with_bias else None
    y, back = jax.vjp(layers.trained_dense, x, kernel, bias)
    d_x, d_kernel, d_bias = back(g)
    wide = lambda array: np.asarray(array, np.float64)
    np.testing.assert_array_equal(y, layers.dense(x, kernel, bias))
    np.testing.assert_allclose(d_kernel, np.einsum("bpi,bpo->io", wide(x), wide(g)), rtol=1e-5, atol=1e-6)
    assert d_kernel.dtype == jnp.float32 and d_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(d_x), wide(g) @ wide(kernel.astype(jnp.bfloat16)).T, rtol=1e-2, atol=1e-2)
    if with_bias:
        np.testing.assert_allclose(d_bias, wide(g).sum((0, 1)), rtol=1e-5, atol=1e-6)
    else:
        assert d_bias is None


def test_tree_round_trip():
    llava = random_llava(_config())
    tree = llava.to_tree()
    chex.assert_trees_all_equal(Llava.from_tree(llava.config, tree, llava.settings), llava)
    del tree["language"]["norm"]
    with pytest.raises(ValueError, match="no parameter at language/norm/scale"):
        Llava.from_tree(llava.config, tree)


def test_random_parameters_depend_on_seed_and_path_only():
    first, again, other = random_llava(_config(), 1), random_llava(_config(), 1), random_llava(_config(), 2)
    chex.assert_trees_all_equal(first, again)
    kernel = lambda llava: np.asarray(llava.language.layers.q_proj.kernel[...])  # noqa: E731
    assert np.abs(kernel(first) - kernel(other)).max() > 0.1
    more = dataclasses.replace(_config().vision_config, num_hidden_layers=3)
    np.testing.assert_array_equal(kernel(random_llava(_config(vision_config=more), 1)), kernel(first))


def test_object_is_an_argument_of_jit_and_compiles_once():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def total(llava):
        return llava.language.norm.scale[...].sum()

    assert total(random_llava(_config(), 1)) == total(random_llava(_config(), 2)) == 8
