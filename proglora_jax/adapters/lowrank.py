"""The primitive: a gated low-rank delta over a pool of frozen blocks and one trainable block, with its own VJP."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.core.types import PyTree

MIXES = ("delta", "factor")


def mix_ranks(u: jax.Array, gate: jax.Array, mix: str, rank: int) -> jax.Array:
    """Applies the gates between the two matmuls of the pair.

    Args:
        u: f32[B, T, R] activations of all ranks, R = blocks * rank.
        gate: f32[B|1, T|1, R] gate of each rank.
        mix: "delta" sums the outputs of the blocks, sum_n w_n B_n A_n x; "factor" fuses the factors first,
            (sum_n w_n B_n)(sum_m w_m A_m) x, which has the cross terms B_n A_m.
        rank: ranks of one block (used by "factor" only).

    Returns:
        f32[B, T, R], what the second matmul takes.

    Source: ProgLoRA (Findings of ACL 2025), Eqs. 3 and 7 read literally for "factor"; "delta" is what the authors' code runs.
    """
    h = u * gate
    if mix == "delta":
        return h
    blocks = h.shape[-1] // rank
    summed = h.reshape(*h.shape[:-1], blocks, rank).sum(-2)  # [B, T, r]
    return jnp.tile(summed, blocks) * gate  # [B, T, M*r]


def ranks_of(block: PyTree) -> int:
    """Ranks of a block or pool {linear: {"a": [..., d_in, r], ...}}; 0 of an empty one."""
    first = next(iter(block.values()), None)
    return first["a"].shape[-1] if first else 0


def _project(x: jax.Array, kernel: jax.Array, out: jnp.dtype = jnp.float32) -> jax.Array:
    """x[B, T, i] @ kernel[i, o] with f32 accumulation; the result in the dtype `out`."""
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out)


def _project_back(x: jax.Array, kernel: jax.Array, out: jnp.dtype = jnp.float32) -> jax.Array:
    """x[B, T, o] @ kernel[i, o].T with f32 accumulation; the result in the dtype `out`."""
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out)


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """sum over [B, T] of left[B, T, i] x right[B, T, o] -> f32[i, o]."""
    return jax.lax.dot_general(left, right, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors and gates of one linear.

    Attributes:
        pool_a: f32[d_in, C*r] frozen factors, C slots of rank r side by side; an empty slot has gate 0.
        pool_b: f32[C*r, d_out] frozen factors.
        pool_gate: f32[B|1, T|1, C*r] gates of the frozen ranks.
        a: f32[d_in, r] trainable factor.
        b: f32[r, d_out] trainable factor.
        gate: f32[B|1, T|1, r] gates of the trainable ranks.
    """

    pool_a: jax.Array
    pool_b: jax.Array
    pool_gate: jax.Array
    a: jax.Array
    b: jax.Array
    gate: jax.Array


def pooled_low_rank(x, pool_a, pool_b, pool_gate, a, b, gate, scale=1.0, mix="delta"):
    """`pooled_low_rank_group` of a single linear: x[B, T, d_in] -> [B, T, d_out]."""
    return pooled_low_rank_group(x, (Pair(pool_a, pool_b, pool_gate, a, b, gate),), scale, mix)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pooled_low_rank_group(x: jax.Array, pairs: tuple[Pair, ...], scale: float = 1.0, mix: str = "delta") -> tuple[jax.Array, ...]:
    """scale * ((x [A_pool, A]) * [g_pool, g]) [B_pool; B] for linears that read the same x.

    Pool and trainable block are one fused matmul pair, and the first factors of all linears are one matmul, so that x is read once.

    Args:
        x: [B, T, d_in] in compute dtype.
        pairs: one for each linear.
        scale: alpha / r.
        mix: see `mix_ranks`.

    Returns:
        [B, T, d_out] of each linear in x's dtype. Gradients exist for x, the gates, a and b; the pool's are never formed (its
        cotangent is zero), so that 8 matmuls serve a linear's forward and backward together with its frozen kernel, and two of
        these, into and out of the first factors, are shared by the group.

    Source: ProgLoRA (Findings of ACL 2025), Eqs. 3 and 7, fused along rank.
    """
    return _forward(x, pairs, scale, mix)[0]


def _forward(x, pairs, scale, mix):
    # Frozen columns first: the trainable ones lie side by side, as they do without a pool.
    u = checkpoint_name(_project(x, _side_by_side(pairs)), "low_rank")  # [B, T, sum R]
    outputs = []
    for pair, own in zip(pairs, _cut(u, pairs), strict=True):
        # The scale is applied to the few ranks, and the matmul rounds by itself: what follows it is one addition of the compute dtype.
        h = mix_ranks(own, _join_gates(pair.pool_gate, pair.gate), mix, pair.a.shape[-1]) * scale
        outputs.append(_project(h.astype(x.dtype), jnp.concatenate([pair.pool_b, pair.b], axis=0), x.dtype))  # [B, T, d_out]
    return tuple(outputs), (x, u, pairs)


def _side_by_side(pairs: tuple[Pair, ...]) -> jax.Array:
    """[d_in, sum R]: the pools of all linears, then their trainable factors."""
    return jnp.concatenate([pair.pool_a for pair in pairs] + [pair.a for pair in pairs], axis=-1)


def _cut(u: jax.Array, pairs: tuple[Pair, ...]) -> list[jax.Array]:
    """[B, T, R] of each linear, its pool first, from what `_side_by_side` gave."""
    widths = [pair.pool_a.shape[-1] for pair in pairs] + [pair.a.shape[-1] for pair in pairs]
    parts = jnp.split(u, list(itertools.accumulate(widths))[:-1], axis=-1)
    return [jnp.concatenate(both, axis=-1) for both in zip(parts[: len(pairs)], parts[len(pairs) :], strict=True)]


