"""How the training step's loop over layers is compiled on a platform."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_llava
from test_memory import settings_of

from proglora_jax.training.attention_choice import model_options
from proglora_jax.training.loop_choice import ALL, choose_unroll, compiler_options
from proglora_jax.training.settings import ModelSettings


@pytest.mark.parametrize("platform, axes, fields, wanted", [
    ("gpu", {"data": 1}, {}, ALL), ("cuda", {"data": 1}, {}, ALL), ("cpu", {"data": 1}, {}, 1), ("tpu", {"data": 1}, {}, 1),
    ("gpu", {"data": 8, "fsdp": 1, "model": 1}, {}, ALL), ("gpu", {"data": 2, "fsdp": 4, "model": 1}, {}, 1),
    ("gpu", {"data": 16, "fsdp": 1, "model": 1}, {}, 1), ("gpu", {"data": 4, "fsdp": 1, "model": 2}, {}, 1),
    ("tpu", {"data": 8, "fsdp": 1, "model": 1}, {}, 1),
    ("gpu", {"data": 1}, {"model__unroll": 1}, 1), ("cpu", {"data": 8}, {"model__unroll": 4}, 4),  # what the config states stays
])  # fmt: skip
def test_layers_in_one_turn_by_platform_and_mesh(platform, axes, fields, wanted):
    assert choose_unroll(settings_of(**fields), platform, axes).model.unroll == wanted


def test_an_undecided_loop_is_a_loop():
    assert model_options(ModelSettings()).unroll == 1


def test_options_of_the_compiler_are_for_gpus():
    gpus = lambda **axes: SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), shape=axes, size=math.prod(axes.values()))
    gpu = gpus(data=1, fsdp=1, model=1)
    assert compiler_options(1, 32, tiny_llava.mesh(data=1)) is None
    looped, whole = compiler_options(1, 32, gpu), compiler_options(ALL, 32, gpu)
    assert looped == {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": False}
    assert whole == looped | {"xla_gpu_enable_dynamic_slice_fusion": True}
    assert compiler_options(31, 32, gpu) == looped and compiler_options(32, 32, gpu) == whole
    assert compiler_options(ALL, 32, gpus(data=8, fsdp=1, model=1)) == whole | {"xla_gpu_enable_latency_hiding_scheduler": False}
    assert compiler_options(1, 32, gpus(data=8, fsdp=1, model=1)) == looped
    assert compiler_options(ALL, 32, gpus(data=2, fsdp=4, model=1)) == whole  # weights that are gathered, in time
    # XLA knows them on every platform: a name that it does not know would stop a run.
    assert float(jax.jit(lambda x: x + 1, compiler_options=compiler_options(ALL, 32, gpus(data=8)))(1.0)) == 2.0
