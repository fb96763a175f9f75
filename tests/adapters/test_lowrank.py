"""The gated low-rank pair against a loop over blocks: values, gradients, number formats, and the pool's book-keeping."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.adapters import lowrank
from proglora_jax.core.types import Targets

TARGETS = Targets(layers=3, linears={"q_proj": (6, 10), "down_proj": (14, 6)}, width=6)


def numpy_loop(x, blocks, gates, scale, mix):
    """Block by block in float64. x[B, T, i]; blocks [(a, b)]; gates [M] of arrays that broadcast to [B, T, r]."""
    x = x.astype(np.float64)
    if mix == "delta":
        return scale * sum(((x @ a) * g) @ b for (a, b), g in zip(blocks, gates))
    out = 0.0
    for (_, b), outer in zip(blocks, gates):  # the cross terms of factors that are fused before they are applied
        out = out + (sum((x @ a) * inner for (a, _), inner in zip(blocks, gates)) * outer) @ b
    return scale * out


def case(rng, *, rows=3, steps=4, d_in=5, d_out=7, rank=2, slots=2, gate="sample", pool_gate=None):
    """Random inputs of `pooled_low_rank`: x, pool_a, pool_b, pool_gate, a, b, gate."""
    lead = {"all": (1, 1), "sample": (rows, 1), "token": (rows, steps)}
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return (
        draw(rows, steps, d_in), draw(d_in, slots * rank), draw(slots * rank, d_out), draw(*lead[pool_gate or gate], slots * rank),
        draw(d_in, rank), draw(rank, d_out), draw(*lead[gate], rank),
    )  # fmt: skip


def split(args, rank):
    """The arguments as (x, blocks, gates) for the loop."""
    x, pool_a, pool_b, pool_gate, a, b, gate = args
    cut = [slice(start, start + rank) for start in range(0, pool_a.shape[1], rank)]
    blocks = [(pool_a[:, at], pool_b[at]) for at in cut] + [(a, b)]
    return x, blocks, [pool_gate[..., at] for at in cut] + [gate]


@pytest.mark.parametrize("mix", ["delta", "factor"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(gate="all"), dict(gate="sample"), dict(gate="token"),
        dict(gate="sample", pool_gate="all"), dict(gate="all", pool_gate="token"),
        dict(slots=0), dict(slots=1, rank=1), dict(slots=5, rank=3, d_in=11, d_out=2), dict(rows=1, steps=1, d_in=1, d_out=1),
    ],
    ids=str,
)  # fmt: skip
def test_equals_a_loop_over_blocks(rng, sizes, mix):
    args = case(rng, **sizes)
    actual = lowrank.pooled_low_rank(*args, 1.7, mix)
    expected = numpy_loop(*split(args, args[4].shape[1]), 1.7, mix)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", ["delta", "factor"])
def test_an_empty_slot_adds_nothing(rng, mix):
    x, pool_a, pool_b, pool_gate, a, b, gate = case(rng, slots=2)
    wide = [np.pad(pool_a, ((0, 0), (0, 4))), np.pad(pool_b, ((0, 4), (0, 0)))]
    for value in (0.0, 1.0):  # empty by its factors, whatever its gate says; sums near 20 hold 20 * 2**-24 = 1e-6 each
        wide_gate = np.pad(pool_gate, ((0, 0), (0, 0), (0, 4)), constant_values=value)
        np.testing.assert_allclose(
            lowrank.pooled_low_rank(x, *wide, wide_gate, a, b, gate, 2.0, mix),
            lowrank.pooled_low_rank(x, pool_a, pool_b, pool_gate, a, b, gate, 2.0, mix), rtol=1e-6, atol=1e-5,
        )  # fmt: skip


def reference(x, pool_a, pool_b, pool_gate, a, b, gate, scale, mix):
    """The loop in jnp, for autodiff to derive."""
    rank = a.shape[1]
    cut = [slice(start, start + rank) for start in range(0, pool_a.shape[1], rank)]
    blocks = [(pool_a[:, at], pool_b[at], pool_gate[..., at]) for at in cut] + [(a, b, gate)]
    if mix == "delta":
        return scale * sum(((x @ one) * g) @ two for one, two, g in blocks)
    inner = sum((x @ one) * g for one, _, g in blocks)
    return scale * sum((inner * g) @ two for _, two, g in blocks)


@pytest.mark.parametrize("mix", ["delta", "factor"])
@pytest.mark.parametrize("gate,pool_gate", [("sample", "sample"), ("token", "token"), ("all", "all"), ("sample", "all"), ("all", "token")])
def test_gradients_are_those_of_the_loop(rng, gate, pool_gate, mix):
    args = case(rng, slots=3, gate=gate, pool_gate=pool_gate)
    weight = rng.standard_normal((3, 4, 7)).astype(np.float32)
    scalar = lambda function: lambda *args: (function(*args, 0.6, mix) * weight).sum()
    wanted = (0, 3, 4, 5, 6)
    actual = jax.jit(jax.grad(scalar(lowrank.pooled_low_rank), wanted))(*args)
    expected = jax.jit(jax.grad(scalar(reference), wanted))(*args)
    for name, one, two in zip(("x", "pool_gate", "a", "b", "gate"), actual, expected):
        assert one.shape == two.shape and one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * np.abs(two).max(), err_msg=name)


@pytest.mark.parametrize("mix", ["delta", "factor"])
@pytest.mark.parametrize("gates", ["shared", "own", "token"])
def test_a_group_is_its_linears_one_by_one(rng, mix, gates):
    """Linears of unlike ranks, widths and pools (one has none) that read the same x; values and gradients."""
    sizes = [dict(slots=2, rank=2, d_out=7), dict(slots=0, rank=3, d_out=4), dict(slots=4, rank=1, d_out=9)]
    cases = [case(rng, gate="token" if gates == "token" else "sample", **size) for size in sizes]
    x = cases[0][0]
    pairs = tuple(lowrank.Pair(*rest) for _, *rest in cases)
    if gates == "shared":  # one array gates two linears, so its gradient is the sum
        pairs = (*pairs, dataclasses.replace(pairs[0], pool_a=pairs[0].pool_a[:, ::-1], a=2 * pairs[0].a))
    weights = [rng.standard_normal((3, 4, pair.b.shape[1])).astype(np.float32) for pair in pairs]
    loss = lambda x, outputs: sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))

    def together(x, pairs):
        outputs = lowrank.pooled_low_rank_group(x, pairs, 0.6, mix)
        return loss(x, outputs), outputs

    def apart(x, pairs):
        outputs = tuple(
            reference(x, pair.pool_a, pair.pool_b, pair.pool_gate, pair.a, pair.b, pair.gate, 0.6, mix) for pair in pairs)
        return loss(x, outputs), outputs

    (own, outputs), (expected, values) = (jax.jit(jax.grad(one, (0, 1), has_aux=True))(x, pairs) for one in (together, apart))
    for actual, value in zip(outputs, values, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
    np.testing.assert_allclose(own[0], expected[0], rtol=1e-5, atol=1e-5 * np.abs(expected[0]).max())
    for pair, wanted in zip(own[1], expected[1], strict=True):
        assert not np.any(pair.pool_a) and not np.any(pair.pool_b)
        for name in ("pool_gate", "a", "b", "gate"):
            one, two = getattr(pair, name), getattr(wanted, name)
            assert one.shape == two.shape
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * np.abs(two).max(initial=1e-9), err_msg=name)


def test_the_pool_gets_no_gradient(rng):
    args = case(rng, slots=3)
    pool_a, pool_b = jax.grad(lambda *args: lowrank.pooled_low_rank(*args, 2.0, "delta").sum(), (1, 2))(*args)
    assert pool_a.shape == (5, 6) and not np.any(pool_a)
    assert pool_b.shape == (6, 7) and not np.any(pool_b)


def test_blocks_and_gates_may_be_permuted_together(rng):
    x, pool_a, pool_b, pool_gate, a, b, gate = case(rng, slots=3, rank=2)
    order = np.array([4, 5, 0, 1, 2, 3])
    swapped = lowrank.pooled_low_rank(x, pool_a[:, order], pool_b[order], pool_gate[..., order], a, b, gate)
    np.testing.assert_allclose(swapped, lowrank.pooled_low_rank(x, pool_a, pool_b, pool_gate, a, b, gate), rtol=1e-5, atol=1e-5)
    # The trainable block takes a slot's place and the slot's block becomes the trainable one.
    cut = lambda leaf, at: np.take(leaf, at, axis=-1)
    traded = lowrank.pooled_low_rank(
        x, np.concatenate([a, pool_a[:, 2:]], 1), np.concatenate([b, pool_b[2:]]), np.concatenate([gate, pool_gate[..., 2:]], -1),
        cut(pool_a, [0, 1]), pool_b[:2], cut(pool_gate, [0, 1]),
    )  # fmt: skip
    np.testing.assert_allclose(traded, swapped, rtol=1e-5, atol=1e-5)


def test_one_sample_equals_the_merged_kernel(rng):
    args = case(rng, rows=1, slots=3, gate="sample")
    x, blocks, gates = split(args, 2)
    kernel = rng.standard_normal((5, 7))
    merged = kernel + 2.0 * sum((a * g[0]) @ b for (a, b), g in zip(blocks, gates))
    np.testing.assert_allclose(x @ kernel + lowrank.pooled_low_rank(*args, 2.0, "delta"), x @ merged, rtol=1e-5, atol=1e-5)


def test_factor_fusion_differs_unless_one_block_has_weight(rng):
    args = case(rng, slots=2)
    apart = np.abs(lowrank.pooled_low_rank(*args, 1.0, "delta") - lowrank.pooled_low_rank(*args, 1.0, "factor")).max()
    assert apart > 0.1
    alone = (*args[:3], np.zeros_like(args[3]), *args[4:6], np.ones_like(args[6]))
    np.testing.assert_allclose(lowrank.pooled_low_rank(*alone, 1.0, "delta"), lowrank.pooled_low_rank(*alone, 1.0, "factor"), rtol=1e-6)


def test_bfloat16_rounds_inputs_and_products_only(rng):
    x, *rest = case(rng, rows=2, steps=8, d_in=64, d_out=48, rank=4, slots=3)
    rough, weight = jnp.asarray(x, jnp.bfloat16), rng.standard_normal((2, 8, 48)).astype(np.float32)
    y = lowrank.pooled_low_rank(rough, *rest, 2.0, "delta")
    assert y.dtype == jnp.bfloat16
    # Each of x, A, h, B and y is rounded once to 8 bits (2**-9 relative) and sums are kept in 24 bits: the errors of 64 * 16 products
    # are independent, so they stay within a few 2**-9 of the result's size.
    exact = numpy_loop(*split((x, *rest), 4), 2.0, "delta")
    assert np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)) < 3 * 2**-9 * np.sqrt(np.mean(exact**2))

    def loss(x, a, b, gate):
        out = lowrank.pooled_low_rank(x, *rest[:3], a, b, gate, 2.0, "delta")
        return (out.astype(jnp.float32) * weight).sum()

    gradients = jax.grad(loss, (0, 1, 2, 3))(rough, *rest[3:])
    expected = jax.grad(loss, (0, 1, 2, 3))(x, *rest[3:])
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32]
    for one, two in zip(gradients, expected):
        error = np.sqrt(np.mean((np.asarray(one, np.float64) - np.asarray(two)) ** 2))
        assert error < 4 * 2**-9 * np.sqrt(np.mean(np.square(two)))


def test_gates_per_block_become_gates_per_rank():
    gates = lowrank.repeat_gates(jnp.asarray([[0.25, 0.75], [1.0, 0.0]]), 3)
    np.testing.assert_array_equal(gates, [[[0.25] * 3 + [0.75] * 3], [[1.0] * 3 + [0.0] * 3]])
    assert gates.dtype == jnp.float32


def test_pool_grows_and_keeps_its_blocks(rng):
    rank, blocks = 2, [lowrank.init_block(rng, TARGETS, 2, "kaiming") for _ in range(3)]
    blocks = [jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape).astype(np.float32), block) for block in blocks]
    pool = lowrank.empty_pool(TARGETS, 1, rank)
    assert {name: (leaf["a"].shape, leaf["b"].shape) for name, leaf in pool.items()} == {
        "q_proj": ((3, 6, 2), (3, 2, 10)), "down_proj": ((3, 14, 2), (3, 2, 6))}  # fmt: skip
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(pool))
    pool = lowrank.write_slot(pool, blocks[0], 0, rank)
    pool = lowrank.grow_pool(pool, 3, rank)
    pool = lowrank.write_slot(pool, blocks[2], 2, rank)
    for name in TARGETS.linears:
        parts = [blocks[0][name], {"a": np.zeros_like(blocks[0][name]["a"]), "b": np.zeros_like(blocks[0][name]["b"])}, blocks[2][name]]
        np.testing.assert_array_equal(pool[name]["a"], np.concatenate([part["a"] for part in parts], axis=-1))
        np.testing.assert_array_equal(pool[name]["b"], np.concatenate([part["b"] for part in parts], axis=1))
    same = lowrank.grow_pool(pool, 2, rank)
    assert same["q_proj"]["a"].shape == (3, 6, 6)


@pytest.mark.parametrize("init", ["normal001", "kaiming"])
def test_a_fresh_block_has_the_published_distribution_and_no_effect(rng, init):
    block = lowrank.init_block(rng, Targets(8, {"up_proj": (400, 20)}, 400), 16, init)["up_proj"]
    a = np.asarray(block["a"], np.float64)
    assert a.shape == (8, 400, 16) and block["a"].dtype == np.float32 and block["b"].shape == (8, 16, 20) and not np.any(block["b"])
    n = a.size
    deviation = 0.01 if init == "normal001" else 400**-0.5 / np.sqrt(3)
    # Moments of n independent draws: the mean within 5 of its standard errors, the fourth moment tells normal (3) from uniform (1.8).
    assert abs(a.mean()) < 5 * deviation / np.sqrt(n)
    assert abs(a.std() / deviation - 1) < 5 / np.sqrt(n)
    kurtosis = np.mean(a**4) / np.mean(a**2) ** 2
    assert abs(kurtosis - (3.0 if init == "normal001" else 1.8)) < 5 * np.sqrt(24 / n) * 1.1
    if init == "kaiming":
        assert 0.999 / 20 < np.abs(a).max() <= np.float32(1 / 20)


def test_dropout_keeps_the_mean_and_scales_what_it_keeps():
    x = jnp.full((200, 500), 3.0)
    y = np.asarray(lowrank.dropout(jax.random.key(0), x, 0.2))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 3.0 / 0.8, rtol=1e-6)
    assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.2 * 0.8 / x.size)
    assert 0.7 < kept[:, 0].mean() < 0.9 and 0.7 < kept[0].mean() < 0.9  # no row or column goes as a whole
    assert lowrank.dropout(jax.random.key(0), x.astype(jnp.bfloat16), 0.2).dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, lowrank.dropout(jax.random.key(0), x, 0.2))
    assert np.any(y != lowrank.dropout(jax.random.key(1), x, 0.2))
