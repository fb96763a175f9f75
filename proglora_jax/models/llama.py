"""The language model: a Llama decoder that takes a low-rank adapter as an argument, for training, prefill and decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.core import mesh as meshes
from proglora_jax.core import stack
from proglora_jax.core.types import Adapter
from proglora_jax.models.layers import Linear, Make, RMSNorm, Settings, activation, attention, gather_positions, rope_tables, rotate
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
        hidden: [B, T, D] hidden states after the final norm, or [B, K, D] at the positions asked for.
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

    def __call__(
        self, h: jax.Array, linears: Callable, rotation: tuple[jax.Array, jax.Array], attend: Callable, positions: jax.Array | None = None
    ):
        """Maps the residual stream through the layer.

        Args:
            h: [B, T, D].
            linears: (x, *names) -> outputs of the linears of these names with their adapters, a tuple.
            rotation: (cos, sin) for these positions, each f32[B or 1, T, 1, H].
            attend: (query, key, value) -> (mixed[B, K, N, H], what the caller wants to keep of key and value).
            positions: i32[B, K], where the layer's result is wanted; nothing but keys and values is computed elsewhere. None: everywhere.

        Returns:
            (h[B, K, D], what `attend` kept); K is T without `positions`.
        """
        heads = (*h.shape[:2], -1, self.head_dim)
        x = self.input_layernorm(h)
        if positions is None:
            turned, (query, key, value) = rotation, linears(x, "q_proj", "k_proj", "v_proj")
        else:
            turned = tuple(jnp.take(table[0], positions, axis=0) for table in rotation)  # the same for all rows of whole sequences
            h, (query,) = gather_positions(h, positions), linears(gather_positions(x, positions), "q_proj")
            key, value = linears(x, "k_proj", "v_proj")
        query = checkpoint_name(rotate(query.reshape(*h.shape[:2], -1, self.head_dim), *turned), "query")
        key = checkpoint_name(rotate(key.reshape(heads), *rotation), "key")
        value = checkpoint_name(value.reshape(heads), "value")
        mixed, kept = attend(query, key, value)  # [B, K, N, H]
        h = checkpoint_name(h + linears(mixed.reshape(*mixed.shape[:2], -1), "o_proj")[0], "residual")
        gate, up = linears(self.post_attention_layernorm(h), "gate_proj", "up_proj")
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return h + linears(activation("silu")(gate) * up, "down_proj")[0], kept


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
        self, x: jax.Array, *, length: jax.Array | None, adapter: Adapter | None, remat: str, cache_size: int, settings: Settings,
        positions: jax.Array | None = None,
    ) -> Output:
        """Runs whole sequences: a training step, or prefill when `cache_size` is not 0; arguments as in `Llava.decode`."""
        text, cache = self.config, None
        if cache_size:
            store = jnp.zeros((text.num_hidden_layers, x.shape[0], cache_size, text.num_key_value_heads, text.head_dim), x.dtype)
            cache = Cache(store, store)
        attend = lambda cache, index, only: _attend_full(length, cache, index, only, settings)
        return self._many(x, cache, attend, jnp.arange(x.shape[1]), adapter, remat, settings, positions)

    def extend(
        self, x: jax.Array, *, cache: Cache, start: int, adapter: Adapter | None, settings: Settings, positions: jax.Array | None = None
    ) -> Output:
        """Runs several new positions per row, from index `start` on, on a cache that holds those before; as in `Llava.decode`."""
        own = start + jnp.arange(x.shape[1])
        return self._many(x, cache, partial(_attend_extend, start=start), own, adapter, "none", settings, positions)

    def _many(
        self, x: jax.Array, cache: Cache | None, attend: Callable, indices: jax.Array, adapter: Adapter | None, remat: str,
        settings: Settings, positions: jax.Array | None,
    ) -> Output:
        """Runs several positions per row through all layers.

        Args:
            x, adapter, remat, settings, positions: as in `Llava.decode`.
            cache: where keys and values go; None keeps none.
            attend: (cache, index of the layer, the `positions` that have queries or None) -> what a layer's `attend` is.
            indices: i32[T], where the positions lie in their sequences.
        """
        rotation = rope_tables(indices[None], self.config.head_dim, self.config.rope_theta)
        layers, cuts = self.config.num_hidden_layers, positions is not None and _by_position(adapter, cache is not None)
        fixed, trained = _scanned(adapter)
        keeps = cache is not None

        def body(carry: tuple, scanned: tuple, only: jax.Array | None = None):
            (h, cache), ((layer, resting), (own, once, index)) = carry, scanned
            layer, h = meshes.gather_weights(layer, "language/layers", stacked=True), meshes.split_rows(h)
            context = _context(adapter, once, h)
            seen: dict[str, Any] = {}
            linears = _adapted(layer, adapter, _joined(resting, own), context, seen if keeps else None)
            h, cache = layer(h, linears, rotation, attend(cache, index, only), only)
            return (h, cache), ({**context, "linears": seen} if seen else context) if keeps else None

        # The cache is carried, not scanned: so the last layer can write into it as the others do.
        stacks, trained = (self.layers, fixed), (*trained, jnp.arange(layers))
        carry, contexts = stack.scan(
            body, (x, cache), stacks, trained=trained, policy=remat, unroll=1 if keeps else settings.unroll,
            count=layers - 1 if cuts else None)
        if cuts:  # its backward pass comes right after it, there is nothing to gain from computing it again
            last = jax.tree.map(lambda leaf: leaf[-1], (stacks, trained))
            carry, context = body(carry, last, positions)
            contexts = jax.tree.map(lambda rest, one: jnp.concatenate([rest, one[None]]), contexts, context)
        h, cache = carry
        if positions is not None and not cuts:
            h = gather_positions(h, positions)
        return Output(self.norm(h), cache, contexts)

    def hidden_after(self, x: jax.Array, count: int, settings: Settings) -> jax.Array:
        """The residual stream after the first `count` layers without an adapter, [B, T, D], from embeddings x[B, T, D]."""
        rotation = rope_tables(jnp.arange(x.shape[1])[None], self.config.head_dim, self.config.rope_theta)
        attend = _attend_full(None, None, None, None, settings)

        def body(h: jax.Array, layer: LlamaLayer):
            layer, h = meshes.gather_weights(layer, "language/layers", stacked=True), meshes.split_rows(h)
            return layer(h, _adapted(layer, None, {}, None), rotation, attend)[0], None

        return stack.scan(body, x, self.layers, count=count)[0]

    def step(
        self, x: jax.Array, *, cache: Cache, position: jax.Array, adapter: Adapter | None, contexts: Any, settings: Settings
    ) -> Output:
        """Runs one new position per row; arguments as in `Llava.decode`."""
        rotation = rope_tables(position[:, None], self.config.head_dim, self.config.rope_theta)
        (fixed, (leaves, layer_leaves)), decided = _scanned(adapter), contexts is not None
        indices = jnp.arange(self.config.num_hidden_layers)

        # The kernels stay split along fsdp: to move one position a row is cheaper than to move the weights for every token.
        def body(carry: tuple, scanned: tuple):
            h, cache = meshes.split_width(carry[0]), carry[1]
            layer, resting, own, once, index = scanned
            context = once if decided else _context(adapter, once, h)
            linears = _split(_adapted(layer, adapter, _joined(resting, own), context))
            h, cache = layer(h, linears, rotation, _attend_step(cache, index, position))
            return (h, cache), None

        # The cache is carried, not scanned: so it is updated in place and never held twice.
        layers = (self.layers, fixed, leaves, contexts if decided else layer_leaves, indices)
        (h, cache), _ = stack.scan(body, (x, cache), layers)
        return Output(self.norm(h), cache, contexts)


def _scanned(adapter: Adapter | None) -> tuple[Any, tuple[Any, Any]]:
    """What of an adapter goes along with the layers: (leaves that rest, (the other leaves, leaves that a layer uses once))."""
    if adapter is None:
        return {}, ({}, {})
    part = lambda rest: {name: {key: leaf for key, leaf in leaves.items() if (key in adapter.resting) == rest}
                         for name, leaves in adapter.leaves.items()}
    return part(True), (part(False), adapter.layer)


def _joined(resting: Any, own: Any) -> Any:
    """A layer's leaves of each linear, those that rest and the others."""
    return {name: {**leaves, **resting[name]} for name, leaves in own.items()}


