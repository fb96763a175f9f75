"""Stacked layers: scanning them, running the first few, and what each rematerialisation policy keeps."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.core import stack


def layers(rng):
    return {"w": jnp.asarray(rng.standard_normal((4, 5, 5)), jnp.float32), "b": jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)}


def body(h, layer):
    h = jnp.tanh(h @ layer["w"] + layer["b"])
    return h, h.sum()


@pytest.mark.parametrize("count", [None, 1, 3, 4])
def test_scan_equals_a_loop(rng, count):
    tree, h = layers(rng), jnp.ones((2, 5))
    actual, sums = stack.scan(body, h, tree, count=count)
    expected = []
    for layer in stack.unstack(tree)[:count]:
        h, total = body(h, layer)
        expected.append(total)
    np.testing.assert_allclose(actual, h, rtol=1e-5)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


def test_stack_inverts_unstack(rng):
    tree = layers(rng)
    chex.assert_trees_all_equal(stack.stack(stack.unstack(tree)), tree)
    chex.assert_trees_all_equal(stack.take(tree, 2), stack.unstack(tree)[2])
    assert stack.num_layers(tree) == 4


def test_unknown_policy_is_named():
    with pytest.raises(ValueError, match="remat='some' is unknown: choose one of none, full, dots, qkvo, qkvo_mlp"):
        stack.remat(body, "some")


def test_policies_keep_less_memory_than_none(rng):
    big = {"w": jnp.ones((6, 64, 64)), "b": jnp.ones((6, 64))}

    def loss(tree, policy):
        def deep(h, layer):
            for _ in range(4):
                h = jnp.tanh(h @ layer["w"]) + layer["b"]
            return h, None

        return stack.scan(deep, jnp.ones((256, 64)), tree, policy=policy)[0].sum()

    sizes = {}
    for policy in ("none", "full"):
        compiled = jax.jit(jax.grad(lambda tree: loss(tree, policy))).lower(big).compile()
        sizes[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["full"] < 0.6 * sizes["none"]


@pytest.mark.parametrize("count, unroll", [(None, 4), (3, 3), (3, 9), (4, 2), (3, 2), (1, 5)])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_without_a_loop_it_is_the_same_function(rng, count, unroll, policy):
    """Values, outputs and the gradient of what is trained; the stack itself rests."""
    frozen, trained = {"w": layers(rng)["w"]}, {"b": layers(rng)["b"]}

    def loss(trained, unroll):
        both = lambda h, layer: body(h, {**layer[0], **layer[1]})
        h, sums = stack.scan(both, jnp.ones((2, 5)), frozen, trained=trained, policy=policy, count=count, unroll=unroll)
        return (h**2).sum() + (sums**3).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for found, wanted in zip(*(jax.tree.leaves(gradient(trained, ways)) for ways in (unroll, 1)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy, again", [("none", 0), ("full", 5 * 4)])  # of the last of six layers only once: nobody asks for the loss
def test_without_a_loop_a_barrier_keeps_what_is_computed_again_apart(rng, policy, again):
    """XLA would find it in the forward pass, and keep it. (On a CPU it drops the barriers: a GPU's memory shows what they are for.)"""
    big = {"w": jnp.ones((6, 64, 64)), "b": jnp.ones((6, 64))}

    def loss(biases):
        def deep(h, layer):
            for _ in range(4):
                h = jnp.tanh(h @ layer[0]["w"]) + layer[1]["b"]
            return h, None

        return stack.scan(deep, jnp.ones((256, 64)), {"w": big["w"]}, trained=biases, policy=policy, unroll=6)[0].sum()

    text = jax.jit(jax.grad(loss)).lower({"b": big["b"]}).as_text()
    assert "while" not in text and text.count("stablehlo.tanh") == 6 * 4 + again
    assert text.count("stablehlo.optimization_barrier") == 6
