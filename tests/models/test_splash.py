"""Splash attention against plain attention, by the kernel's interpreter: values, gradients, meshes, and where XLA's is taken."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.continual import compile_ahead
from proglora_jax.core import mesh as meshes
from proglora_jax.models import layers, splash
from proglora_jax.models.layers import Settings, attention
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training.attention_choice import attention_for

interpreted = functools.partial(splash.splash_attention, interpret=True)


def reference(query, key, value):
    """Softmax over the keys up to the query's own, head by head, in numpy's float64."""
    query, key, value = (np.asarray(part, np.float64) for part in (query, key, value))
    share = query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for row, head, at in np.ndindex(query.shape[0], query.shape[2], query.shape[1]):
        scores = key[row, : at + 1, head // share] @ query[row, at, head] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, at, head] = weights @ value[row, : at + 1, head // share] / weights.sum()
    return out


def draw(rng, rows, length, heads, groups):
    shape = lambda count: (rows, length, count, 128)
    return tuple(jnp.asarray(rng.standard_normal(shape(count)), jnp.float32) for count in (heads, groups, groups))


@pytest.mark.parametrize("length, heads, groups", [(5, 2, 2), (130, 2, 1)])
def test_values_are_those_of_a_loop_over_queries(length, heads, groups, rng):
    parts = draw(rng, 1, length, heads, groups)
    np.testing.assert_allclose(interpreted(*parts), reference(*parts), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_plain_attention(rng):
    parts = draw(rng, 2, 9, 2, 1)
    loss = lambda attend: jax.jit(jax.grad(lambda *parts: (attend(*parts) ** 3).sum(), (0, 1, 2)))
    own, expected = loss(interpreted)(*parts), loss(functools.partial(attention, causal=True))(*parts)
    for actual, wanted in zip(own, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "model": 2}, {"data": 8}])
def test_each_device_computes_its_rows_and_heads(shape, rng):
    """Rows that the mesh does not divide are computed everywhere."""
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "model": 1} | shape)
    for rows in (8, 3):
        parts = draw(rng, rows, 5, 2, 2)
        function = jax.jit(meshes.on_mesh(lambda *parts: interpreted(*parts), mesh))
        placed = meshes.put_batch(dict(enumerate(parts)), mesh) if rows == 8 else meshes.put_replicated(dict(enumerate(parts)), mesh)
        np.testing.assert_allclose(function(*placed.values()), reference(*parts), rtol=1e-4, atol=1e-5)
        if rows == 8:
            jaxpr = str(function.trace(*parts).jaxpr)
            assert "shard_map" in jaxpr and f"f32[{8 // meshes.batch_ways(mesh)},5,{2 // mesh.shape['model']},128]" in jaxpr


def test_a_model_takes_the_kernel_for_whole_sequences_and_xla_for_the_rest(rng, monkeypatch):
    """Training and prefill agree with plain attention; the vision tower, hidden keys and single queries do not ask for the kernel."""
    calls = []

    def watched(query, key, value):
        calls.append(query.shape)
        return interpreted(query, key, value)

    monkeypatch.setattr(layers, "splash_attention", watched)
    text = LlamaConfig(32, 256, 64, num_hidden_layers=2, num_attention_heads=2)
    vision = ClipConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2)
    plain = random_llava(LlavaConfig(text_config=text, vision_config=vision, image_token_id=31), seed=3)
    fused = plain.with_settings(Settings(attention="splash"))
    x, image = jnp.asarray(rng.standard_normal((1, 7, 256)), jnp.float32), jnp.ones((1, 4, 4, 3))
    np.testing.assert_array_equal(fused.encode_image(image), plain.encode_image(image))
    fused.decode(x, length=jnp.array([5]))
    assert not calls
    np.testing.assert_allclose(fused.decode(x).hidden, plain.decode(x).hidden, rtol=1e-4, atol=1e-4)
    own, expected = (llava.decode(x, cache_size=9, positions=jnp.array([[6]])) for llava in (fused, plain))
    for actual, wanted in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
    count = len(calls)
    assert count and set(calls) == {(1, 7, 2, 128)}
    fused.decode(x[:, :1], cache=own.cache, position=jnp.array([7]))
    narrow = LlamaConfig(32, 24, 40, num_hidden_layers=2, num_attention_heads=4)
    small = random_llava(LlavaConfig(text_config=narrow, vision_config=vision, image_token_id=31), settings=Settings(attention="splash"))
    small.decode(x[..., :24])
    assert len(calls) == count


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed")
def test_a_described_tpu_gets_the_kernel(monkeypatch):
    for name, value in compile_ahead._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    device = meshes.described_devices("v5e:2x2")[0]
    with jax.default_matmul_precision("default"):  # that of a run; the kernel multiplies in bfloat16 as its inputs are
        assert attention_for("auto", "bfloat16", "tpu", device) == ("splash", "fused kernel on TPU")
    assert attention_for("xla", "bfloat16", "tpu", device) == ("xla", "the config names it")
