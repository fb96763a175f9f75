"""Chooses how attention is computed where the config says "auto": by platform, dtype, and whether the fast kernel really compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from proglora_jax.models.layers import Settings as ModelOptions
from proglora_jax.models.layers import attention
from proglora_jax.training.settings import ModelSettings, Settings


def choose_attention(settings: Settings, platform: str) -> tuple[Settings, str]:
    """Settings with an implementation by name, and why it is that one.

    Args:
        settings: the config; what it names stays.
        platform: of the devices, as JAX calls it: "cpu", "gpu" (or "cuda"), "tpu".
    """
    name, why = attention_for(settings.model.attention, settings.model.dtype, platform)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, attention=name)), why


def attention_for(stated: str, dtype: str, platform: str) -> tuple[str, str]:
    """(implementation by name, why it is that one) for what a config states; arguments as in `choose_attention`."""
    return _choice(dtype, platform) if stated == "auto" else (stated, "the config names it")


def model_options(model: ModelSettings) -> ModelOptions:
    """How the model computes; an "auto" that nobody has decided is XLA's attention, which runs everywhere."""
    return ModelOptions(model.dtype, "xla" if model.attention == "auto" else model.attention, model.unroll)


def _choice(dtype: str, platform: str) -> tuple[str, str]:
    if platform not in ("gpu", "cuda"):
        return "xla", f"no other is built for {platform}"
    if dtype == "float32":
        return "xla", "cuDNN's kernel computes in 16 bits only"
    try:
        _compile_fused(dtype)
    except Exception as error:  # of whatever kind a missing or old cuDNN raises
        return "xla", f"cuDNN's kernel does not compile here ({(str(error) or type(error).__name__).splitlines()[0][:160]})"
    return "cudnn", "fused kernel on GPU"


def _compile_fused(dtype: str) -> None:
    """Compiles cuDNN's attention forward and backward in the shapes' pattern of training: causal, right-padded, heads of 128.

    Raises:
        Exception: where it cannot.
    """
    x = jax.ShapeDtypeStruct((2, 128, 4, 128), jnp.dtype(dtype))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(query, key, value, lengths):
        return attention(query, key, value, implementation="cudnn", causal=True, key_lengths=lengths).astype(jnp.float32).sum()

    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, lengths).compile()
