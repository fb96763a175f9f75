"""Attention "auto": what is chosen on which platform, and that a kernel that does not compile is not chosen."""

from __future__ import annotations

import pytest
from test_memory import settings_of

from proglora_jax.data.errors import UserError
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


def test_what_the_config_names_stays(monkeypatch):
    settings, said = choose_attention(settings_of(model__attention="xla"), "gpu")
    assert (settings.model.attention, said) == ("xla", "the config names it")
    monkeypatch.setattr(attention_choice, "_compile", lambda kernel, dtype, device: None)
    settings, said = choose_attention(settings_of(model__attention="cudnn"), "gpu")
    assert (settings.model.attention, said) == ("cudnn", "the config names it")
    assert model_options(settings.model).attention == "cudnn" and model_options(ModelSettings(attention="auto")).attention == "xla"


@pytest.mark.parametrize(
    "name, platform, why",
    [
        ("cudnn", "cpu", "is a kernel for NVIDIA GPUs, and the devices here are of the kind cpu"),
        ("cudnn", "gpu", "does not compile here ("),  # there is no GPU here: the real attempt fails
        ("splash", "cpu", "is a kernel for TPUs, and the devices here are of the kind cpu"),
        ("splash", "gpu", "is a kernel for TPUs, and the devices here are of the kind gpu"),
    ],
)
def test_a_kernel_of_another_machine_is_one_sentence(name, platform, why):
    with pytest.raises(UserError) as refused:
        choose_attention(settings_of(model__attention=name), platform)
    assert str(refused.value).startswith(f"config.model.attention='{name}': {why}") and "\n" not in str(refused.value)
    assert str(refused.value).endswith("; set config.model.attention=auto, which takes the fast kernel where there is one")


def test_plans_may_name_the_kernel_of_a_tpu():
    settings, said = choose_attention(settings_of(model__attention="splash"), "cpu", planned=True)
    assert (settings.model.attention, said) == ("splash", "the config names it")
    with pytest.raises(UserError, match="config.model.attention='cudnn'"):
        choose_attention(settings_of(model__attention="cudnn"), "cpu", planned=True)
