"""The table of parameter names: it covers the model once, and takes every published spelling."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

from proglora_jax.checkpoints.names import STYLES, canonical, llava_rows, styled
from proglora_jax.checkpoints.sources import disk_names
from proglora_jax.models.llava import abstract_llava
from proglora_jax.models.presets import PRESETS, LlavaConfig


def test_every_parameter_has_one_row():
    paths = [row.path for row in llava_rows(tied=False, projector_bias=True)]
    tree = abstract_llava(LlavaConfig()).to_tree()
    leaves = ["/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert sorted(paths) == sorted(leaves)
    assert len({row.name for row in llava_rows(tied=False, projector_bias=True)}) == len(paths)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # original LLaVA
        ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "language_model.model.layers.3.self_attn.q_proj.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.mm_projector.0.bias", "multi_modal_projector.linear_1.bias"),
        ("model.mm_projector.2.weight", "multi_modal_projector.linear_2.weight"),
        ("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        # transformers 4.x on disk is the table's own
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.weight", "vision_tower.vision_model.post_layernorm.weight"),
        # in memory from 4.52 on
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
        ("model.vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        # transformers 5.x, in memory and on disk
        ("model.vision_tower.encoder.layers.1.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.1.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
        # a CLIP alone
        ("vision_model.embeddings.patch_embedding.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
        ("encoder.layers.1.layer_norm1.bias", "vision_tower.vision_model.encoder.layers.1.layer_norm1.bias"),
        ("embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        # of no use
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.image_newline", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("text_model.encoder.layers.0.mlp.fc1.weight", None),
        ("visual_projection.weight", None),
        ("logit_scale", None),
        # unknown names stay, so that an error shows them
        ("model.layers_of_fun.weight", "model.layers_of_fun.weight"),
    ],
)
def test_spellings(name, expected):
    assert canonical(name) == expected


def test_write_inverts_read():
    rng = np.random.default_rng(0)
    shapes = {"linear": (5, 7), "same": (6,), "patches": (8, 3, 2, 2)}
    for row in llava_rows(tied=False, projector_bias=True):
        disk = rng.standard_normal(shapes[row.change])
        ours = row.read(disk)
        assert row.disk_shape(ours.shape, 3) == disk.shape
        np.testing.assert_array_equal(row.write(ours, disk.shape), disk)


@pytest.mark.parametrize(("preset", "projector"), [("llava15_7b", 20_979_712), ("llava15_13b", 31_467_520)])
def test_the_table_covers_the_published_models(preset, projector):
    """Every tensor of transformers' own model of that size, on the meta device, has a row, and the shape that we expect on disk."""
    config = PRESETS[preset]()
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config.to_hf()))
    theirs = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs.pop(None, None)
    ours = dict(disk_names(config))
    assert ours == theirs
    assert sum(int(np.prod(shape)) for name, shape in ours.items() if name.startswith("multi_modal_projector")) == projector
    assert ours["language_model.model.embed_tokens.weight"] == (32064, config.text_config.hidden_size)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_covers_vicuna_clip_and_projector(preset):
    """The papers' start, in three places: transformers' Llama with 32,000 rows, its whole CLIP, and the names of original LLaVA."""
    config = PRESETS[preset]()
    text, vision = config.text_config.to_hf() | {"vocab_size": 32000}, config.vision_config.to_hf()
    with torch.device("meta"):
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
        clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision))
    width, seen = config.text_config.hidden_size, config.vision_config.hidden_size
    projector = {"0.weight": (width, seen), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    theirs = {f"model.mm_projector.{name}": shape for name, shape in projector.items()}
    theirs |= {name: tuple(tensor.shape) for model in (language, clip) for name, tensor in model.state_dict().items()}
    found = {canonical(name): shape for name, shape in theirs.items()}
    found.pop(None)
    grown = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    ours = dict(disk_names(config))
    assert set(found) == set(ours) and {name for name in ours if ours[name] != found[name]} == grown
    assert all((ours[name], found[name]) == ((32064, width), (32000, width)) for name in grown)


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_inverses_of_canonical(style):
    names = [name for name, _ in disk_names(PRESETS["llava15_7b"]())]
    assert [canonical(styled(name, style)) for name in names] == names
