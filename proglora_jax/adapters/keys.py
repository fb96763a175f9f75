"""Queries and keys that are compared by direction: unit vectors, cosines, the ranks whose keys score highest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from proglora_jax.adapters.gates import mean_feature
from proglora_jax.core import precise

EPSILON = 1e-12
# Scores are rounded to this many digits before ranks are chosen: keys that are equal must tie in every program, for rounding errors of
# a matmul would else choose among them.
DIGITS = 5


def unit(x: jax.Array) -> jax.Array:
    """x over its Euclidean norm along the last axis; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPSILON))


def cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """f32[B, D], f32[M, D] -> f32[B, M]."""
    return precise.matmul(unit(queries), unit(keys).T)


def text_query(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit mean of the embeddings at the positions of a mask: [B, T, D], bool[B, T] -> f32[B, D]; no gradient passes."""
    return jax.lax.stop_gradient(unit(mean_feature(embeddings, mask)))


def image_query(image: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit class token f32[B, Dv], zero for rows without an image; no gradient passes."""
    return jax.lax.stop_gradient(unit(image.astype(jnp.float32)) * mask[:, None])


def rank_scores(text: jax.Array, image: jax.Array, text_keys: jax.Array, image_keys: jax.Array, weight: float) -> jax.Array:
    """q_text . K_text + weight * q_image . K_image over unit keys.

    Args:
        text: f32[B, D] unit queries.
        image: f32[B, Dv] unit queries or zeros.
        text_keys: f32[..., R, D].
        image_keys: f32[..., R, Dv].
        weight: of the image's part.

    Returns:
        f32[..., B, R].
    """
    by_text = precise.einsum("bd,...rd->...br", text, unit(text_keys))
    return by_text + weight * precise.einsum("bd,...rd->...br", image, unit(image_keys))


def top_ranks(scores: jax.Array, allowed: jax.Array, count: int) -> jax.Array:
    """1 for the `count` allowed ranks of highest score, else 0; of equal scores the lower index comes first.

    Args:
        scores: f32[..., R].
        allowed: bool[R] or broadcastable; where fewer are allowed, all of them are chosen.
        count: ranks to choose, at most.

    Returns:
        f32[..., R]; no gradient passes.
    """
    allowed = jnp.broadcast_to(allowed, scores.shape)
    ordered = jnp.where(allowed, jnp.round(jax.lax.stop_gradient(scores), DIGITS), -jnp.inf)
    chosen = jax.lax.top_k(ordered, min(count, scores.shape[-1]))[1]
    hot = jax.nn.one_hot(chosen, scores.shape[-1], dtype=jnp.float32).sum(axis=-2)
    return jnp.where(allowed, hot, 0.0)
