"""Gates from an instruction: the pooled routing feature, the query projector, keys, the softmax over blocks, recall."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core import precise
from proglora_jax.core.types import PyTree

LAYER_NORM_EPS = 1e-5


def route_feature(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maximum over the positions of a mask, the feature that the gates see.

    Args:
        x: [B, T, D] input embeddings.
        mask: bool[B, T] positions that count.

    Returns:
        f32[B, D]; zeros where a row has no such position.

    Source: ProgLoRA (Findings of ACL 2025), Eq. 5 (max-pooled instruction embedding).
    """
    z = jnp.where(mask[..., None], x.astype(jnp.float32), -jnp.inf).max(axis=1)
    return jnp.where(mask.any(axis=1)[:, None], z, 0.0)  # [B, D]


def mean_feature(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the positions of a mask: [B, T, D], bool[B, T] -> f32[B, D]; zeros where a row has none."""
    count = mask.sum(axis=1, keepdims=True)
    return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0).sum(axis=1) / jnp.maximum(count, 1)


def init_query_projector(generator: np.random.Generator, width: int, inner: int, variant: str = "paper") -> PyTree:
    """Two Xavier-uniform linears with zero biases and a layer norm: width -> inner -> width.

    Returns:
        {"linear_1": {"kernel": f32[D, d_p], "bias"}, "linear_2": {"kernel": f32[d_p, D], "bias"}, "norm": {"scale", "bias"}}; the
        released code's variant has no biases in its linears.
    """
    bound = math.sqrt(6.0 / (width + inner))
    draw = lambda *shape: generator.uniform(-bound, bound, shape).astype(np.float32)
    biases = [{"bias": np.zeros(size, np.float32)} if variant == "paper" else {} for size in (inner, width)]
    return {
        "linear_1": {"kernel": draw(width, inner)} | biases[0],
        "linear_2": {"kernel": draw(inner, width)} | biases[1],
        "norm": {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)},
    }


def query_projector(params: PyTree, z: jax.Array, variant: str = "paper") -> jax.Array:
    """The query h = LN(W2 silu(W1 z + b1) + b2), or the released code's LN(silu(W2 W1 z)).

    Args:
        params: as `init_query_projector` returns.
        z: f32[..., D].
        variant: "paper" or "code" (no biases, SiLU after the second linear).

    Returns:
        f32[..., D].

    Source: ProgLoRA (Findings of ACL 2025), Eq. 5.
    """
    first, second, norm = params["linear_1"], params["linear_2"], params["norm"]
    if variant == "paper":
        h = precise.matmul(jax.nn.silu(precise.matmul(z, first["kernel"]) + first["bias"]), second["kernel"]) + second["bias"]
    else:
        h = jax.nn.silu(precise.matmul(precise.matmul(z, first["kernel"]), second["kernel"]))
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return h * norm["scale"] + norm["bias"]


def init_key(generator: np.random.Generator, width: int, scale: float = 1.0) -> np.ndarray:
    """A key, Xavier-uniform on the shape (1, D): U(-b, b) with b = sqrt(6 / (D + 1)), times `scale`; f32[D]."""
    bound = math.sqrt(6.0 / (width + 1))
    return (scale * generator.uniform(-bound, bound, width)).astype(np.float32)


def block_softmax(logits: jax.Array, stage: jax.Array) -> jax.Array:
    """Softmax over the blocks learned so far: f32[B, M], i32[] -> f32[B, M] with exact zeros for blocks > stage."""
    known = jnp.arange(logits.shape[-1]) <= stage
    return jax.nn.softmax(jnp.where(known, logits.astype(jnp.float32), -jnp.inf), axis=-1)


def split_max_softmax(logits: jax.Array, stage: jax.Array) -> jax.Array:
    """The released code's weights: old and current logits are shifted by their own maxima before one softmax.

    The maxima run over the whole batch, so a row's weights depend on its neighbours; for parity studies only.

    Source: the authors' released code; see the method's docstring.
    """
    index = jnp.arange(logits.shape[-1])
    old = jnp.where(index < stage, logits, -jnp.inf)
    current = jnp.where(index == stage, logits, -jnp.inf)
    old_max = jnp.where(stage > 0, old.max(), 0.0)
    return block_softmax(jnp.where(index < stage, logits - old_max, logits - current.max()), stage)


def newest_bonus(bonus: float, fraction: float, progress: jax.Array) -> jax.Array:
    """Bonus on the newest block's logit while it trains: `bonus` at progress 0, falling linearly to 0 at `fraction`."""
    return bonus * jnp.clip(1.0 - progress / max(fraction, 1e-6), 0.0, 1.0)


def recall_divergence(logits: jax.Array, target: jax.Array, mask: jax.Array, stage: jax.Array, kind: str, reduction: str) -> jax.Array:
    """Divergence between stored gates and the gates that the current router gives the same features.

    Args:
        logits: f32[C, S, M] of the current router on stored features (C old tasks, S samples each).
        target: f32[C, S, M] stored gates, zero for blocks that did not exist then.
        mask: f32[C, S], 1 for samples that count.
        stage: i32[] index of the newest block.
        kind: "target_pred" is KL(target || prediction); "pred_target_eps" is the printed direction with 1e-8 added to
            the target and renormalised (without which it is infinite).
        reduction: "mean" over the counted samples or "sum".

    Returns:
        f32[]; 0 where nothing is stored.

    Source: ProgLoRA (Findings of ACL 2025), Eq. 8.
    """
    known = jnp.arange(logits.shape[-1]) <= stage
    log_pred = jax.nn.log_softmax(jnp.where(known, logits, -jnp.inf), axis=-1)
    log_pred = jnp.where(known, log_pred, 0.0)
    if kind == "target_pred":
        safe = jnp.where(target > 0, target, 1.0)
        kl = jnp.where(target > 0, target * (jnp.log(safe) - log_pred), 0.0).sum(-1)  # [C, S]
    else:
        smooth = jnp.where(known, target + 1e-8, 0.0)
        smooth = smooth / smooth.sum(-1, keepdims=True)
        pred = jnp.where(known, jnp.exp(log_pred), 0.0)
        kl = jnp.where(known, pred * (log_pred - jnp.log(jnp.where(known, smooth, 1.0))), 0.0).sum(-1)
    total = (kl * mask).sum()
    return total if reduction == "sum" else total / jnp.maximum(mask.sum(), 1.0)
