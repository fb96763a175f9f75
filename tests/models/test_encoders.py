"""BERT and ViT against transformers' models in torch, after every layer and as a whole, in every naming style of their files."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import tiny_encoders
import torch

from proglora_jax.checkpoints.encoder_import import check_encoders, find_bert, find_vit
from proglora_jax.data.errors import UserError
from proglora_jax.models.layers import Settings

SETTINGS = Settings()
BERTS = {
    "plain": {},
    "odd": dict(hidden_size=21, num_attention_heads=3, intermediate_size=17, num_hidden_layers=2, hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=1e-5, type_vocab_size=1),
}  # fmt: skip
VITS = {
    "plain": {},
    "odd": dict(hidden_size=18, num_attention_heads=3, intermediate_size=11, num_hidden_layers=2, image_size=15, patch_size=5,
                qkv_bias=False, layer_norm_eps=1e-5),
}  # fmt: skip


def texts(rng, vocabulary):
    """Right-padded rows of different lengths: tokens i32[B, T], lengths i32[B]."""
    lengths = np.array([9, 2, 13], np.int32)
    tokens = rng.integers(5, vocabulary, (3, 13)).astype(np.int32)
    tokens[np.arange(13) >= lengths[:, None]] = 0
    return tokens, lengths


def torch_states(model, tokens, lengths):
    mask = torch.tensor(np.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens).long(), attention_mask=mask, output_hidden_states=True)


@pytest.mark.parametrize("case", BERTS)
def test_bert_after_every_layer(case, rng, tmp_path):
    theirs = tiny_encoders.bert(tmp_path, **BERTS[case])
    ours = find_bert(tmp_path).load()
    tokens, lengths = texts(rng, theirs.config.vocab_size)
    output = torch_states(theirs, tokens, lengths)
    assert len(output.hidden_states) == theirs.config.num_hidden_layers + 1

    @jax.jit
    def all_states(model):
        return [model(tokens, lengths, SETTINGS, count=count) for count in range(len(output.hidden_states))]

    real = np.arange(tokens.shape[1]) < lengths[:, None]
    for actual, expected in zip(all_states(ours), output.hidden_states):
        np.testing.assert_allclose(np.asarray(actual)[real], expected.numpy()[real], rtol=1e-5, atol=1e-5)
    whole = np.asarray(jax.jit(lambda model: model(tokens, lengths, SETTINGS))(ours))
    np.testing.assert_allclose(whole[real], output.last_hidden_state.numpy()[real], rtol=1e-4, atol=1e-4)


def test_padding_changes_no_real_state(rng, tmp_path):
    tiny_encoders.bert(tmp_path)
    ours = find_bert(tmp_path).load()
    tokens, lengths = texts(rng, 40)
    run = jax.jit(lambda model, tokens: model(tokens, lengths, SETTINGS))
    other = tokens.copy()
    other[np.arange(13) >= lengths[:, None]] = 7
    assert not np.array_equal(tokens, other)
    real = np.arange(13) < lengths[:, None]
    np.testing.assert_array_equal(np.asarray(run(ours, tokens))[real], np.asarray(run(ours, other))[real])


@pytest.mark.parametrize("case", VITS)
def test_vit_after_every_layer(case, rng, tmp_path):
    theirs = tiny_encoders.vit(tmp_path, **VITS[case])
    ours = find_vit(tmp_path).load()
    side = theirs.config.image_size
    image = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    states, hooks = [], []
    hooks.append(theirs.embeddings.register_forward_hook(lambda module, inputs, out: states.append(out)))
    for layer in theirs.layers:
        hooks.append(layer.register_forward_hook(lambda module, inputs, out: states.append(out[0] if isinstance(out, tuple) else out)))
    with torch.no_grad():
        whole = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).last_hidden_state
    assert len(states) == theirs.config.num_hidden_layers + 1

    @jax.jit
    def all_states(model):
        return [model.states(image, SETTINGS, count=count) for count in range(len(states))]

    for actual, expected in zip(all_states(ours), states):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda model: model(image, SETTINGS))(ours), whole, rtol=1e-4, atol=1e-4)


MEMORY = {
    r"^encoder\.layer\.": "layers.", r"attention\.attention\.query": "attention.q_proj", r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj", r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1", r"(\d)\.output\.dense": r"\1.mlp.fc2",
}  # fmt: skip


def in_memory(name):
    """A ViT's name inside of transformers 5."""
    for old, new in MEMORY.items():
        name = re.sub(old, new, name)
    return name


