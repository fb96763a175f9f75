"""Experts inside a linear: a router per linear gates low-rank experts token by token; top-k, shared trunk, and what positions it reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.core import precise
from proglora_jax.core.types import PyTree

ROUTER_INPUTS = ("token", "first_token", "mean_prompt")


def init_routers(generator: np.random.Generator, targets, experts: int) -> PyTree:
    """Routers without bias: {linear: f32[L, d_in, E]}, uniform in +-1/sqrt(d_in) (a linear layer's default)."""
    routers = {}
    for name, (d_in, _) in targets.linears.items():
        bound = d_in**-0.5
        routers[name] = generator.uniform(-bound, bound, (targets.layers, d_in, experts)).astype("float32")
    return routers


def router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x[B, T, d_in] by router f32[d_in, E], or by one per row f32[B, d_in, E] -> f32[B, T, E].

    Summed in float32; below float32 the router is rounded to the dtype of x, which is rounded already.
    """
    kernel = router.astype(x.dtype)
    if kernel.ndim == 3:
        return jnp.einsum("bti,bie->bte", x, kernel, preferred_element_type=jnp.float32)
    return jnp.einsum("bti,ie->bte", x, kernel, preferred_element_type=jnp.float32)


def pick_positions(x: jax.Array, prompt: jax.Array, router_input: str) -> jax.Array:
    """What a router reads of a whole sequence.

    Args:
        x: [B, T, d_in] the linear's input.
        prompt: bool[B, T] positions of the prompt.
        router_input: "token" (every position by itself), "first_token" (position 0 for all) or "mean_prompt" (mean over the prompt).

    Returns:
        [B, T or 1, d_in].
    """
    if router_input == "token":
        return x
    if router_input == "first_token":
        return x[:, :1]
    weights = prompt / jnp.maximum(prompt.sum(axis=1, keepdims=True), 1)
    return precise.einsum("bt,bti->bi", weights, x.astype(jnp.float32))[:, None].astype(x.dtype)


def top_k_gates(logits: jax.Array, k: int, renorm: str) -> jax.Array:
    """Gates of the k experts with the largest logits, zero for the others.

    Args:
        logits: f32[..., E]; of equal logits the first expert's counts as larger.
        k: experts that stay.
        renorm: "topk_softmax" is a softmax over those k; "softmax_then_mask" keeps their share of a softmax over all.

    Returns:
        f32[..., E].
    """
    chosen = jax.lax.top_k(logits, k)[1]
    keep = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32).sum(axis=-2) > 0
    if renorm == "topk_softmax":
        return jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)
    return jnp.where(keep, jax.nn.softmax(logits, axis=-1), 0.0)


def mass(gates: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean gate of each expert over the positions of a mask: f32[B, T or 1, E], bool[B, T] -> f32[B, E]."""
    if gates.shape[1] == 1:
        return gates[:, 0]
    return jnp.where(mask[..., None], gates, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def shared_trunk(x: jax.Array, a: jax.Array, b: jax.Array, gates: jax.Array, scale: float) -> jax.Array:
    """scale * sum_k g_k B_k (A x): one A for all branches.

    Args:
        x: [B, T, d_in].
        a: f32[d_in, r].
        b: f32[E, r, d_out].
        gates: f32[B, T or 1, E].
        scale: alpha / r of the whole.

    Returns:
        [B, T, d_out] in x's dtype.
    """
    u = checkpoint_name(jnp.einsum("bti,ir->btr", x, a.astype(x.dtype), preferred_element_type=jnp.float32), "low_rank")
    h = gates[..., :, None] * u[..., None, :]  # [B, T, E, r]
    h = h.reshape(*h.shape[:2], -1).astype(x.dtype)
    flat = b.reshape(-1, b.shape[-1]).astype(x.dtype)  # [E*r, d_out]
    return (jnp.einsum("bte,eo->bto", h, flat, preferred_element_type=jnp.float32) * scale).astype(x.dtype)
