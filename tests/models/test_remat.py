"""Rematerialisation of the decoder's layers: no policy changes a gradient, and each recomputes what it says."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.core import stack
from proglora_jax.core.types import Adapter, each_linear
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig

CONFIG = LlavaConfig(
    text_config=LlamaConfig(32, 24, 40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    vision_config=ClipConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2),
    image_token_id=31,
)


def delta(name, leaves, context, gates, x):
    """One block whose inner product carries the name that the policies know."""
    return checkpoint_name(x @ leaves["a"], "low_rank") @ leaves["b"]


@pytest.fixture(scope="module")
def setup():
    """(loss(leaves, policy), leaves)."""
    rng = np.random.default_rng(0)
    llava = random_llava(CONFIG, seed=3)
    x = jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32)

    def draw(*shape):
        return jnp.asarray(0.1 * rng.standard_normal((2, *shape)), jnp.float32)

    leaves = {name: {"a": draw(d, 3), "b": draw(3, o)} for name, (d, o) in llava.targets().linears.items()}

    def loss(leaves, policy):
        return jnp.sum(llava.decode(x, adapter=Adapter(leaves, {}, None, each_linear(delta)), remat=policy).hidden ** 3)

    return loss, leaves


@pytest.mark.parametrize("policy", ["full", "qkvo_mlp"])
def test_gradients_stay(setup, policy):
    loss, leaves = setup
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for actual, expected in zip(jax.tree.leaves(gradient(leaves, policy)), jax.tree.leaves(gradient(leaves, "none"))):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_policies_recompute_what_they_say(setup):
    loss, leaves = setup

    def dots(policy):
        return str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(leaves, policy)).count("dot_general[")

    extra = {policy: dots(policy) - dots("none") for policy in stack.REMAT_POLICIES}
    # Everything but what nothing reads: the last linear and its adapter's second product, and the sum over values by attention,
    # whose reader needs only what that sum is made of.
    assert extra["full"] >= 7 + 2 * 7 + 2 - 3
    assert extra["qkvo_mlp"] == 1  # attention scores
    assert extra["qkvo_mlp"] < extra["qkvo"] < extra["full"]
    assert extra["none"] == 0 < extra["dots"] < extra["qkvo"]


@pytest.fixture
def fused(monkeypatch):
    """(loss(attention, policy), leaves) of a model that fused kernels take, to be traced: neither a GPU nor a TPU is here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    text = LlamaConfig(32, 256, 40, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
    llava = random_llava(dataclasses.replace(CONFIG, text_config=text), seed=3)
    x = jnp.ones((2, 128, 256), jnp.bfloat16)
    shapes = {name: {"a": (3, d, 4), "b": (3, 4, o)} for name, (d, o) in llava.targets().linears.items()}
    leaves = jax.tree.map(lambda shape: jnp.ones(shape, jnp.bfloat16), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def loss(attention, policy):
        model = llava.with_settings(Settings("bfloat16", attention))
        decode = lambda leaves: model.decode(x, adapter=Adapter(leaves, {}, None, each_linear(delta)), remat=policy)
        return lambda leaves: jnp.sum(decode(leaves).hidden.astype(jnp.float32))

    return loss, leaves


def traced(fused, attention, policy):
    """The gradient's program."""
    loss, leaves = fused
    return jax.make_jaxpr(jax.grad(loss(attention, policy)))(leaves)


def test_cudnn_s_attention_is_not_run_again(fused):
    runs = {policy: str(traced(fused, "cudnn", policy)).count("dot_product_attention_fwd_wrapper[") for policy in stack.REMAT_POLICIES}
    assert runs == {"none": 1, "full": 2, "dots": 2, "qkvo": 1, "qkvo_mlp": 1}


@pytest.mark.parametrize("attention", ["cudnn", "splash"])
def test_of_a_fused_attention_output_and_statistics_are_kept_once(fused, attention):
    def kept(attention, policy):
        """Bytes that the forward pass over the layers leaves to the backward pass."""
        forward, _ = (eqn for eqn in traced(fused, attention, policy).eqns if eqn.primitive.name == "scan")
        left = forward.outvars[forward.params["num_carry"] :]
        return sum(math.prod(one.aval.shape) * one.aval.dtype.itemsize for one in left)

    statistics = 3 * 2 * 2 * 128 * 4  # of layers, rows, heads and positions, in float32
    assert [kept(attention, policy) - kept("xla", policy) for policy in ("qkvo", "qkvo_mlp")] == [statistics] * 2