def _by_position(adapter: Adapter | None, keeps: bool) -> bool:
    """Whether a linear may be given some positions alone: its delta does not depend on the others, and nobody observes them."""
    return adapter is None or (adapter.by_position and not (keeps and adapter.observe is not None))


def _context(adapter: Adapter | None, layer_leaves: Any, h: jax.Array) -> Any:
    """What a layer decides once for its seven linears, from the residual stream before it."""
    if adapter is None or adapter.layer_gate is None:
        return layer_leaves
    return adapter.layer_gate(layer_leaves, adapter.gates, h)


def _adapted(layer: LlamaLayer, adapter: Adapter | None, leaves: Any, context: Any, seen: dict[str, Any] | None = None) -> Callable:
    """Linears that read the same x, each with its adapter's delta added in x's dtype; `seen` takes what the adapter observes."""

    def linears(x: jax.Array, *names: str) -> tuple[jax.Array, ...]:
        outputs = {name: getattr(layer, name)(x) for name in names}
        adapted = tuple(name for name in names if name in leaves)
        if seen is not None and adapter is not None and adapter.observe is not None:
            seen.update({name: adapter.observe(name, leaves[name], context, adapter.gates, x) for name in adapted})
        if adapted:
            deltas = adapter.delta(adapted, {name: leaves[name] for name in adapted}, context, adapter.gates, x)
            outputs |= {name: outputs[name] + delta.astype(x.dtype) for name, delta in zip(adapted, deltas, strict=True)}
        return tuple(outputs[name] for name in names)

    return linears


