"""Methods with routers in their layers and linears, exported with their gates: torch gates, scores and answers as ours does."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_export import World, difference, exported, world  # noqa: F401 (world is a fixture)
from test_export_dynamic import WORD, load, pictures

from proglora_jax.continual import torch_check
from proglora_jax.continual.export_gates import export_dynamic
from proglora_jax.continual.torch_check_gates import load_module
from proglora_jax.continual.trained import open_trained
from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import method_class

AT = "base_model.model.model.language_model.layers.{}.mlp.up_proj.lora_{}.weight"


def alone_as_together(model, folder) -> None:
    """Prompts of different lengths, with and without an image, have in a batch the gates, scores and answers that each has alone."""
    first, second, _ = pictures(folder)
    asked = [(f"What word is written on the sign?{WORD}", first), ("Is it red?", None), (f"Which of these?{WORD}", second), ("?", None)]
    batch = model.prompts(*map(list, zip(*asked)))
    with torch.no_grad():
        logits = model(**batch).logits
    gates, answers = model.gates, model.answer(*map(list, zip(*asked)), max_new_tokens=5)
    torch.testing.assert_close(model.gates, gates, atol=1e-5, rtol=0)
    for row, (text, image) in enumerate(asked):
        single = model.prompts([text], [image])
        with torch.no_grad():
            own = model(**single).logits[0]
        torch.testing.assert_close(own, logits[row, -len(own) :], atol=1e-4, rtol=0)
        torch.testing.assert_close(model.gates[0], gates[row], atol=1e-5, rtol=0)
        assert model.answer([text], [image], 5) == [answers[row]]
    made = model.generate(**batch, max_new_tokens=3, num_beams=2)
    assert made.shape[0] == len(asked) and len(model.gates) == 2 * len(asked)
    torch.testing.assert_close(model.gates[::2], gates, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="no gates for these prompts"):
        model.llava(input_ids=single["input_ids"])


def verified(world: World, workdir, out, stage: str | None = None):  # noqa: F811
    """The export, compared with our model by itself, opened in torch."""
    said = exported(export_dynamic, workdir, out, stage=stage, verify=True)
    assert "reloaded in torch: the same" in said and difference(said) < torch_check.TOLERANCE
    return said, load(out, world)


def their_block(world: World, folder):  # noqa: F811
    """A folder as PEFT loads it."""
    return peft.PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(world.model), folder)


# ------------------------------------------------------------------------------------------------------------- moelora


@pytest.mark.parametrize("stage, fields", [("0", {}), (None, {}), (None, {"router_input": "first_token"}),
                                           (None, {"router_input": "mean_prompt"})], ids=["first", "token", "first_token", "mean_prompt"])
def test_experts_of_every_linear(world, tmp_path, stage, fields):  # noqa: F811
    workdir = world.run("moelora", experts=2, **fields)
    said, model = verified(world, workdir, tmp_path / "out", stage)
    assert "2 blocks of rank 1 and their gates (expert 0, expert 1)" in said and model.columns == ["expert 0", "expert 1"]
    alone_as_together(model, tmp_path)
    torch.testing.assert_close(model.gates.sum(1), torch.ones(len(model.gates)))
    assert (model.gates.std(0).max() == 0) == (fields.get("router_input") == "first_token")  # which is BOS, the same for all
    if not fields and stage is None:
        trained = open_trained(workdir)
        expert = jax.tree.map(np.asarray, trained.method.block(trained.state, 1))["up_proj"]
        linear = their_block(world, tmp_path / "out" / "block_01").get_submodule(AT.format(1, "A").rpartition(".lora_")[0])
        np.testing.assert_array_equal(linear.lora_A["default"].weight.detach(), expert["a"][1].T)
        np.testing.assert_array_equal(linear.lora_B["default"].weight.detach(), expert["b"][1].T)
        assert linear.scaling["default"] == trained.method.scale == 2.0


# ------------------------------------------------------------------------------------------------------------- sema


@pytest.mark.parametrize("stage", ["0", None])
def test_modules_of_the_layers_that_grew(world, tmp_path, stage):  # noqa: F811
    workdir = world.run("sema", layer_share=0.5, threshold=0.0)
    said, model = verified(world, workdir, tmp_path / "out", stage)
    trained = open_trained(workdir, stage)
    modules = np.asarray(trained.state.memory["modules"])
    np.testing.assert_array_equal(modules, [[1, 0], [1, 0]] if stage else [[1, 0], [1, 1]])
    alone_as_together(model, tmp_path)
    torch.testing.assert_close(model.gates.sum(1), torch.ones(len(model.gates)))
    if stage is None:
        assert "2 blocks of rank 2 and their gates (TextVQA, ImageNet)" in said and model.gates.std(0).max() > 1e-4
        stored = load_file(tmp_path / "out" / "block_01" / "adapter_model.safetensors")
        assert AT.format(1, "A") in stored and not any(".layers.0." in name for name in stored)
        linears = [name for name, module in their_block(world, tmp_path / "out" / "block_01").named_modules() if hasattr(module, "lora_A")]
        assert len(linears) == 7 and all(".language_model.layers.1." in name for name in linears)


def test_a_task_for_which_no_layer_grew_has_no_folder(world, tmp_path):  # noqa: F811
    workdir = world.run("sema", layer_share=0.5, threshold=1e30)
    _, model = verified(world, workdir, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert fields["blocks"] == [{"folder": "block_00", "name": "TextVQA"}, {"folder": "", "name": "ImageNet"}]
    assert not (tmp_path / "out" / "block_01").exists()
    model.answer(["?"], None, 2)
    assert model.gates.tolist() == [[1.0, 0.0]]


# ------------------------------------------------------------------------------------------------------------- branchlora


@pytest.mark.parametrize("stage, fields", [("0", {}), (None, {}), (None, {"router_input": "mean_prompt", "renorm": "softmax_then_mask",
                                                                         "text_tokens": "text_prompt"})], ids=["first", "token", "mean"])
def test_branches_by_the_routers_of_the_task_that_the_keys_select(world, tmp_path, stage, fields):  # noqa: F811
    workdir = world.run("branchlora", experts=4, topk=2, rank=4, **fields)
    said, model = verified(world, workdir, tmp_path / "out", stage)
    assert "4 blocks of rank 1 and their gates (branch 0, branch 1, branch 2, branch 3)" in said
    alone_as_together(model, tmp_path)
    trained = open_trained(workdir, stage)
    branches = [load_file(tmp_path / "out" / f"block_{index:02d}" / "adapter_model.safetensors") for index in range(4)]
    for index, branch in enumerate(branches):
        np.testing.assert_array_equal(branch[AT.format(1, "A")], np.asarray(trained.state.params["trunk"]["up_proj"])[1].T)
        np.testing.assert_array_equal(branch[AT.format(1, "B")], np.asarray(trained.state.params["branches"]["up_proj"])[1, index].T)
    if stage is None:
        first, second, third = pictures(tmp_path)
        for text, image in ((WORD, first), ("Is it red?", None), ("What is this?", second), ("?", third)):
            model.answer([text], [image], 1)
            chosen = model.router.task.item()
            nearest_by_hand(model, text, image, chosen)


def nearest_by_hand(model, text, image, chosen: int) -> None:
    """The selected task against a cosine of numpy over the prompt's word embeddings and transformers' class token."""
    batch = model.prompts([text], [image])
    words = model.llava.get_input_embeddings()(batch["input_ids"])[0].detach().numpy()
    query, keys = words[batch["routing_mask"][0].numpy()].mean(0), model.router.text_keys.numpy()
    cosine = lambda q, k: k @ q / np.linalg.norm(q) / np.linalg.norm(k, axis=1)  # noqa: E731
    score = cosine(query, keys)
    if image:
        config, tower = model.llava.config, model.llava.model.vision_tower
        with torch.no_grad():
            states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[config.vision_feature_layer]
        score = score + cosine(states[0, 0].numpy(), model.router.image_keys.numpy())
    assert chosen == int(score.argmax())


# ------------------------------------------------------------------------------------------------------------- pclr

# Two tasks of four ranks each fill the pool; what the second adds is followed by no compression, for no task is to come.
RANKS = {"rank": 4, "top_ranks": 3, "narrow_ranks": 2, "capacity": 8, "shared_ranks": 2}
# Here the first task fills it: half of its ranks go, and the shared ones take part from then on.
FULL = RANKS | {"capacity": 4, "narrow_from": 2, "image_weight": 0.5}


@pytest.mark.parametrize("stage, fields, ranks", [("0", RANKS, 4), (None, RANKS, 8), (None, FULL, 4)], ids=["first", "later", "compressed"])
def test_ranks_of_decoder_and_projector(world, tmp_path, stage, fields, ranks):  # noqa: F811
    workdir = world.run("pclr", **fields)
    said, model = verified(world, workdir, tmp_path / "out", stage)
    assert f"1 block of rank {ranks} and their gates (TextVQA{', ImageNet' if stage is None else ''})" in said
    alone_as_together(model, tmp_path)
    assert (model.router.chosen.sum(-1) == 3).all()
    if stage is None and fields is RANKS:
        assert model.router.chosen[:, 0].unique(dim=0).shape[0] > 1 and model.gates.std(0).max() > 0  # by layer, and by prompt
    trained = open_trained(workdir, stage)
    assert (tmp_path / "out" / "shared").exists() == (fields is FULL) == bool(trained.state.memory["sharing"])
    peers = [("ranks", trained.method.scale, "pool")] + [("shared", 4.0 / 2, "shared")] * (fields is FULL)
    for folder, scale, name in peers:
        theirs = their_block(world, tmp_path / "out" / folder)
        for path, prefix, at in (("language_model.layers.1.mlp.up_proj", "", 1), ("multi_modal_projector.linear_2", "projector_", ())):
            linear = theirs.get_submodule(f"base_model.model.model.{path}")
            own = trained.state.params[prefix + name][path.rpartition(".")[2]]
            ours = np.asarray(own["b"])[at][:ranks].T @ np.asarray(own["a"])[at][:, :ranks].T
            np.testing.assert_allclose(linear.get_delta_weight("default").detach(), scale * ours, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- what is compared


WRONG = {
    "one expert of two": ("moelora", {"experts": 2}, lambda own: {"top": 1}),
    "no biases": ("sema", {"layer_share": 0.5, "threshold": 0.0}, lambda own: {"bias": 0 * own.bias}),
    "the other task": ("branchlora", {"experts": 4, "topk": 2, "rank": 4},
                       lambda own: {"text_keys": own.text_keys[::-1], "image_keys": own.image_keys[::-1]}),
    "a rank too few": ("pclr", RANKS, lambda own: {"top": 2}),
    "no ranks in the projector": ("pclr", RANKS, lambda own: {"blocks": {"ranks": dataclasses.replace(own.blocks["ranks"], projector={})}}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_torch_does_otherwise_is_not_kept(world, tmp_path, monkeypatch, case):  # noqa: F811
    name, fields, change = WRONG[case]
    kind = method_class(name)
    own = kind.routing
    monkeypatch.setattr(kind, "routing", lambda self, state: dataclasses.replace(own(self, state), **change(own(self, state))))
    with pytest.raises(UserError, match="differs from our model in its (gates|logits), by .* it was not kept"):
        exported(export_dynamic, world.run(name, **fields), tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, fields", [(name, fields) for name, fields, _ in list(WRONG.values())[:4]])
def test_half_precision_answers(world, tmp_path, name, fields):  # noqa: F811
    exported(export_dynamic, world.run(name, **fields), tmp_path / "out")
    kind = load_module(tmp_path / "out" / "gated_llava.py").GatedLlava
    model, half = (kind.load(str(tmp_path / "out"), str(world.model), dtype) for dtype in (torch.float32, torch.bfloat16))
    asked = [f"What word is written on the sign?{WORD}", "Is it red?"], [pictures(tmp_path)[0], None]
    assert model.answer(*asked, 4) and len(half.answer(*asked, 4)) == 2
    assert half.gates.dtype == torch.float32 and (half.gates - model.gates).abs().max() < 0.1