def as_tensorflow(name):
    """A norm's name in the first BERT files."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


RENAMES = {
    "prefix": lambda kind, name: f"{kind}.{name}",
    "old_norms": lambda kind, name: f"{kind}.{as_tensorflow(name)}",
    "no_pooler": lambda kind, name: None if name.startswith("pooler") else name,
    "memory": lambda kind, name: f"{kind}.{in_memory(name)}" if kind == "vit" else f"model.{kind}.{name}",
}


@pytest.mark.parametrize("style", RENAMES)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_every_naming_style_is_read(kind, style, tmp_path):
    find = {"bert": find_bert, "vit": find_vit}[kind]
    getattr(tiny_encoders, kind)(tmp_path, num_hidden_layers=2)
    expected = jax.tree.leaves(find(tmp_path).load())
    tiny_encoders.save_renamed(tmp_path, lambda name: RENAMES[style](kind, name), torch_file=style == "old_norms")
    found = jax.tree.leaves(find(tmp_path).load())
    assert len(found) == len(expected) > 15
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_heads_of_other_tasks_are_left_out(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path)
    assert not [name for name in find_vit(tmp_path).tensors if "classifier" in name]


def test_what_is_no_such_encoder_is_one_sentence(tmp_path):
    tiny_encoders.bert(tmp_path / "bert")
    tiny_encoders.vit(tmp_path / "vit")
    with pytest.raises(UserError, match=r"^config.similarity.vit_path='': not set; give the Hugging Face folder of a ViT, or set"):
        find_vit("")
    with pytest.raises(UserError, match=r"^config.similarity.bert_path=/nowhere: no such folder; give the Hugging Face folder of a BERT"):
        find_bert("/nowhere")
    with pytest.raises(UserError, match="bert_path=.*vit: holds a model of the type 'vit', not a BERT; give the folder of a BERT"):
        find_bert(tmp_path / "vit")
    with pytest.raises(UserError, match="vit_path=.*bert: holds a model of the type 'bert', not a ViT"):
        find_vit(tmp_path / "bert")
    tiny_encoders.save_renamed(tmp_path / "vit", lambda name: None if "layernorm_after" in name else name, torch_file=False)
    with pytest.raises(UserError, match=r"vit: 6 problem\(s\): no tensor encoder.layer.0.layernorm_after.bias"):
        find_vit(tmp_path / "vit")
    tiny_encoders.vit(tmp_path / "other")
    settings = tmp_path / "other" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"height": 16, "width": 16', '"height": 24, "width": 24'))
    with pytest.raises(UserError, match="other: the image processor makes 24 pixels, but config.json says image_size=16; use"):
        check_encoders(tmp_path / "other", tmp_path / "bert")
    config = (tmp_path / "bert" / "config.json").read_text()
    (tmp_path / "bert" / "config.json").write_text(config.replace('"hidden_size": 24', '"hidden_size": 28'))
    with pytest.raises(UserError, match=r"has shape \[.*24.*\], but config.json asks for \[.*28.*\]"):
        find_bert(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(config.replace('"hidden_size": 24', '"hidden_size": 25'))
    with pytest.raises(UserError, match="config.json: BERT: hidden_size=25 must be a multiple of num_attention_heads=4"):
        find_bert(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").unlink()
    with pytest.raises(UserError, match="bert: config.json is missing"):
        find_bert(tmp_path / "bert")


def test_published_sizes_have_the_published_parameter_lists():
    """Shapes only: bert-base-uncased has 109,482,240 parameters with its pooler of 590,592; ViT-B/16 has 85,798,656 without a pooler."""
    from proglora_jax.checkpoints.encoder_import import _disk_shapes
    from proglora_jax.models.presets import BertConfig, VitConfig

    count = lambda config: sum(int(np.prod(shape)) for _, shape in _disk_shapes(config))
    assert count(BertConfig()) == 109_482_240 - 590_592
    assert count(VitConfig()) == 85_798_656
