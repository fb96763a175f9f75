"""The decoder against transformers' Llama, layer by layer, and against itself: cache and adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import torch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.core import stack
from proglora_jax.core.types import Adapter, each_linear
from proglora_jax.models.layers import Settings, attention, rope_tables
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig

CONFIG = LlavaConfig(
    text_config=LlamaConfig(32, 24, 40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
    vision_config=ClipConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2),
    image_token_id=31,
)


@pytest.fixture(scope="module")
def llava():
    return random_llava(CONFIG, seed=3)


@pytest.mark.parametrize("case", ["grouped", "odd_widths", "theta"])
def test_every_layer_agrees_with_transformers(case, rng, tmp_path):
    theirs = tiny_hf.make(case)
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    text = ours.config.text_config
    x = rng.standard_normal((2, 9, text.hidden_size)).astype(np.float32)
    with torch.no_grad():
        output = theirs.model.language_model(inputs_embeds=torch.tensor(x), output_hidden_states=True)
    states = [state.numpy() for state in output.hidden_states]

    @jax.jit
    def one_layer(layers, index, h):
        layer = stack.take(layers, index)
        rotation = rope_tables(jnp.arange(9)[None], text.head_dim, text.rope_theta)
        attend = lambda query, key, value: (attention(query, key, value, causal=True), None)  # noqa: E731
        return layer(h, lambda x, *names: tuple(getattr(layer, name)(x) for name in names), rotation, attend)[0]

    for index in range(text.num_hidden_layers):
        h = one_layer(ours.language.layers, index, states[index])
        # The last of transformers' states has been through the final norm.
        h = ours.language.norm(h) if index == text.num_hidden_layers - 1 else h
        np.testing.assert_allclose(h, states[index + 1], rtol=1e-5, atol=1e-5)
    whole = jax.jit(lambda llava, x: llava.decode(x).hidden)(ours, x)
    np.testing.assert_allclose(whole, output.last_hidden_state, rtol=1e-4, atol=1e-4)


def low_rank(llava, rng, rank=3, scale=0.1):
    """Random leaves {name: {"a": [L, d_in, r], "b": [L, r, d_out]}} for all linears."""
    targets = llava.targets()

    def draw(*shape):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return {name: {"a": draw(targets.layers, d, rank), "b": draw(targets.layers, rank, o)} for name, (d, o) in targets.linears.items()}


def delta(name, leaves, context, gates, x):
    """A single block in float32, whatever x's dtype is."""
    return gates * (x.astype(jnp.float32) @ leaves["a"] @ leaves["b"])


def test_one_block_equals_merged_weights(llava, rng):
    leaves = low_rank(llava, rng)
    x = jnp.asarray(rng.standard_normal((2, 7, 24)), jnp.float32)
    tree = llava.to_tree()
    for name, block in leaves.items():
        tree["language"]["layers"][name]["kernel"] += 0.5 * block["a"] @ block["b"]
    merged = llava.from_tree(CONFIG, tree)
    decode = jax.jit(lambda llava, x, adapter: llava.decode(x, adapter=adapter).hidden)
    with_adapter = decode(llava, x, Adapter(leaves, {}, jnp.float32(0.5), each_linear(delta)))
    np.testing.assert_allclose(with_adapter, decode(merged, x, None), rtol=1e-4, atol=1e-5)
    assert np.abs(with_adapter - decode(llava, x, None)).max() > 0.01


def test_a_linear_without_leaves_is_bare(llava, rng):
    leaves = {"v_proj": low_rank(llava, rng)["v_proj"]}
    x = jnp.asarray(rng.standard_normal((1, 4, 24)), jnp.float32)
    seen = []

    def watch(name, leaves, context, gates, x):
        seen.append((name, context))
        return delta(name, leaves, context, gates, x)

    llava.decode(x, adapter=Adapter(leaves, {}, 1.0, each_linear(watch)))
    assert seen == [("v_proj", {})]


def test_layer_gate_sees_the_residual_stream_once_and_travels_with_the_cache(llava, rng):
    leaves = low_rank(llava, rng)
    layer = {"row": jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((2, 6, 24)), jnp.float32)
    calls = []

    def layer_gate(layer_leaves, gates, h):
        calls.append(h.shape)
        return jax.nn.sigmoid(h[:, :5] @ layer_leaves["row"]).mean(axis=1)[:, None, None] * gates

    def gated(name, leaves, context, gates, x):
        return context * (x @ leaves["a"] @ leaves["b"])

    adapter = Adapter(leaves, layer, jnp.float32(2.0), each_linear(gated), layer_gate)
    whole = jax.jit(lambda x: llava.decode(x, adapter=adapter).hidden)(x)
    prefill = jax.jit(lambda x: llava.decode(x, adapter=adapter, cache_size=8))(x[:, :5])
    assert prefill.contexts.shape == (3, 2, 1, 1)
    assert calls == [(2, 6, 24), (2, 5, 24)]  # once per scan, not once per linear
    position, last = jnp.array([5, 5]), x[:, 5:]
    step = jax.jit(lambda out: llava.decode(last, adapter=adapter, cache=out.cache, position=position, contexts=out.contexts))(prefill)
    assert len(calls) == 2
    np.testing.assert_allclose(step.hidden[:, 0], whole[:, 5], rtol=1e-4, atol=1e-5)


def test_stepping_through_the_cache_equals_the_whole_sequence(llava, rng):
    x = jnp.asarray(rng.standard_normal((2, 9, 24)), jnp.float32)
    start = np.array([5, 3], np.int32)
    adapter = Adapter(low_rank(llava, rng), {}, jnp.float32(1.0), each_linear(delta))
    whole = jax.jit(lambda llava, x: llava.decode(x, adapter=adapter).hidden)(llava, x)
    prefill = jax.jit(lambda llava, x: llava.decode(x, adapter=adapter, cache_size=9))(llava, x[:, :5])
    step = jax.jit(lambda llava, x, cache, position: llava.decode(x, adapter=adapter, cache=cache, position=position))
    cache = prefill.cache
    for offset in range(4):
        position = start + offset
        output = step(llava, x[np.arange(2), position][:, None], cache, position)
        cache = output.cache
        np.testing.assert_allclose(output.hidden[:, 0], whole[np.arange(2), position], rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused(llava):
    x = jnp.zeros((1, 2, 24))
    with pytest.raises(ValueError, match="remat='half' is unknown: choose one of none, full"):
        llava.decode(x, remat="half")
    with pytest.raises(ValueError, match="attention='flash' is unknown: choose one of xla, cudnn, splash"):
        Settings(attention="flash")
    with pytest.raises(ValueError, match="attention='cudnn' computes in 16 bits only"):
        Settings(attention="cudnn")
    with pytest.raises(ValueError, match="cache_size=1 is smaller than the 2 positions to store"):
        llava.decode(x, cache_size=1)


def test_bfloat16_computes_in_bfloat16_and_is_close(llava, rng):
    x = jnp.asarray(rng.standard_normal((2, 7, 24)), jnp.float32)
    half = llava.with_settings(Settings(dtype="bfloat16"))
    adapter = Adapter(low_rank(llava, rng), {}, jnp.float32(1.0), each_linear(delta))
    decode = jax.jit(lambda llava: llava.decode(x, adapter=adapter).hidden)
    low, full = decode(half), decode(llava)
    assert low.dtype == jnp.bfloat16 and half.logits(low).dtype == jnp.float32
    assert np.abs(low.astype(jnp.float32) - full).mean() < 0.02 * np.abs(full).mean()
