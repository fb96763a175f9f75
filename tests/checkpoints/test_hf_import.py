"""Reading Hugging Face folders: every naming style gives the same model, and damage gives one clear sentence."""

from __future__ import annotations

import json
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_hf
import transformers
from safetensors.numpy import load_file, save_file

from proglora_jax.checkpoints import hf_import
from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.checkpoints.sources import find_source, read_config
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as the installed transformers writes it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_hf.make("grouped").save_pretrained(folder)
    return folder


def rewrite(saved, folder, rename=lambda name: name, change=lambda tensors: tensors, config=lambda fields: fields):
    """A copy of the folder with tensors and config changed."""
    folder.mkdir(exist_ok=True)
    tensors = {rename(name): array for name, array in load_file(saved / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors")
    fields = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(fields)))
    return folder


def style_4x(name):
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def in_memory_4x(name):
    name = style_4x(name)
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)


def in_memory_5x(name):
    return in_memory_4x(name).replace("vision_tower.vision_model.", "vision_tower.")


def original(name):
    name = style_4x(name).replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"multi_modal_projector.{ours}", f"model.mm_projector.{theirs}")
    return re.sub(r"^vision_tower", "model.vision_tower.vision_tower", name)


@pytest.mark.parametrize("style", [style_4x, in_memory_4x, in_memory_5x, original])
def test_every_style_loads_the_same_model(saved, tmp_path, style):
    renamed = rewrite(saved, tmp_path / "renamed", style)
    assert set(load_file(renamed / "model.safetensors")) != set(load_file(saved / "model.safetensors"))
    chex.assert_trees_all_equal(load_llava(renamed, jnp.float32), load_llava(saved, jnp.float32))


def test_config_of_transformers_4(saved, tmp_path):
    def old(fields):
        rope = fields["text_config"].pop("rope_parameters")
        fields["text_config"]["rope_theta"] = rope["rope_theta"]
        fields["text_config"]["torch_dtype"] = fields["text_config"].pop("dtype", "float32")
        return fields

    renamed = rewrite(saved, tmp_path / "old", style_4x, config=old)
    assert read_config(renamed) == read_config(saved)


def test_buffers_without_a_use_are_ignored(saved, tmp_path):
    def more(tensors):
        rotary = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        names = [rotary, "model.image_newline", "vision_tower.embeddings.position_ids"]
        return {**tensors, **{name: np.zeros(3, np.float32) for name in names}}

    assert load_llava(rewrite(saved, tmp_path / "more", change=more), jnp.float32).config == read_config(saved)


def test_shards_and_bfloat16(saved, tmp_path):
    whole = load_llava(saved, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {jnp.dtype(jnp.bfloat16)}
    assert whole.settings.dtype == "bfloat16"
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(saved / "model.safetensors").items()}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    chex.assert_trees_all_equal(load_llava(tmp_path, jnp.bfloat16), whole)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 problem.*model-00002-of-00002.safetensors is missing"):
        load_llava(tmp_path)


