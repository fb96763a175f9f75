"""The vision tower: CLIP's vision transformer, from pixels to the hidden states of one layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from proglora_jax.core import mesh as meshes
from proglora_jax.core import stack
from proglora_jax.models.layers import LayerNorm, Linear, Make, Settings, activation, attention, cut_patches
from proglora_jax.models.presets import ClipConfig


class ClipLayer(nnx.Module):
    """One pre-norm encoder layer: self-attention over all positions, then an MLP, all linears with biases."""

    def __init__(self, make: Make, config: ClipConfig):
        width, inner = config.hidden_size, config.intermediate_size
        self.layer_norm1 = LayerNorm(make, width, config.layer_norm_eps)
        self.q_proj = Linear(make, width, width, bias=True)
        self.k_proj = Linear(make, width, width, bias=True)
        self.v_proj = Linear(make, width, width, bias=True)
        self.out_proj = Linear(make, width, width, bias=True)
        self.layer_norm2 = LayerNorm(make, width, config.layer_norm_eps)
        self.fc1 = Linear(make, width, inner, bias=True)
        self.fc2 = Linear(make, inner, width, bias=True)
        self.heads = config.num_attention_heads
        self.hidden_act = config.hidden_act

    def __call__(self, h: jax.Array, settings: Settings) -> jax.Array:
        """Maps the residual stream h[B, 1+P, D] through the layer."""
        rows, length, _ = h.shape
        x = self.layer_norm1(h)
        query, key, value = (linear(x).reshape(rows, length, self.heads, -1) for linear in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(query, key, value, implementation=settings.attention)  # [B, 1+P, N, H]
        h = h + self.out_proj(mixed.reshape(rows, length, -1))
        return h + self.fc2(activation(self.hidden_act)(self.fc1(self.layer_norm2(h))))


class ClipVision(nnx.Module):
    """CLIP's vision transformer. All layers and the last norm are kept, also those that no feature layer needs: export writes them."""

    def __init__(self, make: Make, config: ClipConfig):
        width = config.hidden_size
        pixels = config.num_channels * config.patch_size**2
        self.patch_embedding = Linear(make, pixels, width)
        self.class_embedding = nnx.Param(make((width,), "embedding"))
        self.position_embedding = nnx.Param(make((config.num_patches + 1, width), "embedding"))
        # The published name, spelled so.
        self.pre_layrnorm = LayerNorm(make, width, config.layer_norm_eps)
        self.layers = ClipLayer(stack.stacked_shape(make, config.num_hidden_layers), config)
        self.post_layernorm = LayerNorm(make, width, config.layer_norm_eps)
        self.config = config

    def __call__(self, image: jax.Array, count: int, settings: Settings) -> jax.Array:
        """Runs the first `count` layers.

        Args:
            image: f32[B, H, W, 3] normalised pixels, H = W = image_size.
            count: number of layers to run, from 0 to L; the others cost nothing.
            settings: compute dtype and attention.

        Returns:
            [B, 1+P, D] hidden states in the compute dtype, class token first.

        Raises:
            ValueError: "image has shape [...], but the vision tower takes [B, ...]"
        """
        h = self.embed(image, settings)
        if count == 0:
            return h

        def body(h: jax.Array, layer: ClipLayer):
            return meshes.gather_weights(layer, "vision/layers", stacked=True)(meshes.split_rows(h), settings), None

        return stack.scan(body, h, self.layers, count=count)[0]

    def embed(self, image: jax.Array, settings: Settings) -> jax.Array:
        """Hidden states before the first layer: patches and class token with positions, normalised; [B, 1+P, D]."""
        side, patch = self.config.image_size, self.config.patch_size
        expected = (side, side, self.config.num_channels)
        if image.shape[1:] != expected:
            raise ValueError(f"image has shape {list(image.shape)}, but the vision tower takes [B, {', '.join(map(str, expected))}]")
        dtype = jnp.dtype(settings.dtype)
        patches = self.patch_embedding(cut_patches(image.astype(dtype), patch))  # [B, P, D]
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (patches.shape[0], 1, patches.shape[-1]))
        h = jnp.concatenate([first, patches], axis=1) + self.position_embedding[...].astype(dtype)
        return self.pre_layrnorm(h)
