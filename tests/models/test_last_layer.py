"""The last layer computed where its result is wanted, against the whole layer: states, gradients, cache, and what is saved."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.adapters.lowrank import pooled_low_rank
from proglora_jax.core import stack
from proglora_jax.core.types import Adapter, each_linear
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training.flops import matmul_work

WIDTH, INNER, POOL, RANK = 24, 40, 6, 3
VISION = ClipConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2)
WANTED = np.array([[4, 8, 0], [7, 3, 3]], np.int32)  # in no order, one twice, one of the first position as padding is


def model(layers: int = 3, **settings):
    text = LlamaConfig(32, WIDTH, INNER, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
    return random_llava(LlavaConfig(text_config=text, vision_config=VISION, image_token_id=31), seed=3, settings=Settings(**settings))


def pooled(name, leaves, context, gates, x):
    """A pool and a trainable block, all ranks gated by row."""
    gate = lambda count: jnp.broadcast_to(gates[:, None, None], (len(gates), 1, count))
    return pooled_low_rank(x, leaves["pool_a"], leaves["pool_b"], gate(POOL), leaves["a"], leaves["b"], gate(RANK), 0.5, "delta")


def mean_pooled(name, leaves, context, gates, x):
    """A delta that reads all positions."""
    return jnp.broadcast_to(x.mean(axis=1, keepdims=True) @ leaves["a"] @ leaves["b"], (*x.shape[:2], leaves["b"].shape[-1]))


def adapter_of(llava, seed=0, **fields) -> Adapter:
    rng, targets = np.random.default_rng(seed), llava.targets()
    draw = lambda *shape: jnp.asarray(0.2 * rng.standard_normal((targets.layers, *shape)), jnp.float32)
    leaves = {name: {"a": draw(d_in, RANK), "b": draw(RANK, d_out), "pool_a": draw(d_in, POOL), "pool_b": draw(POOL, d_out)}
              for name, (d_in, d_out) in targets.linears.items()}
    return dataclasses.replace(Adapter(leaves, {}, jnp.float32([0.5, 1.5]), each_linear(pooled), resting=("pool_a", "pool_b")), **fields)


def gather(hidden):
    return jnp.take_along_axis(hidden, WANTED[..., None], axis=1)


def inputs(rng):
    return jnp.asarray(rng.standard_normal((2, 9, WIDTH)), jnp.float32)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_states_at_positions_are_those_of_the_whole_layer(layers, rng):
    llava, x = model(layers), inputs(rng)
    for adapter in (None, adapter_of(llava)):
        cut = jax.jit(lambda x: llava.decode(x, adapter=adapter, positions=jnp.asarray(WANTED)).hidden)(x)  # noqa: B023
        whole = jax.jit(lambda x: llava.decode(x, adapter=adapter).hidden)(x)  # noqa: B023
        assert cut.shape == (2, 3, WIDTH)
        np.testing.assert_allclose(cut, gather(whole), rtol=1e-5, atol=1e-5)


# With a loop over the layers before the last one, and without.
@pytest.mark.parametrize("remat, unroll", [*((policy, 1) for policy in stack.REMAT_POLICIES), ("none", 2), ("qkvo_mlp", 2)])
def test_gradients_are_those_of_the_whole_layer_under_every_policy(remat, unroll, rng):
    llava, x = model(unroll=unroll), inputs(rng)
    adapter = adapter_of(llava)

    def loss(trained, x, states):
        leaves = {name: {**adapter.leaves[name], **leaf} for name, leaf in trained.items()}
        return (states(x, dataclasses.replace(adapter, leaves=leaves)) ** 3).sum()

    cut = lambda x, adapter: llava.decode(x, adapter=adapter, positions=jnp.asarray(WANTED), remat=remat).hidden
    whole = lambda x, adapter: gather(llava.decode(x, adapter=adapter).hidden)
    trained = {name: {leaf: leaves[leaf] for leaf in ("a", "b")} for name, leaves in adapter.leaves.items()}
    own, expected = (jax.jit(jax.grad(lambda *a: loss(*a, states), (0, 1)))(trained, x) for states in (cut, whole))  # noqa: B023
    for actual, reference in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_bfloat16_and_hidden_keys(rng):
    """Keys behind a row's length stay hidden from the few queries too."""
    llava, x, length = model(dtype="bfloat16"), inputs(rng), jnp.array([9, 5])
    cut = llava.decode(x, length=length, positions=jnp.asarray(WANTED)).hidden
    whole = gather(llava.decode(x, length=length).hidden)
    assert cut.dtype == jnp.bfloat16
    np.testing.assert_allclose(cut.astype(jnp.float32), whole.astype(jnp.float32), rtol=0.05, atol=0.05)


