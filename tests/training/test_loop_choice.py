"""How the training step's loop over layers is compiled on a platform."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_llava
from test_memory import settings_of

from proglora_jax.training.attention_choice import model_options
from proglora_jax.training.loop_choice import ALL, choose_unroll, compiler_options
from proglora_jax.training.settings import ModelSettings


@pytest.mark.parametrize("platform, devices, fields, wanted", [
    ("gpu", 1, {}, ALL), ("cuda", 1, {}, ALL), ("cpu", 1, {}, 1), ("tpu", 1, {}, 1), ("gpu", 8, {}, 1),
    ("gpu", 1, {"model__unroll": 1}, 1), ("cpu", 8, {"model__unroll": 4}, 4),  # what the config states stays
])  # fmt: skip
def test_layers_in_one_turn_by_platform(platform, devices, fields, wanted):
    assert choose_unroll(settings_of(**fields), platform, devices).model.unroll == wanted


def test_an_undecided_loop_is_a_loop():
    assert model_options(ModelSettings()).unroll == 1


def test_options_of_the_compiler_are_for_gpus():
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert compiler_options(1, 32, tiny_llava.mesh(data=1)) is None
    looped, whole = compiler_options(1, 32, gpu), compiler_options(ALL, 32, gpu)
    assert looped == {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": False}
    assert whole == looped | {"xla_gpu_enable_dynamic_slice_fusion": True}
    assert compiler_options(31, 32, gpu) == looped and compiler_options(32, 32, gpu) == whole
    # XLA knows them on every platform: a name that it does not know would stop a run.
    assert float(jax.jit(lambda x: x + 1, compiler_options=whole)(1.0)) == 2.0
