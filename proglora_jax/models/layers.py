"""Linear layers, norms, rotary positions and attention, and the one rule on number formats that all models follow.

The rule: the dtype of the activations is the compute dtype. Parameters may be stored in any dtype and are cast to the activations'
dtype where they are used. Norms, softmax, rotations and activation functions are computed in float32 and cast back; logits and
attention scores leave their matmul in float32 (`preferred_element_type`). Nothing else changes a dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from proglora_jax.models.splash import fits, splash_attention

# (shape, kind) -> array or jax.ShapeDtypeStruct; kind is "kernel", "embedding", "ones" or "zeros".
Make = Callable

ATTENTION = ("xla", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model computes; static, so that a change of settings is a new compile.

    Attributes:
        dtype: compute dtype by name, "float32" or "bfloat16".
        attention: implementation by name, "xla" (runs everywhere), "cudnn" (NVIDIA GPUs, bfloat16, head width a multiple of 8) or
            "splash" (TPUs; causal attention of whole sequences with a head width that is a multiple of 128, XLA for the rest).
        unroll: layers of the language model in one turn of the loop over layers, in training.
    """

    dtype: str = "float32"
    attention: str = "xla"
    unroll: int = 1

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is unknown: choose one of {', '.join(ATTENTION)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: choose float32, bfloat16 or float16")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError("attention='cudnn' computes in 16 bits only: choose dtype='bfloat16' or attention='xla'")


def fill(abstract: nnx.Module, leaf: Callable[[str, jax.ShapeDtypeStruct], Any]) -> Any:
    """The module of shapes `abstract` with arrays in it: leaf(path such as "layers/q_proj/kernel", shape and dtype), one call each."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree_util.tree_unflatten(structure, [leaf(path_of(keys), shape) for keys, shape in leaves])


def path_of(keys: tuple) -> str:
    """Path of a parameter from its keys in a flattened module."""
    names = [str(key.name) for key in keys]
    # A parameter is a node of its own in the tree, with its array under "value".
    return "/".join(names[:-1] if names[-1] == "value" else names)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """y = x W + b in x's dtype.

    Args:
        x: [..., d_in].
        kernel: [d_in, d_out], any float dtype.
        bias: [d_out] or None.

    Returns:
        [..., d_out] in x's dtype.
    """
    y = jnp.dot(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


@jax.custom_vjp
def trained_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`dense` for a linear that trains: the gradients of its parameters leave their sums in float32, over positions and over devices.

    Those of `dense` would leave them in x's dtype, rounded on each device before they are added up.

    Args:
        x: [..., d_in].
        kernel: f32[d_in, d_out].
        bias: f32[d_out] or None.

    Returns:
        [..., d_out] in x's dtype.
    """
    return dense(x, kernel, bias)


def _trained_dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, tuple]:
    return dense(x, kernel, bias), (x, kernel, bias)


def _trained_dense_backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, kernel, bias = kept
    sums = tuple(range(g.ndim - 1))
    d_kernel = jax.lax.dot_general(g, x, ((sums, sums), ((), ())), preferred_element_type=jnp.float32).T
    d_bias = None if bias is None else g.astype(jnp.float32).sum(sums).astype(bias.dtype)
    return jnp.dot(g, kernel.astype(g.dtype).T), d_kernel.astype(kernel.dtype), d_bias


trained_dense.defvjp(_trained_dense_forward, _trained_dense_backward)


class Linear(nnx.Module):
    """A linear layer with a kernel [d_in, d_out] and, where asked for, a bias [d_out]."""

    def __init__(self, make: Make, d_in: int, d_out: int, *, bias: bool = False):
        self.kernel = nnx.Param(make((d_in, d_out), "kernel"))
        self.bias = nnx.Param(make((d_out,), "zeros")) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[..., d_in] to [..., d_out]."""
        return dense(x, self.kernel[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """Root mean square norm with a scale and no bias. Source: LLaMA; the scale multiplies in float32."""

    def __init__(self, make: Make, width: int, eps: float):
        self.scale = nnx.Param(make((width,), "ones"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[..., D] over its last axis."""
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(jnp.square(full), axis=-1, keepdims=True) + self.eps)
        return (full * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, make: Make, width: int, eps: float):
        self.scale = nnx.Param(make((width,), "ones"))
        self.bias = nnx.Param(make((width,), "zeros"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[..., D] over its last axis."""
        full = x.astype(jnp.float32)
        full = full - jnp.mean(full, axis=-1, keepdims=True)
        full = full * jax.lax.rsqrt(jnp.mean(jnp.square(full), axis=-1, keepdims=True) + self.eps)
        full = full * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return full.astype(x.dtype)


def cut_patches(image: jax.Array, side: int) -> jax.Array:
    """Cuts image[B, H, W, C] into squares, row by row: [B, P, side * side * C].

    A convolution whose stride is its kernel's size is a matmul over them.
    """
    _, height, width, channels = image.shape
    pixels = image.reshape(-1, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(-1, (height // side) * (width // side), side * side * channels)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation function by its name in HF configs, computed in float32.

    Raises:
        ValueError: "activation '<name>' is not supported: choose one of gelu, ..."
    """
    table = {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "silu": jax.nn.silu,
    }
    if name not in table:
        raise ValueError(f"activation {name!r} is not supported: choose one of {', '.join(table)}")
    return lambda x: table[name](x.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary position embedding, in HF's layout (the two halves of a head form the pairs).

    Args:
        positions: i32[B, T] (B may be 1 where all rows agree).
        head_dim: head width H, even.
        theta: base of the frequencies.

    Returns:
        (cos, sin), each f32[B, T, 1, H].
    """
    frequencies = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    angles = positions.astype(jnp.float32)[..., None] * frequencies  # [B, T, H/2]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]  # [B, T, 1, H]
    return jnp.cos(angles), jnp.sin(angles)


def gather_positions(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[B, T, D] at index i32[B, K] -> [B, K, D]."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies the rotary position embedding to x[B, T, N, H], in float32."""
    full = x.astype(jnp.float32)
    first, second = jnp.split(full, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (full * cos + turned * sin).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    implementation: str = "xla",
    causal: bool = False,
    key_lengths: jax.Array | None = None,
    until: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot product attention; grouped where there are fewer key-value heads than query heads.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H] with N a multiple of K.
        value: [B, S, K, H].
        implementation: see `Settings.attention`.
        causal: query t sees keys 0..t only.
        key_lengths: i32[B], keys from this index on are hidden; None shows all.
        until: i32[B, T], the last key that each query sees; None shows all.

    Returns:
        [B, T, N, H] in query's dtype; XLA's carries the name "attention". Of a fused kernel the policies that keep this name keep what its
        backward pass reads, the output among it, instead of the output alone.
    """
    if implementation == "splash":
        if causal and key_lengths is None and until is None and fits(query.shape[-1]):
            return splash_attention(query, key, value)
        implementation = "xla"
    mask = None if until is None else (jnp.arange(key.shape[1]) <= until[..., None])[:, None]  # [B, 1, T, S]
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, key_value_seq_lengths=key_lengths, implementation=implementation
    )
    return mixed if implementation == "cudnn" else checkpoint_name(mixed, "attention")