def test_prefill_fills_the_cache_and_contexts_of_all_layers(rng):
    llava, x = model(), inputs(rng)
    gate = lambda layer, gates, h: {"mean": h.mean(axis=(1, 2))}
    adapter = adapter_of(llava, layer_gate=gate)
    run = lambda **options: jax.jit(lambda x: llava.decode(x, adapter=adapter, cache_size=11, **options))(x)
    cut, whole = run(positions=jnp.asarray(WANTED)), run()
    np.testing.assert_allclose(cut.hidden, gather(whole.hidden), rtol=1e-5, atol=1e-5)
    for actual, expected in zip(jax.tree.leaves((cut.cache, cut.contexts)), jax.tree.leaves((whole.cache, whole.contexts)), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert cut.cache.key.shape == (3, 2, 11, 2, 6) and not np.any(cut.cache.value[:, :, 9:])


def test_an_adapter_that_reads_all_positions_gets_them(rng):
    llava, x = model(), inputs(rng)
    adapter = adapter_of(llava, delta=each_linear(mean_pooled), by_position=False)
    cut = llava.decode(x, adapter=adapter, positions=jnp.asarray(WANTED)).hidden
    np.testing.assert_array_equal(cut, gather(llava.decode(x, adapter=adapter).hidden))


def test_an_adapter_that_observes_prompts_sees_all_positions_in_prefill_alone(rng):
    llava, x, seen = model(), inputs(rng), []

    def observe(name, leaves, context, gates, x):
        seen.append(x.shape[1])
        return x.mean(axis=(1, 2))

    adapter = adapter_of(llava, observe=observe)
    prefill = llava.decode(x, adapter=adapter, positions=jnp.asarray(WANTED), cache_size=9)
    assert set(seen) == {9} and prefill.contexts["linears"]["o_proj"].shape == (3, 2)
    assert prefill.hidden.shape == (2, 3, WIDTH)


def counted(function, *args) -> float:
    return matmul_work(jax.jit(function).trace(*args).jaxpr).total


def test_the_last_layer_costs_keys_and_values_and_the_positions_alone():
    llava = model(layers=4)
    x = jnp.zeros((2, 9, WIDTH))
    cut = counted(lambda x: llava.decode(x, positions=jnp.asarray(WANTED)).hidden, x)
    whole = counted(lambda x: llava.decode(x).hidden, x)
    linears = 2 * (2 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # q, o and the MLP
    assert whole - cut == 2 * (9 - 3) * (linears + 2 * 2 * 9 * WIDTH)  # and both products of attention


def test_no_copy_of_the_stacked_weights_is_kept_for_the_backward_pass():
    """With nothing recomputed, weights of a layer that are read by index count as values to keep unless told otherwise."""

    def planned(layers: int) -> tuple[int, int]:
        wide = LlamaConfig(32, 128, 512, num_hidden_layers=layers, num_attention_heads=4)
        llava = random_llava(LlavaConfig(text_config=wide, vision_config=VISION, image_token_id=31), seed=3)
        adapter = adapter_of(llava)
        part = lambda *keys: {name: {key: leaves[key] for key in keys} for name, leaves in adapter.leaves.items()}

        def loss(trained, llava, rest, x):
            own = dataclasses.replace(adapter, leaves={name: {**rest[name], **trained[name]} for name in trained})
            return (llava.decode(x, adapter=own, positions=jnp.asarray(WANTED)).hidden ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(part("a", "b"), llava, part(*adapter.resting), jnp.zeros((2, 9, 128))).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(llava.language.layers))

    (few, weights), (many, twice) = planned(4), planned(8)
    assert many - few < (twice - weights) / 2
