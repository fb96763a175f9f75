"""Distillation over the teacher's most probable words, position by position, without holding the scores of all positions at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


CHUNK = 128
"""Positions whose scores exist at once."""


def top_divergence(student: jax.Array, teacher: jax.Array, count: int, temperature: float) -> jax.Array:
    """KL(teacher || student) over the teacher's `count` largest scores, both renormalised there and softened by a temperature.

    Args:
        student: f32[..., V] scores.
        teacher: f32[..., V] scores; no gradient passes.
        count: words that count, at most V.
        temperature: probabilities are raised to its inverse and renormalised.

    Returns:
        f32[...].
    """
    best, words = jax.lax.top_k(jax.lax.stop_gradient(teacher), min(count, teacher.shape[-1]))
    log_p = jax.nn.log_softmax(best / temperature, axis=-1)
    log_q = jax.nn.log_softmax(jnp.take_along_axis(student, words, axis=-1) / temperature, axis=-1)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def mean_top_divergence(
    head: Callable, student: jax.Array, teacher: jax.Array, mask: jax.Array, count: int, temperature: float, chunk: int = CHUNK
) -> jax.Array:
    """Mean of `top_divergence` over the positions of a mask.

    Args:
        head: hidden[..., D] -> f32[..., V].
        student: [B, T, D] hidden states.
        teacher: [B, T, D].
        mask: bool[B, T].
        count: see `top_divergence`.
        temperature: see `top_divergence`.
        chunk: positions whose scores exist at once; they are computed again in the backward pass.

    Returns:
        f32[].
    """
    rows, positions = mask.shape
    extra = -positions % chunk
    cut = lambda leaf: jnp.moveaxis(
        jnp.pad(leaf, ((0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 2)).reshape(rows, -1, chunk, *leaf.shape[2:]), 1, 0)

    @jax.checkpoint
    def part(student, teacher, mask):
        return jnp.where(mask, top_divergence(head(student), head(teacher), count, temperature), 0.0).sum()

    def add(total, parts):
        return total + part(*parts), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (cut(student), cut(jax.lax.stop_gradient(teacher)), cut(mask)))
    return total / jnp.maximum(mask.sum(), 1)
