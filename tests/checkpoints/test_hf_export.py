"""Folders that we write load in transformers with every tensor named, and give the same logits."""

from __future__ import annotations

import json

import chex
import jax
import jax.numpy as jnp
import pytest
import tiny_hf
import torch
import transformers
from safetensors.numpy import load_file

from proglora_jax.checkpoints.hf_export import save_llava
from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.data.errors import UserError
from proglora_jax.models.llava import random_llava


@pytest.mark.parametrize("case", ["grouped", "odd_widths", "tied_full", "theta"])
def test_transformers_loads_what_we_write(case, rng, tmp_path):
    theirs = tiny_hf.make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    files = save_llava(load_llava(tmp_path / "theirs", jnp.float32), tmp_path / "ours")
    assert [file.name for file in files] == ["model.safetensors"]
    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = tiny_hf.torch_inputs(*tiny_hf.batch(theirs, rng))
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=0)
    for (name, ours), (_, original) in zip(sorted(back.state_dict().items()), sorted(theirs.state_dict().items())):
        assert torch.equal(ours, original), name  # also the layers that no forward pass reads


def test_names_are_those_of_the_hub(tmp_path):
    tiny_hf.make("plain").save_pretrained(tmp_path / "theirs")
    save_llava(load_llava(tmp_path / "theirs", jnp.float32), tmp_path / "ours")
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias" in names
    assert "language_model.lm_head.weight" in names


def test_bfloat16_shards_come_back_bit_for_bit(tmp_path):
    tiny_hf.make("grouped").save_pretrained(tmp_path / "theirs")
    llava = load_llava(tmp_path / "theirs", jnp.bfloat16)
    files = save_llava(llava, tmp_path / "ours", shard_bytes=20_000)
    sizes = [sum(array.nbytes for array in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 20_000
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert not list((tmp_path / "ours").glob("*.partial"))
    chex.assert_trees_all_equal(load_llava(tmp_path / "ours", jnp.bfloat16), llava)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(llava))
    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and back.dtype == torch.bfloat16


def test_a_model_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model already .config.json.; choose another folder or remove it"):
        save_llava(None, tmp_path)


def test_random_model_round_trip(tmp_path):
    tiny_hf.make("plain").save_pretrained(tmp_path / "theirs")
    config = load_llava(tmp_path / "theirs", jnp.float32).config
    llava = random_llava(config, seed=4)
    save_llava(llava, tmp_path / "ours")
    chex.assert_trees_all_equal(load_llava(tmp_path / "ours", jnp.float32), llava)
