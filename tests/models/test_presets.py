"""Sizes of the published models, and configs as transformers 4 and 5 write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from proglora_jax.models.llava import abstract_llava
from proglora_jax.models.presets import LlamaConfig, LlavaConfig, llava15_7b, llava15_13b


@pytest.mark.parametrize(("preset", "billions"), [(llava15_7b, 7.06), (llava15_13b, 13.35)])
def test_presets_have_the_published_sizes(preset, billions):
    llava = abstract_llava(preset(), jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(llava)) / 1e9 == pytest.approx(billions, abs=0.005)
    projector = sum(leaf.size for leaf in jax.tree.leaves(llava.projector_params()))
    assert projector == {7.06: 20_979_712, 13.35: 31_467_520}[billions]
    assert preset().image_tokens == 576 and preset().vision_layers_run == 23
    assert llava.targets().block_size(16) == {7.06: 39_976_960, 13.35: 62_586_880}[billions]


def test_config_spellings_of_transformers_4_and_5():
    old = {"rope_theta": 500.0, "hidden_size": 64, "num_attention_heads": 4, "rope_scaling": None, "vocab_size": 99}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(new).head_dim == 16
    hub = {"model_type": "llava", "image_token_index": 7, "text_config": {"model_type": "llama", "vocab_size": 32064}, "pad_token_id": 5}
    config = LlavaConfig.from_hf(hub)
    assert config.image_token_id == 7 and config.pad_token_id == 5
    assert config.text_config.hidden_size == 4096 and config.vision_config.hidden_size == 1024
    assert LlavaConfig.from_hf(config.to_hf()) == config == LlavaConfig.from_hf({**config.to_hf(), "image_token_id": 7})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"model_type": "mistral"}}, "text_config: model_type='mistral' is not supported"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "rope_type='linear' is not supported"),
        ({"text_config": {"attention_bias": True}}, "attention_bias=True is not supported"),
        ({"text_config": {"num_attention_heads": 32, "num_key_value_heads": 5}}, "must be a multiple of num_key_value_heads=5"),
        ({"text_config": {"num_attention_heads": 0}}, "text_config: num_attention_heads=0 must be a whole number above 0"),
        ({"text_config": {"hidden_size": "4096"}}, "text_config: hidden_size='4096' must be a whole number above 0"),
        ({"text_config": {"hidden_size": 16, "num_attention_heads": 32}}, "head_dim=0 must be even and above 0"),
        ({"vision_config": {"patch_size": 0}}, "vision_config: patch_size=0 must be a whole number above 0"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "model_type='siglip_vision_model' is not supported"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer=\[-2, -5\] must be one integer from -25 to 24"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls' is not supported"),
    ],
)
def test_configs_that_are_not_supported_say_why(fields, message):
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_hf(fields)