def _split(linears: Callable) -> Callable:
    """Linears whose kernels stay split along fsdp: by their inputs in front of attention and MLP, by their outputs behind."""

    def split(x: jax.Array, *names: str) -> tuple[jax.Array, ...]:
        if names[0] in ("o_proj", "down_proj"):
            return tuple(map(meshes.split_width, linears(meshes.share_rows(x), *names)))
        return tuple(map(meshes.share_rows, linears(meshes.split_width(x), *names)))

    return split


def _attend_full(
    length: jax.Array | None, cache: Cache | None, index: jax.Array | None, positions: jax.Array | None, settings: Settings
) -> Callable:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array):
        if positions is None:
            mixed = attention(query, key, value, implementation=settings.attention, causal=True, key_lengths=length)
        else:  # few queries of many positions, each of which sees the keys up to its own
            mixed = attention(query, key, value, key_lengths=length, until=positions)
        if cache is None:
            return mixed, None
        return mixed, _stored(cache, index, 0, key, value)

    return attend


def _stored(cache: Cache, index: jax.Array, start: int, key: jax.Array, value: jax.Array) -> Cache:
    """The cache with a layer's keys and values of several positions, from `start` on."""
    store = lambda stored, new: jax.lax.dynamic_update_slice(stored, new[None].astype(stored.dtype), (index, 0, start, 0, 0))
    return Cache(store(cache.key, key), store(cache.value, value))


def _attend_extend(cache: Cache, index: jax.Array, positions: jax.Array | None, *, start: int) -> Callable:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array):
        updated = _stored(cache, index, start, key, value)
        own = stack.take(updated, index)
        local = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2]) if positions is None else positions
        # No fused kernel hides keys by index: it would be given a mask as large as the scores.
        return attention(query, own.key, own.value, until=start + local), updated

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
