"""A stage with gates, exported: the torch module beside it asks, gates and generates as ours does, or the export is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from test_export import World, exported, world  # noqa: F401 (a fixture)

from proglora_jax import tools
from proglora_jax.continual import export_gates, torch_check_gates
from proglora_jax.continual.export_gates import export_dynamic
from proglora_jax.continual.predict import Predictor, make_questions
from proglora_jax.continual.torch_check_gates import load_module
from proglora_jax.continual.trained import open_trained
from proglora_jax.data.batch import INSTRUCTION
from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageLoader
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.routing import Block, Routing

WORD = "\nAnswer the question using a single word or phrase."


def load(folder, world: World):
    return load_module(folder / "gated_llava.py").GatedLlava.load(str(folder), str(world.model))


def pictures(folder) -> list[str]:
    rng, paths = np.random.default_rng(3), []
    for size in ((48, 48), (60, 31), (17, 90)):
        paths.append(str(folder / f"{size}.png"))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def odd_pictures(folder) -> list[str]:
    """16-bit grey, palette with transparency, and two files that are cut off."""
    rng, paths = np.random.default_rng(4), [str(folder / name) for name in ("grey16.png", "palette.gif", "cut.jpg", "cut.png")]
    Image.fromarray(rng.integers(0, 65536, (40, 30)).astype(np.uint16)).save(paths[0])
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).quantize(16).save(paths[1], transparency=0)
    for path in paths[2:]:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        with open(path, "rb+") as file:
            file.truncate(len(file.read()) // 2)
    return paths


def test_the_same_ids_masks_gates_and_answers(world, tmp_path, capsys):
    workdir, (first, second, third) = world.run("proglora_dynamic"), pictures(tmp_path)
    assert tools.main(["convert", "to-hf", str(workdir), "--kind", "dynamic", "--no-verify", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 blocks of rank 2 and their gates (TextVQA, ImageNet)" in said and "not verified, as asked" in said
    asked = [(f"What word is written on the sign?{WORD}", first), ("  Is it red?\n", None), (f"What is </s> this?{WORD}", second),
             ("What?", third), (f"Which of these is not a <pad> tree, é, or 10.5?{WORD}", None)]
    trained = open_trained(workdir)
    predictor = Predictor(trained, trained.backbone()[0])
    questions = make_questions(asked)
    ours, encoded = predictor(questions, 0, max_new_tokens=6), predictor.encoder.encode_questions(questions)
    model = load(tmp_path / "out", world)
    batch = model.prompts([text for text, _ in asked], [image for _, image in asked])
    assert batch["attention_mask"].sum(1).tolist() == [len(item.tokens) for item in encoded]
    for row, item in enumerate(encoded):
        real = batch["attention_mask"][row] == 1
        assert batch["input_ids"][row][real].tolist() == item.tokens.tolist()
        assert batch["routing_mask"][row][real].tolist() == (item.segments == INSTRUCTION).tolist()
        assert not batch["routing_mask"][row][~real].any() and item.segments.tolist().count(INSTRUCTION)
    assert model.answer(*map(list, zip(*asked)), max_new_tokens=6) == [answer.answer for answer in ours]
    gates = np.array([list(answer.gates.values()) for answer in ours])
    np.testing.assert_allclose(model.gates.numpy(), gates, atol=1e-5, rtol=0)
    assert model.columns == list(ours[0].gates) == ["TextVQA", "ImageNet"] and np.ptp(gates[:, 0]) > 0.01
    alone = [model.answer([text], [image], 6)[0] for text, image in asked[:2]]  # no padding
    assert alone == [answer.answer for answer in ours[:2]]
    cropped = [answer.answer for answer in predictor(questions, 0, max_new_tokens=6, image_mode="crop")]
    assert model.answer(*map(list, zip(*asked)), max_new_tokens=6, image_mode="crop") == cropped
    paths = [first, second, third, *odd_pictures(tmp_path)]
    for filter, mode in ((3, "crop"), (3, "pad"), (2, "pad")):  # bicubic, bilinear
        assert filter == 2 or model.fields["image"]["resample"] == predictor.images.resample == filter
        model.fields["image"]["resample"] = filter
        loader = ImageLoader(dataclasses.replace(predictor.images, resample=filter), mode)
        pixels = [loader(path).transpose(2, 0, 1) for path in paths]
        np.testing.assert_allclose(model.prompts(["?"] * len(paths), paths, mode)["pixel_values"], pixels, atol=1e-5, rtol=0)
    assert len(loader.cut) == 2
    with pytest.raises(ValueError, match="image_mode='fit': choose 'pad' or 'crop'"):
        model.prompts(["?"], [first], "fit")
    made = model.generate(**batch, max_new_tokens=3, num_beams=2)
    assert made.shape[0] == len(asked) and model.gates.shape == (2 * len(asked), 2)
    with pytest.raises(RuntimeError, match="no gates for these prompts"):
        model.llava(input_ids=batch["input_ids"][1:2])


@pytest.mark.parametrize("fields", [{"fuse": "factor", "proj_variant": "code", "routing_tokens": "text_prompt", "temperature": "0.5"},
                                    {"routing_tokens": "multimodal_prompt"}], ids=["factor", "multimodal"])
def test_other_ways_to_route(world, tmp_path, fields):
    said = exported(export_dynamic, world.run("proglora_dynamic", **fields), tmp_path / "out", verify=True)
    assert "reloaded in torch: the same" in said and "logits differ by" in said
    how = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert how["routing"]["tokens"] == fields["routing_tokens"] and how["fuse"] == fields.get("fuse", "delta")


def test_the_light_variant_with_its_gates(world, tmp_path):
    """Its shared bottom layers lie in every block, and the gates sum to 1."""
    said = exported(export_dynamic, world.run("proglora_light"), tmp_path / "out", verify=True)
    assert "reloaded in torch: the same" in said and "proglora_light, stage 01_imagenet: 2 blocks" in said


@pytest.mark.parametrize("fields", [{}, {"weights": "cosine", "use_scale": False}], ids=["softmax", "cosines"])
def test_mocl_with_its_gates(world, tmp_path, fields):
    workdir = world.run("mocl", **fields)
    said = exported(export_dynamic, workdir, tmp_path / "out", verify=True)
    assert "reloaded in torch: the same" in said and "mocl, stage 01_imagenet: 2 blocks of rank 2 and their gates" in said
    model = load(tmp_path / "out", world)
    model.answer([f"Is it red?{WORD}"], None, 2)
    trained = open_trained(workdir)
    keys = np.stack([trained.state.params["keys"][0], trained.state.params["key"]])
    np.testing.assert_array_equal(model.router.keys.numpy(), keys)
    assert model.gates.sum().item() == pytest.approx(1.0) or fields  # cosines are no shares
    block = json.loads((tmp_path / "out" / "block_01" / "adapter_config.json").read_text())
    assert block["lora_alpha"] / block["r"] == trained.method.scale == (1.0 if fields else 2.0)


def test_mocl_whose_prompts_gate_each_other_is_refused(world, tmp_path):
    workdir = world.run("mocl", batch_mean=True)
    with pytest.raises(UserError, match="mocl with config.method.batch_mean=True gates a prompt by the rows beside it as well; what"):
        export_dynamic(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_first_stage_and_each_block_are_adapters_of_peft(world, tmp_path):
    workdir = world.run("proglora_dynamic")
    exported(export_dynamic, workdir, tmp_path / "first", stage="0")
    assert json.loads((tmp_path / "first" / "routing.json").read_text())["blocks"] == [{"folder": "block_00", "name": "TextVQA"}]
    exported(export_dynamic, workdir, tmp_path / "out")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(world.model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "block_00")
    linear = adapted.get_submodule("base_model.model.model.language_model.layers.1.mlp.up_proj")
    trained = open_trained(workdir)
    block = jax.tree.map(np.asarray, trained.method.block(trained.state, 0))["up_proj"]
    np.testing.assert_array_equal(linear.lora_A["default"].weight.detach(), block["a"][1].T)
    np.testing.assert_array_equal(linear.lora_B["default"].weight.detach(), block["b"][1].T)
    assert linear.scaling["default"] == trained.method.scale
    assert not (tmp_path / "out" / "block_00" / "gated_llava.py").exists() and not list((tmp_path / "out").rglob("__pycache__"))


def test_a_shared_block_counts_once_whatever_the_prompt(world, tmp_path, monkeypatch):
    workdir = world.run("proglora_dynamic")
    exported(export_dynamic, workdir, tmp_path / "plain")
    own = ProgLoRADynamic.routing
    share = lambda self, state: dataclasses.replace(own(self, state), shared=Block(self.block(state, 0)))  # noqa: E731
    monkeypatch.setattr(ProgLoRADynamic, "routing", share)
    exported(export_dynamic, workdir, tmp_path / "shared")
    plain, shared = load(tmp_path / "plain", world), load(tmp_path / "shared", world)
    batch = plain.prompts(["What?", f"Is it red?{WORD}"])
    with torch.no_grad():
        logits = shared(**batch).logits
        assert shared.gates.shape == (2, 2)
        plain.router.register_forward_hook(lambda module, args, gates: gates + torch.tensor([1.0, 0.0]))
        np.testing.assert_allclose(logits, plain(**batch).logits, atol=1e-5)
        plain.router._forward_hooks.clear()
        assert (logits - plain(**batch).logits).abs().max() > 1e-3


def test_the_router_is_what_numpy_says(world, tmp_path, rng):
    """Mean-pooled features, cosine, and scores that are no softmax, which a method may ask for."""
    keys = rng.standard_normal((3, 16)).astype("f4")
    routing = Routing(keys, temperature=0.125, pool="mean", score="cosine", weights="scores")
    router = load_module(export_gates.module_file()).ROUTERS[routing.kind](routing.settings(), {"keys": torch.from_numpy(keys)})
    x, mask = rng.standard_normal((2, 5, 16)).astype("f4"), np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
    found = router(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
    z = x[0][mask[0]].mean(0)
    expected = [8 * z @ key / np.linalg.norm(z) / np.linalg.norm(key) for key in keys]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[1], 0)
    with pytest.raises(ValueError, match="Routing.pool='median': must be one of 'max', 'mean'"):
        Routing(keys, pool="median")
    with pytest.raises(ValueError, match="a query projector belongs to"):
        Routing(keys, query="paper")


@pytest.mark.parametrize(("fields", "reason"), [
    ({"routing_scope": "per_layer"}, "config.method.routing_scope='per_layer' has not one set of gates per prompt"),
    ({"routing_decode": "per_token"}, "config.method.routing_decode='per_token' has not one set"),
    ({"routing_layer": 1}, "config.method.routing_layer=1 has not one set of gates .* from its input embeddings"),
    ({"split_max_quirk": True}, "config.method.split_max_quirk=True"),
    ({"routing_tokens": "released_code"}, "routing_tokens='released_code' routes a prompt by the rows beside it as well"),
])  # fmt: skip
def test_routing_that_the_module_cannot_express_is_refused(fields, reason):
    method = ProgLoRADynamic(rank=2, **fields)
    with pytest.raises(ValueError, match=reason):
        method.routing(None)


def test_what_is_refused_leaves_nothing(world, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="01_imagenet: lora has no gates that depend on the input; use --kind adapter"):
        exported(export_dynamic, world.run("lora"), tmp_path / "out")
    with pytest.raises(UserError, match="proglora_static has no gates that depend on the input"):
        exported(export_dynamic, world.run("proglora_static"), tmp_path / "out")
    fields = export_gates._fields
    monkeypatch.setattr(export_gates, "_fields", lambda *arguments: fields(*arguments) | {"scale": 2.2})
    with pytest.raises(UserError, match="differs from our model in its logits, by .* it was not kept"):
        exported(export_dynamic, world.run("proglora_dynamic"), tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


def test_every_difference_has_its_sentence(rng, tmp_path):
    rows = range(len(torch_check_gates.ASKED))
    ours = {
        "ids": [np.arange(4) for _ in rows], "gates": [np.array([0.25, 0.75], "f4") for _ in rows],
        "logits": [rng.standard_normal((4, 9)).astype("f4") for _ in rows], "answers": [np.array([5, 6]) for _ in rows],
    }  # fmt: skip
    scores = [np.eye(9)[[token] * len(rows)] for token in (5, 6, 2)]
    theirs = ours | {"scores": scores, "end": 2}
    verdict = lambda **changes: torch_check_gates._verdict(tmp_path, ours, theirs | changes, 1e-4)  # noqa: E731
    assert f"the same {2 * len(rows)} tokens for {len(rows)} questions; gates differ by 0 at most" in verdict()
    changed = lambda name, value: [*theirs[name][:-1], value]  # noqa: E731
    for name, value, what in (("ids", np.arange(5), "the ids of a prompt"),
                              ("gates", np.array([0.2501, 0.7499], "f4"), "its gates, by 0.0001"),
                              ("logits", ours["logits"][-1] + 1e-3, "its logits, by 0.001"),
                              ("answers", np.array([5, 7]), r"what it generates \(\[5, 7\], ours \[5, 6\]\)")):
        with pytest.raises(UserError, match=f"differs from our model in {what}"):
            verdict(**{name: changed(name, value)})
    # two candidates that are as good as equal: what follows may differ
    tied = [scores[0], scores[1] + np.eye(9)[[7] * len(rows)], scores[2]]
    assert "the same" in verdict(answers=changed("answers", np.array([5, 7, 8])), scores=tied)
