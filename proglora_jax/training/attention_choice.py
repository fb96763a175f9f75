"""Chooses how attention is computed where the config says "auto": by platform, dtype, and whether the fast kernel really compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.models.layers import Settings as ModelOptions
from proglora_jax.models.layers import attention
from proglora_jax.training.settings import ModelSettings, Settings

KERNELS = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
"""The fused attention of a platform."""


def choose_attention(
    settings: Settings, platform: str, device: jax.Device | None = None, *, planned: bool = False
) -> tuple[Settings, str]:
    """Settings with an implementation by name, and why it is that one.

    Args:
        settings: the config; what it names stays.
        platform: of the devices, as JAX calls it: "cpu", "gpu" (or "cuda"), "tpu".
        device: that the kernel must compile for, where it is not this process's own (a slice that is only described).
        planned: whether nothing will run here; a TPU's kernel may be planned with anywhere (cuDNN's not even traced without it).

    Raises:
        UserError: "config.model.attention='<name>': ..." for a kernel that does not run on the platform.
    """
    stated, dtype = settings.model.attention, settings.model.dtype
    if stated == "cudnn" or stated == "splash" and not planned:
        _check(stated, dtype, platform, device)
    name, why = attention_for(stated, dtype, platform, device)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, attention=name)), why


def attention_for(stated: str, dtype: str, platform: str, device: jax.Device | None = None) -> tuple[str, str]:
    """(implementation by name, why it is that one) for what a config states; arguments as in `choose_attention`."""
    return _choice(dtype, platform, device) if stated == "auto" else (stated, "the config names it")


def _check(kernel: str, dtype: str, platform: str, device: jax.Device | None) -> None:
    """Refuses a kernel that the devices cannot run, before anything is loaded."""
    why = ""
    if KERNELS.get(platform) != kernel:
        why = f"is a kernel for {'NVIDIA GPUs' if kernel == 'cudnn' else 'TPUs'}, and the devices here are of the kind {platform}"
    else:
        try:
            _compile(kernel, dtype, device)
        except Exception as error:  # of whatever kind a missing or old cuDNN, or a TPU's compiler, raises
            why = f"does not compile here ({_first_line(error)})"
    if why:
        raise UserError(
            f"config.model.attention='{kernel}': {why}; set config.model.attention=auto, which takes the fast kernel where there is one")


def model_options(model: ModelSettings) -> ModelOptions:
    """How the model computes; an "auto" that nobody has decided is XLA's attention, which runs everywhere."""
    return ModelOptions(model.dtype, "xla" if model.attention == "auto" else model.attention, model.unroll or 1)


def _choice(dtype: str, platform: str, device: jax.Device | None) -> tuple[str, str]:
    if platform not in KERNELS:
        return "xla", f"no other is built for {platform}"
    kernel = KERNELS[platform]
    if kernel == "cudnn" and dtype == "float32":
        return "xla", "cuDNN's kernel computes in 16 bits only"
    try:
        _compile(kernel, dtype, device)
    except Exception as error:  # of whatever kind a missing or old cuDNN, or a TPU's compiler, raises
        return "xla", f"the kernel {kernel} does not compile here ({_first_line(error)})"
    return kernel, f"fused kernel on {platform.upper()}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _compile(kernel: str, dtype: str, device: jax.Device | None) -> None:
    """Compiles a fused attention forward and backward in the pattern of training: causal, right-padded, heads of 128.

    Raises:
        Exception: where it cannot.
    """
    sharding = None if device is None else meshes.replicated(meshes.make_mesh({"data": 1, "fsdp": 1, "model": 1}, [device]))
    x = jax.ShapeDtypeStruct((2, 128, 4, 128), jnp.dtype(dtype), sharding=sharding)

    def loss(query, key, value):
        return attention(query, key, value, implementation=kernel, causal=True).astype(jnp.float32).sum()

    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
