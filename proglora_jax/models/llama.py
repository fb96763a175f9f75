"""The language model: a Llama decoder that takes a low-rank adapter as an argument, for training, prefill and decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.core import mesh as meshes
from proglora_jax.core import stack
from proglora_jax.core.types import Adapter
from proglora_jax.models.layers import Linear, Make, RMSNorm, Settings, activation, attention, rope_tables, rotate
from proglora_jax.models.presets import LlamaConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after rotation) and values of all layers.

    Attributes:
        key: [L, B, S, K, H].
        value: [L, B, S, K, H].
    """

    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What the decoder returns.

    Attributes:
        hidden: [B, T, D] hidden states after the final norm.
        cache: keys and values, after prefill and decoding; None in training.
        contexts: pytree of arrays [L, ...], what `adapter.layer_gate` decided at prefill; None in training.
    """

    hidden: jax.Array
    cache: Cache | None = None
    contexts: Any = None


class LlamaLayer(nnx.Module):
    """One decoder layer: RMSNorm, grouped causal attention with rotary positions, RMSNorm, SwiGLU; no biases."""

    def __init__(self, make: Make, config: LlamaConfig):
        width, inner = config.hidden_size, config.intermediate_size
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.input_layernorm = RMSNorm(make, width, config.rms_norm_eps)
        self.q_proj = Linear(make, width, wide)
        self.k_proj = Linear(make, width, narrow)
        self.v_proj = Linear(make, width, narrow)
        self.o_proj = Linear(make, wide, width)
        self.post_attention_layernorm = RMSNorm(make, width, config.rms_norm_eps)
        self.gate_proj = Linear(make, width, inner)
        self.up_proj = Linear(make, width, inner)
        self.down_proj = Linear(make, inner, width)
        self.head_dim = config.head_dim

    def __call__(self, h: jax.Array, linear: Callable, rotation: tuple[jax.Array, jax.Array], attend: Callable):
        """Maps the residual stream through the layer.

        Args:
            h: [B, T, D].
            linear: (name, x) -> the linear of that name with its adapter.
            rotation: (cos, sin) for these positions, each f32[B, T, 1, H].
            attend: (query, key, value) -> (mixed[B, T, N, H], what the caller wants to keep of key and value).

        Returns:
            (h[B, T, D], what `attend` kept).
        """
        heads = (*h.shape[:2], -1, self.head_dim)
        x = self.input_layernorm(h)
        query = checkpoint_name(rotate(linear("q_proj", x).reshape(heads), *rotation), "query")
        key = checkpoint_name(rotate(linear("k_proj", x).reshape(heads), *rotation), "key")
        value = checkpoint_name(linear("v_proj", x).reshape(heads), "value")
        mixed, kept = attend(query, key, value)  # [B, T, N, H]
        mixed = checkpoint_name(mixed.reshape(*h.shape[:2], -1), "attention")
        h = checkpoint_name(h + linear("o_proj", mixed), "residual")
        x = self.post_attention_layernorm(h)
        gate = checkpoint_name(linear("gate_proj", x), "gate")
        up = checkpoint_name(linear("up_proj", x), "up")
        return h + linear("down_proj", activation("silu")(gate) * up), kept


class Llama(nnx.Module):
    """A Llama decoder with its embedding table and head."""

    def __init__(self, make: Make, config: LlamaConfig, *, tied: bool):
        self.embed_tokens = nnx.Param(make((config.vocab_size, config.hidden_size), "embedding"))
        self.layers = LlamaLayer(stack.stacked_shape(make, config.num_hidden_layers), config)
        self.norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if tied else Linear(make, config.hidden_size, config.vocab_size)
        self.config = config

    def embed(self, tokens: jax.Array, dtype: str) -> jax.Array:
        """Rows of the embedding table, [B, T, D] in `dtype`; ids past the table's end (an image token) read its last row."""
        return jnp.take(self.embed_tokens[...], tokens, axis=0, mode="clip").astype(dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the vocabulary, f32[..., V], from hidden[..., D]."""
        name, weights = ("embed_tokens", self.embed_tokens[...]) if self.lm_head is None else ("lm_head", self.lm_head.kernel[...])
        if hidden.ndim > 2:  # many positions a row; for one each it is cheaper to move the positions than the head
            weights = meshes.gather_weights(weights, f"language/{name}")
        else:
            hidden = meshes.split_width(hidden)
        equation = "...d,vd->...v" if self.lm_head is None else "...d,dv->...v"
        return jnp.einsum(equation, hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def full(
        self, x: jax.Array, *, length: jax.Array | None, adapter: Adapter | None, remat: str, cache_size: int, settings: Settings
    ) -> Output:
        """Runs whole sequences: a training step, or prefill when `cache_size` is not 0; arguments as in `Llava.decode`."""
        rotation = rope_tables(jnp.arange(x.shape[1])[None], self.config.head_dim, self.config.rope_theta)
        attend = _attend_full(length, cache_size, settings)
        leaves, layer_leaves = _scanned(adapter)

        def body(h: jax.Array, scanned: tuple):
            layer, own, once = scanned
            layer, h = meshes.gather_weights(layer, "language/layers", stacked=True), meshes.split_rows(h)
            context = _context(adapter, once, h)
            seen: dict[str, Any] = {}
            h, kept = layer(h, _adapted(layer, adapter, own, context, seen if cache_size else None), rotation, attend)
            return h, (kept, {**context, "linears": seen} if seen else context) if cache_size else None

        h, kept = stack.scan(body, x, (self.layers, leaves, layer_leaves), policy=remat, unroll=settings.unroll)
        if not cache_size:
            return Output(self.norm(h))
        (key, value), contexts = kept
        return Output(self.norm(h), Cache(key, value), contexts)

    def hidden_after(self, x: jax.Array, count: int, settings: Settings) -> jax.Array:
        """The residual stream after the first `count` layers without an adapter, [B, T, D], from embeddings x[B, T, D]."""
        rotation = rope_tables(jnp.arange(x.shape[1])[None], self.config.head_dim, self.config.rope_theta)
        attend = _attend_full(None, 0, settings)

        def body(h: jax.Array, layer: LlamaLayer):
            layer, h = meshes.gather_weights(layer, "language/layers", stacked=True), meshes.split_rows(h)
            return layer(h, _adapted(layer, None, {}, None), rotation, attend)[0], None

        return stack.scan(body, x, self.layers, count=count)[0]

    def step(
        self, x: jax.Array, *, cache: Cache, position: jax.Array, adapter: Adapter | None, contexts: Any, settings: Settings
    ) -> Output:
        """Runs one new position per row; arguments as in `Llava.decode`."""
        rotation = rope_tables(position[:, None], self.config.head_dim, self.config.rope_theta)
        leaves, layer_leaves = _scanned(adapter)
        decided = contexts is not None
        indices = jnp.arange(self.config.num_hidden_layers)

        # The kernels stay split along fsdp: to move one position a row is cheaper than to move the weights for every token.
        def body(carry: tuple, scanned: tuple):
            h, cache = meshes.split_width(carry[0]), carry[1]
            layer, own, once, index = scanned
            context = once if decided else _context(adapter, once, h)
            h, cache = layer(h, _split(_adapted(layer, adapter, own, context)), rotation, _attend_step(cache, index, position))
            return (h, cache), None

        # The cache is carried, not scanned: so it is updated in place and never held twice.
        layers = (self.layers, leaves, contexts if decided else layer_leaves, indices)
        (h, cache), _ = stack.scan(body, (x, cache), layers)
        return Output(self.norm(h), cache, contexts)


def _scanned(adapter: Adapter | None) -> tuple[Any, Any]:
    return ({}, {}) if adapter is None else (adapter.leaves, adapter.layer)


def _context(adapter: Adapter | None, layer_leaves: Any, h: jax.Array) -> Any:
    """What a layer decides once for its seven linears, from the residual stream before it."""
    if adapter is None or adapter.layer_gate is None:
        return layer_leaves
    return adapter.layer_gate(layer_leaves, adapter.gates, h)


def _adapted(layer: LlamaLayer, adapter: Adapter | None, leaves: Any, context: Any, seen: dict[str, Any] | None = None) -> Callable:
    """The layer's linears by name, each with its adapter's delta added in the output's dtype; `seen` takes what the adapter observes."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        y = getattr(layer, name)(x)
        if name not in leaves:
            return y
        if seen is not None and adapter.observe is not None:
            seen[name] = adapter.observe(name, leaves[name], context, adapter.gates, x)
        return y + adapter.delta(name, leaves[name], context, adapter.gates, x).astype(y.dtype)

    return linear


def _split(linear: Callable) -> Callable:
    """Linears whose kernels stay split along fsdp: by their inputs in front of attention and MLP, by their outputs behind."""

    def split(name: str, x: jax.Array) -> jax.Array:
        if name in ("o_proj", "down_proj"):
            return meshes.split_width(linear(name, meshes.share_rows(x)))
        return meshes.share_rows(linear(name, meshes.split_width(x)))

    return split


def _attend_full(length: jax.Array | None, cache_size: int, settings: Settings) -> Callable:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array):
        mixed = attention(query, key, value, implementation=settings.attention, causal=True, key_lengths=length)
        pad = ((0, 0), (0, cache_size - key.shape[1]), (0, 0), (0, 0))
        return mixed, (jnp.pad(key, pad), jnp.pad(value, pad)) if cache_size else None

    return attend


def _attend_step(cache: Cache, index: jax.Array, position: jax.Array) -> Callable:
    rows = jnp.arange(position.shape[0])

    def attend(query: jax.Array, key: jax.Array, value: jax.Array):
        query, key, value = meshes.split_rows((query, key, value))
        updated = Cache(cache.key.at[index, rows, position].set(key[:, 0]), cache.value.at[index, rows, position].set(value[:, 0]))
        own = stack.take(updated, index)
        # One query per row is bound by reading the cache, so there is nothing for a fused kernel to win.
        return attention(query, own.key, own.value, key_lengths=position + 1), updated

    return attend