@pytest.mark.parametrize("whole_clip", [True, False])
def test_a_language_model_a_clip_and_a_projector(saved, tmp_path, whole_clip):
    """The start of continual training: Vicuna, CLIP and the stage-1 projector lie in three places."""
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(saved)
    config = llava.config
    language = transformers.LlamaForCausalLM(config.text_config)
    language.model.load_state_dict(llava.model.language_model.state_dict())
    language.lm_head.load_state_dict(llava.lm_head.state_dict())
    language.save_pretrained(tmp_path / "language")
    if whole_clip:
        text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        text |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=config.vision_config.to_dict(), text_config=text))
        clip.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    else:
        clip = llava.model.vision_tower
    clip.save_pretrained(tmp_path / "vision")
    projector = {original(name): array for name, array in load_file(saved / "model.safetensors").items() if "projector" in name}
    save_file(projector, tmp_path / "projector.safetensors")

    places = dict(vision_folder=tmp_path / "vision", projector_file=tmp_path / "projector.safetensors")
    joined = load_llava(tmp_path / "language", jnp.float32, **places)
    # Its vocabulary has no row for <image>: two are added, and the number of rows is padded as in transformers' conversion.
    assert joined.config.text_config.vocab_size == 128 and joined.config.image_token_id == 64
    tree, whole = joined.to_tree(), load_llava(saved, jnp.float32).to_tree()
    table, head = tree["language"]["embed_tokens"], tree["language"]["lm_head"]["kernel"]
    for row in (64, 65, 127):
        np.testing.assert_allclose(table[row], np.mean(table[:64], axis=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(head[:, row], np.mean(head[:, :64], axis=1), rtol=1e-5, atol=1e-7)
    tree["language"] |= {"embed_tokens": table[:64], "lm_head": {"kernel": head[:, :64]}}
    chex.assert_trees_all_equal(tree, whole)
    with pytest.raises(UserError, match="language model without a vision tower; give the folder of a CLIP: .* --vision in the tools"):
        load_llava(tmp_path / "language")
    with pytest.raises(UserError, match="holds no projector; give the one .*: config.model.projector_path in a run, --projector in"):
        load_llava(tmp_path / "language", vision_folder=tmp_path / "vision")


def test_all_problems_in_one_error(saved, tmp_path):
    def damage(tensors):
        del tensors["language_model.model.norm.weight"], tensors["multi_modal_projector.linear_1.bias"]
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:-1]
        tensors["language_model.model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 36), np.int8)
        return {**tensors, "language_model.model.layers.9.input_layernorm.weight": np.zeros(2, np.float32)}

    with pytest.raises(UserError) as raised:
        load_llava(rewrite(saved, tmp_path / "damaged", change=damage))
    message = str(raised.value)
    assert "5 problem(s)" in message and "config.json and the weights belong together" in message
    for part in (
        "no tensor language_model.model.norm.weight",
        "no tensor multi_modal_projector.linear_1.bias",
        "unexpected tensor language_model.model.layers.9.input_layernorm.weight",
        "language_model.lm_head.weight has shape [63, 36], but config.json asks for [64, 36]",
        "up_proj.weight holds I8, not floats",
    ):
        assert part in message


def test_damaged_folders_give_one_sentence(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_llava(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: config.json is missing"):
        load_llava(empty)
    (empty / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cannot be read as JSON"):
        load_llava(empty)
    (empty / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(UserError, match="holds no model.safetensors, no pytorch_model.bin and no index of parts$"):
        load_llava(empty)
    (empty / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(UserError, match="found mm_projector.bin: give it as the projector, and the language model's folder here"):
        load_llava(empty)
    (empty / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer, not the weights"):
        load_llava(empty)
    (empty / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: cannot be read as safetensors .*truncated"):
        load_llava(empty)
    fields = json.loads((saved / "config.json").read_text())
    fields["text_config"]["num_attention_heads"] = 0
    (empty / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="config.json: text_config: num_attention_heads=0 must be a whole number above 0"):
        load_llava(empty)
    fields["text_config"]["model_type"] = "gemma"
    (empty / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"config.json: text_config: model_type='gemma' is not supported \(llama is\)"):
        load_llava(empty)


def test_parameters_lie_on_the_mesh(saved, monkeypatch):
    """Layer by layer or stacked on the host: the same numbers, laid out as core/mesh.py says."""
    plain = load_llava(saved, jnp.float32).to_tree()
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    stacked = load_llava(saved, jnp.float32, mesh=mesh).to_tree()
    monkeypatch.setattr(hf_import, "STACK_ON_HOST", 0)
    streamed = load_llava(saved, jnp.float32, mesh=mesh).to_tree()
    alone = load_llava(saved, jnp.float32).to_tree()
    for other in (stacked, streamed, alone):
        chex.assert_trees_all_equal(other, plain)
    for tree in (stacked, streamed):
        kernel = tree["language"]["layers"]["up_proj"]["kernel"]
        assert kernel.shape == (3, 36, 48) and {shard.data.shape for shard in kernel.addressable_shards} == {(3, 18, 24)}
        assert tree["language"]["layers"]["input_layernorm"]["scale"].sharding.is_fully_replicated


def test_fingerprint_follows_contents(saved, tmp_path):
    copy = rewrite(saved, tmp_path / "copy")
    first = find_source(copy).fingerprint()
    assert first == find_source(copy).fingerprint() and re.fullmatch("[0-9a-f]{64}", first)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert find_source(copy).fingerprint() != first
