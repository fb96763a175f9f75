"""Cross-entropy on supervised positions, gathered before the vocabulary matmul, and how it is averaged."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from proglora_jax.data.errors import UserError
from proglora_jax.training.settings import TrainSettings


def token_nll(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood of each label, zero where masked.

    Args:
        logits: f32[B, K, V].
        labels: i32[B, K].
        mask: bool[B, K].

    Returns:
        f32[B, K] in nats.
    """
    chex.assert_equal_shape([labels, mask])
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(mask, nll, 0.0)


def group_rows(rows: int, groups: int, size: int) -> int:
    """Rows per group of a batch: `size`, or the share of a group where a number of groups is asked for.

    Raises:
        UserError: "config.train.loss_groups=<n>: must divide the batch of <rows> rows"
    """
    if groups and rows % groups:
        raise UserError(f"config.train.loss_groups={groups}: must divide the batch of {rows} rows")
    return rows // groups if groups else size


def group_count(rows: int, train: TrainSettings) -> int:
    """Groups of consecutive rows within which the loss of a batch is averaged; 1 for `global_token_mean`.

    Raises:
        UserError: as `group_rows` and `row_scales` do where the groups do not divide the batch.
    """
    if train.loss_norm == "global_token_mean":
        return 1
    size = group_rows(rows, train.loss_groups, train.loss_group_size)
    _check_division(rows, size)
    return rows // size


def row_scales(mask: jax.Array, weight: jax.Array, norm: str, group_size: int, separate: jax.Array | None = None) -> jax.Array:
    """What a row's summed loss is multiplied by, so that the batch's loss is the sum over rows, however it is split.

    Args:
        mask: bool[B, K] supervised tokens.
        weight: f32[B] per-sample weights.
        norm: "global_token_mean" or "micro_batch_mean".
        group_size: rows per group of "micro_batch_mean".
        separate: bool[B], rows whose mean is taken apart and added (replay as a batch of its own), or None.

    Returns:
        f32[B].

    Raises:
        UserError: "config.train.loss_group_size=<n>: ..." when the groups do not divide the batch.

    Source: LLaVA's trainer (token mean within each device's micro-batch, plain mean over devices and accumulation steps).
    """
    count = mask.sum(axis=1).astype(jnp.float32)  # [B]
    rows = count.shape[0]
    if separate is not None:
        mine = jnp.where(separate, (count * separate).sum(), (count * ~separate).sum())
        return weight / jnp.maximum(mine, 1.0)
    if norm == "global_token_mean":
        return weight / jnp.maximum(count.sum(), 1.0)
    _check_division(rows, group_size)
    groups = count.reshape(-1, group_size).sum(axis=1)
    return weight / (jnp.repeat(jnp.maximum(groups, 1.0), group_size) * groups.shape[0])


def _check_division(rows: int, group_size: int) -> None:
    if rows % group_size:
        raise UserError(f"config.train.loss_group_size={group_size}: must divide the batch of {rows} rows")
