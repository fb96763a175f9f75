"""Prompts that are read in two parts, the beginning into a cache and the rest on it, against prompts that are read at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_last_layer import WIDTH, adapter_of, mean_pooled, model

from proglora_jax.core.types import each_linear
from proglora_jax.models.llama import Cache

START, REST = 4, 6


def beginnings(cache: Cache, places: int) -> Cache:
    """A cache that holds the first START positions alone."""
    cut = lambda leaf: jnp.pad(leaf[:, :, :START], [(0, 0), (0, 0), (0, places - START), (0, 0), (0, 0)], constant_values=9.0)
    return Cache(cut(cache.key), cut(cache.value))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapter"])
def test_the_rest_on_a_cache_is_the_rest_of_the_whole(layers, adapted, rng):
    llava = model(layers)
    adapter = adapter_of(llava) if adapted else None
    x = jnp.asarray(rng.standard_normal((2, START + REST, WIDTH)), jnp.float32)
    whole = jax.jit(lambda x: llava.decode(x, adapter=adapter, cache_size=START + REST + 2))(x)
    cache = beginnings(whole.cache, START + REST + 2)
    rest = jax.jit(lambda x, cache: llava.decode(x, cache=cache, start=START, adapter=adapter))(x[:, START:], cache)
    np.testing.assert_allclose(rest.hidden, whole.hidden[:, START:], rtol=1e-5, atol=1e-5)
    for own, other in zip(jax.tree.leaves(rest.cache), jax.tree.leaves(whole.cache), strict=True):
        np.testing.assert_allclose(own[:, :, : START + REST], other[:, :, : START + REST], rtol=1e-5, atol=1e-5)
    wanted = jnp.array([[5, 0], [2, 2]])
    cut = jax.jit(lambda x, cache: llava.decode(x, cache=cache, start=START, adapter=adapter, positions=wanted))(x[:, START:], cache)
    np.testing.assert_allclose(cut.hidden, jnp.take_along_axis(rest.hidden, wanted[..., None], axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cut.cache.key, rest.cache.key, rtol=1e-5, atol=1e-5)


def test_a_token_after_both_parts_sees_both(rng):
    llava = model()
    x = jnp.asarray(rng.standard_normal((2, START + REST + 1, WIDTH)), jnp.float32)
    expected = llava.decode(x).hidden[:, -1:]
    cache = beginnings(llava.decode(x, cache_size=x.shape[1]).cache, x.shape[1])
    cache = llava.decode(x[:, START:-1], cache=cache, start=START).cache
    position = jnp.full((2,), START + REST)
    np.testing.assert_allclose(llava.decode(x[:, -1:], cache=cache, position=position).hidden, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused(rng):
    llava = model()
    x = jnp.asarray(rng.standard_normal((2, START + REST, WIDTH)), jnp.float32)
    cache = llava.decode(x, cache_size=START + REST).cache
    with pytest.raises(ValueError, match="the cache has 10 places, 14 are needed"):
        llava.decode(x, cache=cache, start=START)
    fine = adapter_of(llava)
    for wrong in (
        dataclasses.replace(fine, delta=each_linear(mean_pooled), by_position=False),
        dataclasses.replace(fine, layer_gate=lambda leaves, gates, h: {}),
        dataclasses.replace(fine, observe=lambda *_: {}),
    ):
        with pytest.raises(ValueError, match="the adapter depends on the whole prompt"):
            llava.decode(x[:, START:], cache=cache, start=START, adapter=wrong)


def test_bfloat16(rng):
    llava = model(dtype="bfloat16")
    x = jnp.asarray(rng.standard_normal((2, START + REST, WIDTH)), jnp.float32)
    whole = llava.decode(x, cache_size=START + REST)
    rest = llava.decode(x[:, START:], cache=beginnings(whole.cache, START + REST), start=START)
    assert rest.hidden.dtype == rest.cache.key.dtype == jnp.bfloat16
    near = dict(rtol=0.05, atol=0.05)
    np.testing.assert_allclose(rest.hidden.astype(jnp.float32), whole.hidden[:, START:].astype(jnp.float32), **near)
