"""Causal attention by splash attention, JAX's fused kernel for TPUs, for whole sequences on any mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from proglora_jax.core import mesh as meshes

LANES = 128
_BLOCKS = (512, 384, 256, 128)  # the kernel takes multiples of 128 that divide the sequence; the largest moves the least


def fits(head_width: int) -> bool:
    """Whether the kernel takes heads of this width; others go through XLA."""
    return head_width % LANES == 0


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Causal scaled dot product attention; no score ever exists outside the kernel.

    A sequence is padded at the right to a multiple of 128: no real query sees a key behind it. Under `on_mesh` each device computes its
    own rows and heads (the compiler cannot split a kernel by itself, hence `shard_map`).

    Args:
        query: [B, T, N, H], H as in `fits`.
        key: [B, T, K, H] with N a multiple of K.
        value: [B, T, K, H].
        interpret: run the kernel's program step by step, on any device: slow, for tests.

    Returns:
        [B, T, N, H] in query's dtype. Where a rematerialisation policy keeps "attention", the softmax's statistics are kept with it.
    """
    local, mesh = functools.partial(_local, interpret=interpret), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(query, key, value)
    rows = meshes.BATCH_AXES if query.shape[0] % meshes.batch_ways(mesh) == 0 else None
    heads = "model" if key.shape[2] % mesh.shape["model"] == 0 else None
    spec = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(local, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(query, key, value)


def _local(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool) -> jax.Array:
    length = query.shape[1]
    pad = ((0, 0), (0, -length % LANES), (0, 0), (0, 0))
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    by_head = [jnp.pad(part, pad).swapaxes(1, 2) for part in (scaled, key, value)]  # [B, N, T, H]
    mixed = jax.vmap(_kernel_of(query.shape[2], by_head[0].shape[2], interpret))(*by_head)
    return mixed.swapaxes(1, 2)[:, :length].astype(query.dtype)


def _kernel_of(heads: int, length: int, interpret: bool) -> Any:
    """The kernel for so many heads and positions (its tables of blocks are numpy's work, done while tracing)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = next(size for size in _BLOCKS if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block)
    causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    return splash_attention_kernel.make_splash_mha(
        causal, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpret)
