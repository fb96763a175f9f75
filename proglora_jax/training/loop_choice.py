"""Chooses how the training step's loop over layers is compiled: layers in one turn, and the compiler's options that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from proglora_jax.training.settings import Settings

ALL = 1 << 10
"""More layers than any model has: no loop at all."""
_GPU = ("gpu", "cuda")
_HOST = 8


def choose_unroll(settings: Settings, platform: str, axes: Mapping[str, int]) -> Settings:
    """Settings with `model.unroll` decided where the config leaves it (0).

    A loop stacks what its forward pass keeps for the backward one, and copies each layer's weights out of their stack. On an H200 that was
    5 % of a step of LLaVA-7B (benchmarks/results/gpu.md); without a loop neither happens, and the step compiles for 36 s instead of 14.
    Up to eight GPUs that hold whole weights do the same each, and sum gradients at the end, over NVLink in a few ms. Where weights or
    matmuls are split layers stay in a loop, for what they gather is to be freed again; so they do on more GPUs, where such sums take
    longer. Only one GPU is measured.

    Args:
        settings: the config; what it states stays.
        platform: of the devices, as JAX calls it.
        axes: {axis: size} of the mesh.
    """
    if settings.model.unroll:
        return settings
    unroll = ALL if platform in _GPU and _alike_on_one_host(axes) else 1
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, unroll=unroll))


def compiler_options(unroll: int, layers: int, mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for a training step on the mesh's devices; None leaves them as they are.

    On GPUs the matmuls are cuBLAS', which adds a low-rank delta into the output of the frozen linear; Triton's would write both. XLA's
    fusion of slices with matmuls lets these read a layer's weights in their stack. In a loop it must be off: a matmul whose output goes
    into a stack and is used as well is then done twice (jaxlib 0.11.2).

    Without a loop, several GPUs with whole weights have the sums of small gradients to tell each other. There the scheduler that hides
    transfers is off: it would hide 1 to 3 ms and let temporaries grow up to the limit (13B, 8 rows on each of eight H100, compiled: 36 GiB
    of them instead of 27 in a loop).

    Args:
        unroll: layers in one turn of the loop, as `choose_unroll` leaves it.
        layers: of the language model.
        mesh: of the devices that run the step.
    """
    if mesh.devices.flat[0].platform not in _GPU:
        return None
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": unroll >= layers}
    if unroll >= layers and mesh.size > 1 and _alike_on_one_host(mesh.shape):
        options["xla_gpu_enable_latency_hiding_scheduler"] = False
    return options


def _alike_on_one_host(axes: Mapping[str, int]) -> bool:
    return all(size == 1 for axis, size in axes.items() if axis != "data") and axes.get("data", 1) <= _HOST
