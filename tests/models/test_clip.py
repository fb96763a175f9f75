"""The vision tower against transformers' CLIPVisionModel, after every layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import torch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig


@pytest.mark.parametrize("case", ["plain", "odd_widths", "theta"])
def test_states_after_every_layer(case, rng, tmp_path):
    theirs = tiny_hf.make(case)
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    side = ours.config.vision_config.image_size
    image = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        states = theirs.model.vision_tower(torch.tensor(image.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    assert len(states) == ours.config.vision_config.num_hidden_layers + 1

    @jax.jit
    def all_states(vision, image):
        return [vision(image, count, Settings()) for count in range(len(states))]

    for actual, expected in zip(all_states(ours.vision, image), states):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _tiny(**fields):
    text = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = ClipConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=4, patch_size=2)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_id=15, **fields)


def test_layers_after_the_feature_layer_do_not_matter(rng):
    llava = random_llava(_tiny(vision_feature_layer=-2))
    image = jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32)
    tree = llava.to_tree()
    tree["vision"]["layers"] = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), tree["vision"]["layers"])
    tree["vision"]["post_layernorm"] = jax.tree.map(lambda leaf: leaf * jnp.nan, tree["vision"]["post_layernorm"])
    damaged = llava.from_tree(llava.config, tree)
    encode = jax.jit(lambda llava: llava.encode_image(image))
    np.testing.assert_array_equal(encode(damaged), encode(llava))
    assert encode(llava).shape == (1, 4, 8)


def test_class_token_is_kept_by_the_full_strategy(rng):
    image = jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32)
    default = random_llava(_tiny())
    full = default.from_tree(_tiny(vision_feature_select_strategy="full"), default.to_tree())
    whole = full.encode_image(image)
    assert whole.shape == (1, full.config.image_tokens, 8) == (1, 5, 8)
    np.testing.assert_allclose(whole[:, 1:], default.encode_image(image), rtol=1e-6)
    np.testing.assert_allclose(default.image_summary(image), whole[:, 0], rtol=1e-6)
    np.testing.assert_allclose(default.image_summary(image, pool="mean"), whole[:, 1:].mean(axis=1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pool='max' is unknown: choose class or mean"):
        default.image_summary(image, pool="max")


def test_gradient_enters_the_tower_only_where_asked(rng):
    llava = random_llava(_tiny())
    image = jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(tree, trainable):
        def loss(tree):
            return jnp.sum(llava.from_tree(llava.config, tree).encode_image(image, trainable=trainable) ** 2)

        return jax.grad(loss)(tree)["vision"]["layers"]["fc1"]["kernel"]

    assert not np.any(gradient(llava.to_tree(), False))
    reached = np.abs(gradient(llava.to_tree(), True)).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(reached, [True, True, False])


def test_wrong_image_size_is_named():
    llava = random_llava(_tiny())
    with pytest.raises(ValueError, match=r"image has shape \[1, 5, 5, 3\], but the vision tower takes \[B, 4, 4, 3\]"):
        llava.encode_image(jnp.zeros((1, 5, 5, 3)))
