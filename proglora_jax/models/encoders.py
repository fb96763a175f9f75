"""Encoders for the similarity of tasks: BERT for texts and ViT for images, forward only, from inputs to hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from proglora_jax.core import stack
from proglora_jax.models.layers import LayerNorm, Linear, Make, Settings, activation, attention, cut_patches
from proglora_jax.models.presets import BertConfig, VitConfig


class SelfAttention(nnx.Module):
    """Attention of every position to every other of its row, with biases."""

    def __init__(self, make: Make, width: int, heads: int, *, bias: bool = True):
        self.q_proj = Linear(make, width, width, bias=bias)
        self.k_proj = Linear(make, width, width, bias=bias)
        self.v_proj = Linear(make, width, width, bias=bias)
        self.out_proj = Linear(make, width, width, bias=True)
        self.heads = heads

    def __call__(self, x: jax.Array, settings: Settings, lengths: jax.Array | None = None) -> jax.Array:
        """Maps x[B, T, D]; positions from lengths[B] on are seen by nobody."""
        rows, length, _ = x.shape
        query, key, value = (linear(x).reshape(rows, length, self.heads, -1) for linear in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(query, key, value, implementation=settings.attention, key_lengths=lengths)  # [B, T, N, H]
        return self.out_proj(mixed.reshape(rows, length, -1))


class BertLayer(nnx.Module):
    """One encoder layer with the norms after the residual sums."""

    def __init__(self, make: Make, config: BertConfig):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = SelfAttention(make, width, config.num_attention_heads)
        self.attention_norm = LayerNorm(make, width, config.layer_norm_eps)
        self.fc1 = Linear(make, width, inner, bias=True)
        self.fc2 = Linear(make, inner, width, bias=True)
        self.output_norm = LayerNorm(make, width, config.layer_norm_eps)
        self.hidden_act = config.hidden_act

    def __call__(self, h: jax.Array, lengths: jax.Array, settings: Settings) -> jax.Array:
        """Maps the hidden states h[B, T, D] of rows with lengths[B] real positions."""
        h = self.attention_norm(h + self.attention(h, settings, lengths))
        return self.output_norm(h + self.fc2(activation(self.hidden_act)(self.fc1(h))))


class BertEncoder(nnx.Module):
    """BERT without pooler and heads, for single texts (all of token type 0).

    Source: Devlin et al., BERT (2019).
    """

    def __init__(self, make: Make, config: BertConfig):
        width = config.hidden_size
        self.word_embedding = nnx.Param(make((config.vocab_size, width), "embedding"))
        self.position_embedding = nnx.Param(make((config.max_position_embeddings, width), "embedding"))
        self.type_embedding = nnx.Param(make((config.type_vocab_size, width), "embedding"))
        self.embedding_norm = LayerNorm(make, width, config.layer_norm_eps)
        self.layers = BertLayer(stack.stacked_shape(make, config.num_hidden_layers), config)
        self.config = config

    def __call__(self, tokens: jax.Array, lengths: jax.Array, settings: Settings, count: int | None = None) -> jax.Array:
        """Runs the first `count` layers.

        Args:
            tokens: i32[B, T], right padded, T at most max_position_embeddings.
            lengths: i32[B] real tokens of each row; padding changes none of their states.
            settings: compute dtype and attention.
            count: number of layers; all by default.

        Returns:
            [B, T, D] hidden states in the compute dtype; those of padding mean nothing.

        Raises:
            ValueError: "a text of 600 tokens, but this BERT has 512 positions"
        """
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"a text of {tokens.shape[1]} tokens, but this BERT has {self.config.max_position_embeddings} positions")
        dtype = jnp.dtype(settings.dtype)
        table = lambda parameter: parameter[...].astype(dtype)
        h = table(self.word_embedding)[tokens] + table(self.position_embedding)[: tokens.shape[1]] + table(self.type_embedding)[0]
        h = self.embedding_norm(h)
        if count == 0:
            return h
        body = lambda h, layer: (layer(h, lengths, settings), None)
        return stack.scan(body, h, self.layers, count=count)[0]


class VitLayer(nnx.Module):
    """One encoder layer with the norms before attention and MLP."""

    def __init__(self, make: Make, config: VitConfig):
        width, inner = config.hidden_size, config.intermediate_size
        self.norm1 = LayerNorm(make, width, config.layer_norm_eps)
        self.attention = SelfAttention(make, width, config.num_attention_heads, bias=config.qkv_bias)
        self.norm2 = LayerNorm(make, width, config.layer_norm_eps)
        self.fc1 = Linear(make, width, inner, bias=True)
        self.fc2 = Linear(make, inner, width, bias=True)
        self.hidden_act = config.hidden_act

    def __call__(self, h: jax.Array, settings: Settings) -> jax.Array:
        """Maps the residual stream h[B, 1+P, D] through the layer."""
        h = h + self.attention(self.norm1(h), settings)
        return h + self.fc2(activation(self.hidden_act)(self.fc1(self.norm2(h))))


class VitEncoder(nnx.Module):
    """The vision transformer without pooler and head.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021).
    """

    def __init__(self, make: Make, config: VitConfig):
        width = config.hidden_size
        # With the leading axes that they have on disk.
        self.class_embedding = nnx.Param(make((1, 1, width), "embedding"))
        self.position_embedding = nnx.Param(make((1, config.num_patches + 1, width), "embedding"))
        self.patch_embedding = Linear(make, config.num_channels * config.patch_size**2, width, bias=True)
        self.layers = VitLayer(stack.stacked_shape(make, config.num_hidden_layers), config)
        self.norm = LayerNorm(make, width, config.layer_norm_eps)
        self.config = config

    def __call__(self, image: jax.Array, settings: Settings) -> jax.Array:
        """[B, 1+P, D] states after all layers and the final norm, class token first, of image f32[B, H, W, 3]."""
        return self.norm(self.states(image, settings))

    def states(self, image: jax.Array, settings: Settings, count: int | None = None) -> jax.Array:
        """States after the first `count` layers (all by default), before the final norm.

        Args:
            image: f32[B, H, W, 3] normalised pixels, H = W = image_size.
            settings: compute dtype and attention.
            count: number of layers.

        Returns:
            [B, 1+P, D] in the compute dtype.

        Raises:
            ValueError: "image has shape [...], but this ViT takes [B, ...]"
        """
        side, patch, channels = self.config.image_size, self.config.patch_size, self.config.num_channels
        if image.shape[1:] != (side, side, channels):
            raise ValueError(f"image has shape {list(image.shape)}, but this ViT takes [B, {side}, {side}, {channels}]")
        dtype = jnp.dtype(settings.dtype)
        patches = self.patch_embedding(cut_patches(image.astype(dtype), patch))
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (patches.shape[0], 1, patches.shape[-1]))
        h = jnp.concatenate([first, patches], axis=1) + self.position_embedding[...].astype(dtype)  # [B, 1+P, D]
        if count == 0:
            return h
        return stack.scan(lambda h, layer: (layer(h, settings), None), h, self.layers, count=count)[0]


def abstract_bert(config: BertConfig, dtype=jnp.float32) -> BertEncoder:
    """A BERT of shapes without arrays."""
    return BertEncoder(lambda shape, kind: jax.ShapeDtypeStruct(shape, dtype), config)


def abstract_vit(config: VitConfig, dtype=jnp.float32) -> VitEncoder:
    """A ViT of shapes without arrays."""
    return VitEncoder(lambda shape, kind: jax.ShapeDtypeStruct(shape, dtype), config)
