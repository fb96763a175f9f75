"""What leaves a run for Hugging Face gives the logits of our model in torch, or is refused with the reason; nothing half is left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import tiny_run
import torch
import transformers
from safetensors.numpy import load_file
from test_original_layout import take_apart

from proglora_jax import tools
from proglora_jax.checkpoints import merge, peft_export
from proglora_jax.checkpoints.hf_import import load_source
from proglora_jax.checkpoints.integrity import atomic_write_json
from proglora_jax.checkpoints.sources import find_source
from proglora_jax.checkpoints.stage import save_checkpoint
from proglora_jax.continual import export, results, torch_check
from proglora_jax.continual.export import export_adapter, export_merged
from proglora_jax.continual.stages import FINAL, plan_stages
from proglora_jax.continual.trained import open_trained
from proglora_jax.core import tree as trees
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import TaskInfo
from proglora_jax.methods.registry import method_class
from proglora_jax.models.llava import abstract_llava
from proglora_jax.training.settings import build

HYPER = {"rank": 2, "alpha": 4.0}
DRAWN = ("block", "shared", "branches", "mm_projector", "router", "row", "row_bias", "text_key", "image_key", "new_keys",
         "projector_block", "projector_shared")


class World:
    """A tiny model and, per method, the workdir of a run over two tasks whose blocks are drawn at random, large enough to matter."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, tiny_run.save_model(folder / "model")
        self.source = find_source(self.model)

    def run(self, name: str, protocol: str = "sequential", **fields) -> Path:
        """The workdir of a method's run, made once."""
        workdir = self.folder / "_".join([name, protocol, *map(str, fields.values())])
        if not workdir.exists():
            write_run(workdir, self.model, self.source, name, protocol, fields)
        return workdir


def write_run(workdir: Path, model: Path, source, name: str, protocol: str, fields: dict) -> None:
    """What a run leaves in its workdir, by the method's own hooks but without training: parameters are drawn, and answers of probes."""
    rng = np.random.default_rng(0)
    extra = {"recall_per_task": 0, "proj_width": 4} if name in ("proglora_dynamic", "proglora_light") else {}
    extra |= {"shared_layers": 1} if name == "proglora_light" else {}
    method = build(method_class(name), HYPER | extra | fields, "config.method")
    tasks, total = ("TextVQA", "ImageNet"), 2 if protocol == "sequential" else 1
    config = tiny_run.config(model, workdir, name if name != "zero_shot" else "lora", run__protocol=protocol)
    atomic_write_json(workdir / "config.json", {"config": config, "hash": "x"})
    targets = abstract_llava(source.config).targets()
    session = types.SimpleNamespace(
        method=method, targets=targets, base=source.fingerprint(), protocol=source.protocol, tasks=tasks, workdir=workdir
    )
    projector = jax.tree.map(np.asarray, load_source(source, "float32").projector_params())
    initial, before = method.init(targets, projector, total, 0), None
    for stage in plan_stages(tasks, method, protocol):
        state = initial if stage.fresh or before is None else before[0]
        info = TaskInfo(stage.index, stage.name, total, 10, np.full(stage.index, 0.37, np.float32), 0)
        probe = probed(source.config, rng)
        state = method.start_task(state, info, probe)
        draw = lambda leaf: leaf + 0.05 * rng.standard_normal(np.shape(leaf)).astype("f4")  # noqa: B023
        parts = () if name == "zero_shot" else DRAWN
        drawn = {part: jax.tree.map(draw, state.params[part]) for part in parts if part in state.params}
        state = dataclasses.replace(state, params=state.params | drawn)
        if "errors" in (running := state.carry.get("running", {})):  # of descriptors
            state = dataclasses.replace(state, carry={"running": {"errors": draw(running["errors"]), "count": len(running["errors"])}})
        for phase in method.phases(info):
            state = method.after_phase(state, info, phase, probe)
        tree = jax.tree.map(np.asarray, method.to_disk(state)) | {"embedding": {f"task_{stage.index:02d}": {}}}
        digest, previous = trees.digest(tree), before[1] if before and not stage.fresh else ""
        meta = results.stage_meta(session, stage, digest, previous, {}, {}, info.similarity)
        save_checkpoint(stage.folder(workdir) / FINAL, {"adapter": tree}, {"meta": meta})
        before = state, digest