def _join_gates(pool_gate: jax.Array, gate: jax.Array) -> jax.Array:
    """Gates side by side along rank; the leading axes are broadcast against each other."""
    lead = jnp.broadcast_shapes(pool_gate.shape[:-1], gate.shape[:-1])
    wide = [jnp.broadcast_to(g, (*lead, g.shape[-1])) for g in (pool_gate, gate)]
    return jnp.concatenate(wide, axis=-1)  # [B|1, T|1, R]


def _backward(scale, mix, residuals, cotangents):
    x, u, pairs = residuals
    found, frozen, trained = [], [], []
    for pair, own, dy in zip(pairs, _cut(u, pairs), cotangents, strict=True):
        rank = pair.a.shape[-1]
        mixed = lambda u, pool_gate, gate, rank=rank: mix_ranks(u, _join_gates(pool_gate, gate), mix, rank) * scale
        h, pull = jax.vjp(mixed, own, pair.pool_gate, pair.gate)
        dh = _project_back(dy, jnp.concatenate([pair.pool_b, pair.b], axis=0))  # [B, T, R]
        du, dpool_gate, dgate = pull(dh)
        du = du.astype(x.dtype)
        frozen.append(du[..., :-rank])
        trained.append(du[..., -rank:])
        found.append((dpool_gate, _outer(h[..., -rank:].astype(x.dtype), dy).astype(pair.b.dtype), dgate))
    dx = _project_back(jnp.concatenate(frozen + trained, axis=-1), _side_by_side(pairs), x.dtype)  # [B, T, d_in]
    da = _outer(x, jnp.concatenate(trained, axis=-1))
    ends = itertools.accumulate(pair.a.shape[-1] for pair in pairs)
    return dx, tuple(
        Pair(None, None, dpool_gate, da[:, end - pair.a.shape[-1] : end].astype(pair.a.dtype), db, dgate)
        for pair, end, (dpool_gate, db, dgate) in zip(pairs, ends, found, strict=True))


pooled_low_rank_group.defvjp(_forward, _backward)


def repeat_gates(weights: jax.Array, rank: int) -> jax.Array:
    """Gates per block -> gates per rank: f32[B, M] -> f32[B, 1, M*r]."""
    return jnp.repeat(weights.astype(jnp.float32), rank, axis=-1)[:, None, :]


def init_block(generator, targets, rank: int, init: str) -> PyTree:
    """A fresh block: A random, B zero, so that its delta is zero.

    Args:
        generator: numpy Generator; one draw per linear, in the order of `targets.linears`.
        targets: Targets.
        rank: r.
        init: see `draw_factor`.

    Returns:
        {linear: {"a": f32[L, d_in, r], "b": f32[L, r, d_out]}} as numpy arrays.
    """
    block = {}
    for name, (d_in, d_out) in targets.linears.items():
        a = draw_factor(generator, (targets.layers, d_in, rank), init)
        block[name] = {"a": a, "b": jnp.zeros((targets.layers, rank, d_out), jnp.float32)}
    return block


def init_like(generator, block: PyTree, init: str) -> PyTree:
    """A fresh block of the shapes of another, with or without a leading axis of layers."""
    fresh = lambda leaf: {"a": draw_factor(generator, leaf["a"].shape, init), "b": jnp.zeros(leaf["b"].shape, jnp.float32)}
    return {name: fresh(leaf) for name, leaf in block.items()}


INITS = ("normal001", "kaiming", "fan_in")


def draw_factor(generator, shape: tuple[int, ...], init: str):
    """A random factor f32[..., d_in, r].

    Args:
        generator: numpy Generator.
        shape: of the factor.
        init: "normal001" for N(0, 0.01^2) (ProgLoRA's and MoELoRA's code), "kaiming" for U(-1/sqrt(d_in), 1/sqrt(d_in)) (PEFT),
            "fan_in" for N(0, 1/d_in) (PCLR).
    """
    bound = shape[-2] ** -0.5
    if init == "kaiming":
        return generator.uniform(-bound, bound, shape).astype("float32")
    return generator.normal(0.0, 0.01 if init == "normal001" else bound, shape).astype("float32")


def empty_pool(targets, slots: int, rank: int) -> PyTree:
    """A pool of `slots` empty slots: {linear: {"a": f32[L, d_in, slots*r], "b": f32[L, slots*r, d_out]}}."""
    return {
        name: {
            "a": jnp.zeros((targets.layers, d_in, slots * rank), jnp.float32),
            "b": jnp.zeros((targets.layers, slots * rank, d_out), jnp.float32),
        }
        for name, (d_in, d_out) in targets.linears.items()
    }


def write_slot(pool: PyTree, block: PyTree, slot: int, rank: int) -> PyTree:
    """Puts a block into a slot of the pool; the other slots keep their values."""
    at = slice(slot * rank, (slot + 1) * rank)
    return {
        name: {"a": pool[name]["a"].at[:, :, at].set(leaves["a"]), "b": pool[name]["b"].at[:, at, :].set(leaves["b"])}
        for name, leaves in block.items()
    }


def grow_pool(pool: PyTree, slots: int, rank: int) -> PyTree:
    """Widens a pool to `slots` slots with empty ones; never shrinks it."""
    grown = {}
    for name, leaves in pool.items():
        extra = max(0, slots * rank - leaves["a"].shape[-1])
        grown[name] = {
            "a": jnp.pad(leaves["a"], ((0, 0), (0, 0), (0, extra))),
            "b": jnp.pad(leaves["b"], ((0, 0), (0, extra), (0, 0))),
        }
    return grown


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout on the adapter's input: kept values are divided by 1 - rate; one mask for every block of a linear."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
