"""Representation descriptors: a linear auto-encoder per module says by its reconstruction error whether features are what it has seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core import precise
from proglora_jax.core.types import PyTree

LEAST_RECORDS = 3


def init_descriptor(generator: np.random.Generator, layers: int, width: int, inner: int) -> PyTree:
    """Encoders and decoders of some layers, kernels uniform in +-1/sqrt(fan in), biases zero.

    Returns:
        {"encoder": {"kernel": f32[E, D, h], "bias": f32[E, h]}, "decoder": {"kernel": f32[E, h, D], "bias": f32[E, D]}}.
    """
    draw = lambda fan, *shape: jnp.asarray(generator.uniform(-(fan**-0.5), fan**-0.5, shape), jnp.float32)
    return {
        "encoder": {"kernel": draw(width, layers, width, inner), "bias": jnp.zeros((layers, inner), jnp.float32)},
        "decoder": {"kernel": draw(inner, layers, inner, width), "bias": jnp.zeros((layers, width), jnp.float32)},
    }


def errors(descriptor: PyTree, features: jax.Array) -> jax.Array:
    """Mean squared reconstruction error of each feature: descriptors [E, ...], f32[B, E, D] -> f32[B, E]."""
    encoder, decoder = descriptor["encoder"], descriptor["decoder"]
    code = precise.einsum("bed,edh->beh", features, encoder["kernel"]) + encoder["bias"]
    back = precise.einsum("beh,ehd->bed", code, decoder["kernel"]) + decoder["bias"]
    return jnp.mean(jnp.square(back - features), axis=-1)


def push(buffer: jax.Array, values: jax.Array) -> jax.Array:
    """A first-in first-out buffer f32[N, E] after B more rows f32[B, E]; the newest rows are the last."""
    return jnp.concatenate([buffer, values])[-buffer.shape[0] :]


def statistics(buffer: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean f32[E], unbiased deviation f32[E]) of the newest `count` rows of a buffer f32[N, E]."""
    size = buffer.shape[0]
    filled = jnp.minimum(count, size)
    mask = (jnp.arange(size) >= size - filled)[:, None]
    mean = jnp.where(mask, buffer, 0.0).sum(axis=0) / jnp.maximum(filled, 1)
    square = jnp.where(mask, jnp.square(buffer - mean), 0.0).sum(axis=0)
    return mean, jnp.sqrt(square / jnp.maximum(filled - 1, 1))


def deviations(error: jax.Array, mean: jax.Array, deviation: jax.Array, records: jax.Array) -> jax.Array:
    """z = |error - mean| / deviation, broadcast; 0 where fewer than three errors are on record."""
    z = jnp.abs(error - mean) / jnp.maximum(deviation, 1e-12)
    return jnp.where(records >= LEAST_RECORDS, z, 0.0)


def is_new(z: jax.Array, known: jax.Array, batch: int, threshold: float) -> jax.Array:
    """Whether some batch of features is new to every module.

    Args:
        z: f32[n, E, M] of n samples for M modules in E layers.
        known: bool[E, M] modules that exist.
        batch: samples whose mean counts; what is left over counts as one batch.
        threshold: the smallest mean z over the modules must be above it.

    Returns:
        bool[E].
    """
    cuts = [z[start : start + batch] for start in range(0, z.shape[0], batch)]
    means = jnp.stack([cut.mean(axis=0) for cut in cuts])  # [batches, E, M]
    return (jnp.where(known, means, jnp.inf).min(axis=-1) > threshold).any(axis=0)