def probed(config, rng: np.random.Generator):
    """What methods ask of training samples, drawn at random: the layers' features, queries of text and image."""
    width, vision = config.text_config.hidden_size, config.vision_config.hidden_size
    draw = lambda rows, *shape: rng.standard_normal((len(rows), *shape)).astype("f4")
    return lambda state, rows: {
        "xbar": draw(rows, 1, width), "text": draw(rows, width), "image": draw(rows, vision), "shown": draw(rows) > 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """The model and its runs, shared by all tests of the file."""
    torch.set_num_threads(1)  # for models this small, a second thread only waits
    return World(tmp_path_factory.mktemp("world"))


def difference(line: str) -> float:
    return float(re.search(r"logits differ by ([-+.e\d]+) at most", line)[1])


def their_logits(model, source) -> np.ndarray:
    return torch_check._their_logits(torch, model, torch_check._inputs(source))


def base_model(world):
    return transformers.LlavaForConditionalGeneration.from_pretrained(world.model, dtype=torch.float32).eval()


def exported(how, workdir, out, verify: bool = False, **options) -> str:
    """What an export says."""
    lines: list[str] = []
    how(workdir, out, log=lines.append, verify=verify, **options)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- adapters


def test_lora_as_an_adapter(world, tmp_path):
    said = exported(export_adapter, world.run("lora"), tmp_path / "out", verify=True)
    assert difference(said) < 1e-4 and "its adapter" not in said and "block 0 as a PEFT adapter of rank 2, alpha 4" in said
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"], fields["base_model_name_or_path"]) == (2, 4, 0.05, str(world.model))
    model = peft.PeftModel.from_pretrained(base_model(world), tmp_path / "out").eval()
    source = world.source
    assert np.abs(their_logits(model, source) - their_logits(base_model(world), source)).max() > 0.05  # the adapter matters
    # the very names and shapes that peft itself writes
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs"))
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert sum("multi_modal_projector" in name for name in ours) == 4
    record = json.loads((tmp_path / "out" / "proglora_export.json").read_text())
    assert record["method"] == "lora" and record["rank"] == 2 and record["trained_on"] == "ImageNet" and record["block"] == 0


@pytest.mark.parametrize(("task", "rank"), [("TextVQA", 2), ("ImageNet", 4)])
def test_a_fused_block_of_proglora_static(world, tmp_path, task, rank):
    said = exported(export_adapter, world.run("proglora_static"), tmp_path / "out", task=task, verify=True)
    assert difference(said) < 1e-4 and f"the fused block of {task}" in said
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["r"] == fields["lora_alpha"] == rank  # empty slots and gates of 0 are left out; gates and scale are in B


@pytest.mark.parametrize("name", ["lwf", "ewc"])
def test_what_lora_trained_under_another_loss_is_an_adapter_like_any(world, tmp_path, name):
    said = exported(export_adapter, world.run(name), tmp_path / "out", verify=True)
    assert difference(said) < 1e-4 and "block 0 as a PEFT adapter of rank 2, alpha 4" in said


def test_olora_is_the_plain_sum_of_its_blocks(world, tmp_path):
    said = exported(export_adapter, world.run("olora"), tmp_path / "out", verify=True)
    assert difference(said) < 1e-4 and "its adapter as a PEFT adapter of rank 4, alpha 4" in said
    merged = exported(export_merged, world.run("olora"), tmp_path / "merged", verify=True)
    assert difference(merged) < 1e-4


def test_the_two_fused_blocks_differ_and_the_last_is_the_default(world, tmp_path):
    found = {}
    for name, task in {"first": "TextVQA", "second": "imagenet", "default": None}.items():
        exported(export_adapter, world.run("proglora_static"), tmp_path / name, task=task)
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    at = "base_model.model.model.language_model.layers.1.self_attn.v_proj.lora_"
    deltas = {name: tensors[f"{at}B.weight"] @ tensors[f"{at}A.weight"] for name, tensors in found.items()}
    assert np.abs(deltas["first"] - deltas["second"]).max() > 0.01
    np.testing.assert_array_equal(deltas["second"], deltas["default"])


def test_a_fused_block_of_an_earlier_stage(world, tmp_path):
    said = exported(export_adapter, world.run("proglora_static"), tmp_path / "out", stage="textvqa", verify=True)
    assert difference(said) < 1e-4 and "stage 00_textvqa: the fused block of TextVQA" in said


@pytest.mark.parametrize(("method", "block", "verify"), [("proglora_static", 0, True), ("proglora_static", 1, False),
                                                         ("proglora_dynamic", 0, False), ("proglora_dynamic", 1, True),
                                                         ("proglora_light", 0, True)])
def test_one_block_as_it_was_trained(world, tmp_path, method, block, verify):
    said = exported(export_adapter, world.run(method), tmp_path / "out", block=block, verify=verify)
    assert f"block {block} as a PEFT adapter of rank 2, alpha 4" in said and (not verify or difference(said) < 1e-4)
    stage = open_trained(world.run(method), str(block))  # the stage that trained it
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a = np.asarray(stage.method.block(stage.state, block)["v_proj"]["a"])
    np.testing.assert_array_equal(ours["base_model.model.model.language_model.layers.1.self_attn.v_proj.lora_A.weight"], a[1].T)


def test_factors_that_are_fused_first(world, tmp_path):
    said = exported(export_adapter, world.run("proglora_static", fuse="factor"), tmp_path / "out", verify=True)
    assert difference(said) < 1e-4 and "rank 2, alpha 2" in said


def test_an_isolated_stage_stands_alone(world, tmp_path):
    workdir = world.run("lora", "isolated")
    said = exported(export_adapter, workdir, tmp_path / "out", stage="1", verify=True)
    assert difference(said) < 1e-4 and open_trained(workdir, "1").tasks() == ("ImageNet",)


# ------------------------------------------------------------------------------------------------------------- merged


def test_a_merged_model_is_the_adapter_model(world, tmp_path):
    said = exported(export_merged, world.run("proglora_static"), tmp_path / "merged", verify=True)
    assert difference(said) < 1e-4 and "merged into" in said and "signal lost" in said
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    source = find_source(tmp_path / "merged")
    assert source.protocol == "llava_custom+proglora_static"
    exported(export_adapter, world.run("proglora_static"), tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(base_model(world), tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(model.eval(), source), their_logits(adapted, source), atol=1e-4, rtol=0)
    # a whole folder: a run takes it, and servers find the tokenizer and the image settings
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "processor_config.json"} <= names


def test_the_lost_signal_is_what_numpy_says(world, tmp_path):
    done = export_merged(world.run("lora"), tmp_path / "merged", dtype="bfloat16", verify=False, log=lambda line: None)
    trained = open_trained(world.run("lora"))
    folded = trained.method.fold(trained.state, 0)
    base, merged = load_file(world.model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    error = signal = weight = same = moved = 0.0
    for layer in range(2):
        name = f"language_model.model.layers.{layer}.mlp.up_proj.weight"
        delta = (np.asarray(folded["up_proj"]["a"][layer], np.float64) @ np.asarray(folded["up_proj"]["b"][layer], np.float64)).T
        whole = base[name].astype(np.float64)
        assert merged[name].dtype.name == "bfloat16"
        error += np.sum((merged[name].astype(np.float64) - whole - delta) ** 2)
        signal, weight = signal + np.sum(delta**2), weight + np.sum(whole**2)
        same, moved = same + np.sum(merged[name] == base[name].astype(merged[name].dtype)), moved + delta.size
    found = done.signals["up_proj"]
    assert found.lost == pytest.approx((error / signal) ** 0.5, rel=1e-4) and 0 < found.lost < 1
    assert found.relative == pytest.approx((signal / weight) ** 0.5, rel=1e-4)
    assert found.unchanged_share == pytest.approx(same / moved, abs=1e-6)
    assert f"{found.lost:.3%}" in done.report() and done.report().splitlines()[-1].startswith("all")


def test_small_signals_get_lost_as_the_roofline_notes_say():
    """Weights of deviation 1 on the bf16 grid and a delta of 0.3 %: about half of the signal is gone, and half of the elements."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    weights = rng.standard_normal((1024, 1024)).astype(dtype)
    a, b = rng.standard_normal((1, 1024, 16)).astype("f4"), rng.standard_normal((1, 16, 1024)).astype("f4")
    b *= 0.003 * np.linalg.norm(weights.astype("f4")) / np.linalg.norm(a[0] @ b[0])
    done = merge.Merge({"q_proj": {"a": a, "b": b}}, {})
    done("language_model.model.layers.0.self_attn.q_proj.weight", weights, dtype)
    signal = done.signals["q_proj"]
    assert signal.relative == pytest.approx(0.003, rel=1e-3)
    assert signal.lost == pytest.approx(0.48, abs=0.04) and signal.unchanged_share == pytest.approx(0.48, abs=0.04)


def test_zero_shot_is_its_backbone(world, tmp_path):
    workdir = world.run("zero_shot")
    with pytest.raises(UserError, match="zero_shot has no adapter; its backbone is the model"):
        export_adapter(workdir, tmp_path / "out")
    export_merged(workdir, tmp_path / "out", verify=False, log=lambda line: None)
    ours, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(world.model / "model.safetensors")
    for name in base:
        np.testing.assert_array_equal(ours[name], base[name])


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["proglora_dynamic", "proglora_light", "mocl"])
def test_gates_that_depend_on_the_input_are_refused(world, tmp_path, name):
    reason = rf"01_imagenet: {name} cannot be folded into one adapter: its gates are computed from each sample's .*--block"
    for how in (export_adapter, export_merged):
        with pytest.raises(UserError, match=reason):
            how(world.run(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mistakes_give_one_sentence(world, tmp_path, capsys):
    workdir = world.run("lora")
    cases = {
        "has no trained stage 7; it has 00_textvqa, 01_imagenet": ["--stage", "7"],
        "lora does not know tasks, its adapter serves all of them": ["--task", "TextVQA"],
        "lora has no block 3; it has 1, counted from 0": ["--block", "3"],
        "--dtype: adapters are written in float32": ["--dtype", "bfloat16"],
        "--block: a block alone is an adapter": ["--kind", "merged", "--block", "0"],
        "is not the backbone|no such folder": ["--kind", "merged", "--base", str(tmp_path / "nowhere")],
    }
    for sentence, arguments in cases.items():
        assert tools.main(["convert", "to-hf", str(workdir), "--out", str(tmp_path / "out"), *arguments]) == 1
        assert re.search(sentence, capsys.readouterr().err), sentence
    with pytest.raises(UserError, match="01_imagenet: has not learned GQA; it knows TextVQA, ImageNet"):
        export_adapter(world.run("proglora_static"), tmp_path / "out", task="GQA")
    with pytest.raises(UserError, match="give one of them"):
        export_adapter(world.run("proglora_static"), tmp_path / "out", task="TextVQA", block=0)
    with pytest.raises(UserError, match="nowhere: no such folder; give the workdir of a run"):
        export_adapter(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no trained stage"):
        export_adapter(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="full: is not empty"):
        export_adapter(workdir, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_another_backbone_is_refused(world, tmp_path, monkeypatch):
    trained = open_trained(world.run("lora"))
    tiny = tmp_path / "model"
    tiny_run.save_model(tiny)
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(content)
    monkeypatch.setitem(trained.model, "path", str(tiny))
    with pytest.raises(UserError, match="model: is not the backbone that .*01_imagenet was trained on"):
        trained.backbone()
    assert "are not those of the run; right only if it is the same model, converted" in trained.backbone(str(tiny))[1]
    assert trained.backbone(str(world.model))[1] == ""


def test_without_torch_an_export_says_that_it_was_not_verified(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_check.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    reason = "comparing with torch needs torch and peft, but peft is not installed; pip install peft and export again, or say --no-verify"
    with pytest.raises(UserError, match=reason):
        exported(export_adapter, world.run("lora"), tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())  # nothing that was asked to be verified is left unverified
    command = ["convert", "to-hf", str(world.run("lora")), "--out"]
    assert tools.main([*command, str(tmp_path / "by_default")]) == 0
    assert f"NOT verified: {reason}" in capsys.readouterr().out and (tmp_path / "by_default" / "adapter_config.json").exists()
    assert tools.main([*command, str(tmp_path / "asked"), "--no-verify"]) == 0
    assert "not verified, as asked" in capsys.readouterr().out


def test_no_comparison_begins_without_the_memory_or_the_backbone_for_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_check, "_free_memory", lambda: 1000)
    said = exported(export_adapter, world.run("lora"), tmp_path / "little", verify=None)
    assert re.search(r"NOT verified: comparing in f32 needs about 0 GB of memory, 0 GB are free; export again where there is more", said)
    with pytest.raises(UserError, match="comparing in f32 needs"):
        exported(export_merged, world.run("lora"), tmp_path / "merged", verify=True)
    config = json.loads((world.run("lora") / "config.json").read_text())
    config["config"]["model"]["path"] = str(tmp_path / "moved")
    moved = shutil.copytree(world.run("lora"), tmp_path / "run")
    (moved / "config.json").write_text(json.dumps(config))
    said = exported(export_adapter, moved, tmp_path / "out", verify=None)
    assert "NOT verified: config.model.path=" in said and "moved: no such folder" in said and (tmp_path / "out").is_dir()


def test_a_wrong_export_is_noticed_and_not_kept(world, tmp_path, monkeypatch):
    save = peft_export.save_adapter
    off = lambda folder, adapter, alpha, *rest, **more: save(folder, adapter, alpha * 1.1, *rest, **more)
    monkeypatch.setattr(export, "save_adapter", off)
    with pytest.raises(UserError, match="differs from our model by .* it was not kept"):
        export_adapter(world.run("lora"), tmp_path / "out", verify=True, log=lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("wrong", ["sign of a linear", "layer left out", "layer left out of the file", ""])
def test_a_wrong_merge_is_noticed_in_any_format(world, tmp_path, monkeypatch, wrong, dtype):
    """Half precision hides much in the logits: before the cast they must agree as in f32, and the folder must hold that, rounded."""
    call, write, trim = merge.Merge.__call__, export.write_folder, export.trim_ranks
    last = "language_model.model.layers.1."

    def without(change):
        return lambda name, array, kind: array.astype(kind) if name.startswith(last) else change(name, array, kind)

    if wrong == "sign of a linear":
        flip = lambda leaf: leaf | {"b": -leaf["b"]}  # noqa: E731
        monkeypatch.setattr(export, "trim_ranks", lambda adapter, least: (
            lambda found: found | {"v_proj": flip(found["v_proj"])})(trim(adapter, least)))
    elif wrong == "layer left out":
        monkeypatch.setattr(merge.Merge, "__call__", lambda self, *rest: without(lambda *inner: call(self, *inner))(*rest))
    elif wrong:
        monkeypatch.setattr(export, "write_folder", lambda *rest, change, **more: write(*rest, change=without(change), **more))
    how = lambda: exported(export_merged, world.run("lora"), tmp_path / "out", dtype=dtype, verify=True)  # noqa: E731
    if wrong:
        with pytest.raises(UserError, match="out: .*it was not kept"):
            how()
        assert not list(tmp_path.iterdir())
    else:
        said = how()
        assert difference(said) < 1e-4 and ("after it" in said) == (dtype is not None)


def test_the_tolerance_is_absolute_and_can_be_raised(world, tmp_path, monkeypatch, capsys):
    theirs, ours = torch_check._their_logits, torch_check._our_logits
    # logits of 30, as a 7B model has them, that are 5e-4 apart: within 1e-4 of the largest, and yet not the same
    monkeypatch.setattr(torch_check, "_our_logits", lambda *rest: 30 + 0 * ours(*rest))
    monkeypatch.setattr(torch_check, "_their_logits", lambda *rest: 30.0005 + 0 * theirs(*rest))
    command = ["convert", "to-hf", str(world.run("lora")), "--out", str(tmp_path / "out")]
    assert tools.main(command) == 1
    said = capsys.readouterr().err
    assert "differs from our model by 0.0005 in its logits (0.0001 is allowed, and the largest logit is 30: f32 rounds to" in said
    assert "a large model may need a larger --tolerance" in said and not list(tmp_path.iterdir())
    assert tools.main([*command, "--tolerance", "0"]) == 1
    assert "--tolerance 0: must be above 0" in capsys.readouterr().err
    assert tools.main([*command, "--tolerance", "1e-3"]) == 0
    assert "logits differ by 0.0005 at most, 0.001 is allowed (the largest is 30)" in capsys.readouterr().out


def test_from_the_original_layout(world, tmp_path, capsys):
    """A backbone in three places: the merged folder is whole; peft needs the converted one."""
    places = take_apart(world.model, tmp_path / "parts")
    path, vision, projector = (places[f"model__{name}"] for name in ("path", "vision_path", "projector_path"))
    workdir = tmp_path / "run"
    write_run(workdir, Path(path), find_source(path, vision, projector), "lora", "sequential", {})
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["model"] |= {"vision_path": vision, "projector_path": projector}
    (workdir / "config.json").write_text(json.dumps(config))
    said = exported(export_merged, workdir, tmp_path / "merged", verify=True)
    assert difference(said) < 1e-4 and find_source(tmp_path / "merged").protocol == "vicuna_projector_custom+lora"
    reason = ("vicuna: transformers does not read the layout of original LLaVA; convert it first .tools convert from-hf, with the "
              "--vision and --projector that belong to it. and name the new folder with --base")
    for verify in (True, None, False):  # PEFT would find no layer to put it on
        with pytest.raises(UserError, match=reason):
            export_adapter(workdir, tmp_path / "adapter", verify=verify)
    with pytest.raises(UserError, match=reason):
        export_adapter(workdir, tmp_path / "adapter", base=path, vision=vision, projector=projector)
    assert not (tmp_path / "adapter").exists()
    assert tools.main(["convert", "from-hf", path, "--vision", vision, "--projector", projector, "--out", str(tmp_path / "clean")]) == 0
    arguments = ["--out", str(tmp_path / "adapter"), "--base", str(tmp_path / "clean")]
    assert tools.main(["convert", "to-hf", str(workdir), *arguments]) == 0
    said = capsys.readouterr().out
    assert "warning: the files in" in said and difference(said) < 1e-4
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "clean")

    # all three moved: the same backbone where they are now
    (tmp_path / "parts").rename(tmp_path / "moved")
    path, vision, projector = (place.replace("parts", "moved") for place in (path, vision, projector))
    with pytest.raises(UserError, match="parts/vicuna: no such folder"):
        open_trained(workdir).backbone()
    assert open_trained(workdir).backbone(path, vision, projector)[1] == ""
    places = ["--base", path, "--vision", vision]
    for command in (["convert", "to-hf", str(workdir), "--kind", "merged", "--out", str(tmp_path / "again")],
                    ["predict", str(workdir), "--question", "a"]):
        assert tools.main([*command, *places]) == 1
        assert "config.model.projector_path in a run, --projector in the tools" in capsys.readouterr().err
    command = ["convert", "to-hf", str(workdir), "--kind", "merged", "--no-verify", "--out", str(tmp_path / "again")]
    assert tools.main([*command, *places, "--projector", projector]) == 0 and "warning" not in capsys.readouterr().out
