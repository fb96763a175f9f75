"""Attention "auto": what is chosen on which platform, and that a kernel that does not compile is not chosen."""

from __future__ import annotations

import pytest
from test_memory import settings_of

from proglora_jax.training import attention_choice
from proglora_jax.training.attention_choice import choose_attention, model_options
from proglora_jax.training.settings import ModelSettings


@pytest.mark.parametrize("platform, why", [("cpu", "no other is built for cpu"), ("rocm", "no other is built for rocm")])
def test_xla_where_there_is_no_other(platform, why):
    settings, said = choose_attention(settings_of(), platform)
    assert (settings.model.attention, said) == ("xla", why)


def test_a_gpu_takes_the_fused_kernel_if_it_compiles(monkeypatch):
    settings, said = choose_attention(settings_of(), "gpu")  # there is none here: the real attempt fails
    assert settings.model.attention == "xla" and said.startswith("the kernel cudnn does not compile here (")
    monkeypatch.setattr(attention_choice, "_compile", lambda kernel, dtype, device: None)
    assert choose_attention(settings_of(), "gpu")[0].model.attention == "cudnn"
    settings, said = choose_attention(settings_of(model__dtype="float32"), "gpu")
    assert (settings.model.attention, said) == ("xla", "cuDNN's kernel computes in 16 bits only")


def test_what_the_config_names_stays():
    settings, said = choose_attention(settings_of(model__attention="cudnn"), "cpu")
    assert (settings.model.attention, said) == ("cudnn", "the config names it")
    assert model_options(settings.model).attention == "cudnn" and model_options(ModelSettings(attention="auto")).attention == "xla"
