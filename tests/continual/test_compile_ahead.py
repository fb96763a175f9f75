"""Programs compiled for TPUs and GPUs that are not there: at tiny size with the real compilers, and what is said where they do not fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import types

import jax
import pytest
import tiny_llava
import tiny_run

from proglora_jax import tools
from proglora_jax.continual import compile_ahead
from proglora_jax.continual.compile_ahead import Order
from proglora_jax.continual.row_split import late_rows
from proglora_jax.core.mesh import make_mesh
from proglora_jax.data.errors import UserError
from proglora_jax.models import presets
from proglora_jax.training import attention_choice, programs
from proglora_jax.training.settings import EvalSettings

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed: pip install -e '.[aot]'")
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    reason="JAX's CUDA plugin, the compiler for GPUs, is not installed: pip install -e '.[cuda13]'")
WIDE = dataclasses.replace(tiny_llava.CONFIG.text_config, hidden_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=128)
TINY = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.method.rank=2", "--config.method.dropout=0.0",
        "--config.data.buckets=((128,8),)", "--config.data.max_length=128", "--config.evaluate.prompt_lengths=(128,)",
        "--config.evaluate.max_new_tokens=4", "--config.train.micro_batches=1"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """The arguments of `tools compile` for the tiny LLaVA under the name of the 7B one."""
    monkeypatch.setitem(presets.PRESETS, "llava15_7b", lambda: tiny_llava.CONFIG)
    config = f"{tiny_run.CONFIGS / 'coin.py'}:method=lora,batches=mcitlib64"
    return ["compile", "--config", config, "--topology", "v5e:2x2", *TINY]


@needs_compiler
def test_the_programs_of_a_run_compile_for_a_slice(tiny, monkeypatch, tmp_path, capsys):
    """On a mesh that splits the rows, with heads as wide as the real models': the fused kernel is there, and only weights are gathered."""
    monkeypatch.setitem(presets.PRESETS, "llava15_7b", lambda: dataclasses.replace(tiny_llava.CONFIG, text_config=WIDE))
    path = tmp_path / "report.json"
    with jax.default_matmul_precision("default"):  # that of a run; these tests' own, the highest, is not for bfloat16 kernels
        assert tools.main([*tiny, "--json", str(path), "--hlo", str(tmp_path / "hlo")]) == 0
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    assert report["attention"] == "splash" and report["attention_reason"] == "fused kernel on TPU"
    train, answer, shared = report["programs"]
    for program in (train, answer, shared):
        compiled = (tmp_path / "hlo" / f"{program['program']}_128.txt").read_text()
        assert compiled.startswith("HloModule") and "splash" in compiled
    assert [shared[name] for name in ("program", "rows", "images", "positions")] == ["answer_shared", 32, 16, 128]
    assert "answer_shared: 32 rows, 16 images, 128 positions" in text
    assert 0 < shared["flops"] < 0.9 * answer["flops"] and shared["flops_per_new_token"] == answer["flops_per_new_token"]
    assert 0.9 < shared["flops_of_a_chip_to_its_share"] < 1.2, "no device reads what another does"
    assert (report["chips"], report["chip"], report["mesh"]) == (4, "TPU v5e", {"data": 1, "fsdp": 4, "model": 1})
    assert report["fits"] and not report["advice"] and f"{train['memory_total'] / 2**30:.2f} of 15.75 GiB a chip" in text
    held = report["backbone_bytes_per_chip"] + 3 * report["trainable_bytes"]
    assert 0 < held <= train["memory"]["arguments"] and train["flops"] > 0 and answer["flops_per_new_token"] > 0
    # the adapters' gradients and the projector's and no others are summed, all in float32; what is gathered are weights
    summed = sum(one["bytes"] * one["times"] for one in train["collectives"] if one["kind"] == "all-reduce")
    assert report["trainable_bytes"] <= summed <= report["trainable_bytes"] + 1024
    gathered = [one["bytes"] for one in train["collectives"] if one["kind"] == "all-gather"]
    assert gathered and max(gathered) <= 2 * 256 * 256, "weights in bfloat16 alone"


@needs_cuda
@pytest.mark.slow
def test_the_programs_of_a_run_compile_for_gpus(tiny, monkeypatch, tmp_path, capsys):
    """Two hosts of two GPUs, and a single one: cuDNN's attention is there, memory is that of a run, and weights are what is gathered."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(presets.PRESETS, "llava15_7b", lambda: dataclasses.replace(tiny_llava.CONFIG, text_config=WIDE))
    path = tmp_path / "report.json"
    with jax.default_matmul_precision("default"):
        assert tools.main([*tiny, "--topology", "h100:2x2", "--json", str(path), "--hlo", str(tmp_path / "hlo")]) == 0
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    assert (report["attention"], report["attention_reason"]) == ("cudnn", "fused kernel on GPU")
    train, answer, shared = report["programs"]
    for program in (train, answer, shared):
        assert "__cudnn$fmha" in (tmp_path / "hlo" / f"{program['program']}_128.txt").read_text()
    assert (report["chips"], report["chip"], report["hbm"]) == (4, "H100", int(0.94 * 84_942_979_072))
    assert report["fits"] and not report["advice"] and f"{train['memory_total'] / 2**30:.2f} of 74.36 GiB a chip" in text
    assert "no autotuning" in report["notes"][0] and report["notes"][0] in text
    assert any(re.fullmatch(r"jax-cuda\d+-plugin", name) for name in report["versions"]) and "libtpu" not in report["versions"]
    # the backbone's projector is no argument: the trained one stands in its place
    projector = 2 * 256 * (tiny_llava.CONFIG.vision_config.hidden_size + 1 + 256 + 1)
    held = report["backbone_bytes_per_chip"] - projector + 3 * report["trainable_bytes"]
    assert 0.98 * train["memory"]["arguments"] < held <= train["memory"]["arguments"]
    assert train["flops"] > 0 and answer["flops_per_new_token"] > 0
    summed = sum(one["bytes"] * one["times"] for one in train["collectives"] if one["kind"] == "all-reduce")
    assert report["trainable_bytes"] <= summed <= report["trainable_bytes"] + 1024
    gathered = sum(one["bytes"] * one["times"] for one in train["collectives"] if one["kind"] == "all-gather")
    assert 0 < gathered <= 2 * report["backbone_bytes"], "weights, once forward and once backward at most"

    alone = ["--topology", "a100-40gb", "--program", "train", "--config.mesh.fsdp=1"]
    with jax.default_matmul_precision("default"):
        assert tools.main([*tiny, *alone]) == 0
    text = capsys.readouterr().out
    assert "1 x A100 40GB (a100-40gb)" in text and "no collectives" in text and "attention cudnn" in text


@needs_cuda
def test_a_program_that_a_gpu_has_no_memory_for_does_not_fit(tiny, monkeypatch, capsys):
    """The compiler for GPUs refuses nothing: its plan is compared with what a run may take."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.00001")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    with jax.default_matmul_precision("default"):
        assert tools.main([*tiny, "--topology", "h100:4", "--program", "train"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"DOES NOT FIT into 0.00 GiB: it needs 0.\d\d GiB \(arguments 0", text) and "It does not fit:" in text


def test_without_the_compiler_for_gpus_it_says_what_to_install(tiny, monkeypatch, capsys):
    monkeypatch.setattr(compile_ahead.gpus, "_PACKAGES", {13: ("no-such-package-13",), 12: ("no-such-package-12",)})
    assert tools.main([*tiny, "--topology", "h100:4"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --topology h100:4: JAX compiles for GPUs through its CUDA plugin, which is not installed: pip install")


def test_the_verdict_for_gpus_is_that_of_the_plan_and_for_tpus_that_of_the_compiler():
    result = {"memory_total": 3 << 30, "memory": {"arguments": 1 << 30, "temporaries": 2 << 30}}
    assert compile_ahead._verdict(result, "h100:8", 3 << 30) == {"fits": True} == compile_ahead._verdict(result, "v5e:4x4", 1)
    error = "it needs 3.00 GiB (arguments 1.00, temporaries 2.00)"
    assert compile_ahead._verdict(result, "h100:8", (3 << 30) - 1) == {"fits": False, "error": error}


@needs_compiler
def test_a_program_that_does_not_fit_says_which_setting_would(monkeypatch, tmp_path, capsys):
    """The 13B model whole on every chip of a small slice; the compiler's refusal is played, the rest is real."""

    def refused(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.1G of 15.75G hbm.\nbuffers")

    trace = programs.trace_train_step
    refusing = lambda *arguments: types.SimpleNamespace(jaxpr=trace(*arguments).jaxpr, lower=refused)
    monkeypatch.setattr(programs, "trace_train_step", refusing)
    config = f"{tiny_run.CONFIGS / 'coin.py'}:backbone=llava15_13b,batches=mcitlib64"
    command = ["compile", "--config", config, "--topology", "v5e:4x4", "--program", "train", "--config.train.micro_batches=4"]
    assert tools.main([*command, "--json", str(tmp_path / "report.json")]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT into 15.75 GiB: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.1G of 15.75G hbm." in text
    assert "--config.mesh.fsdp=" in text.partition("It does not fit:")[2]
    assert json.loads((tmp_path / "report.json").read_text())["fits"] is False


@needs_compiler
@pytest.mark.parametrize("change, sentence", [
    (["--topology", "v9:2x2"], "--topology v9:2x2: .*names look like v5e:4x4"),
    (["--topology", "h900:8"], r"--topology h900:8: no such GPU is known, only a100-40gb, a100-80gb, h100, h100-pcie, h200$"),
    (["--topology", "h100:2x"], r"--topology h100:2x: write h100 for one GPU, h100:8 for eight of one host"),
    (["--positions", "704"], r"--positions 704: not in config.data.buckets, which has 128"),
    (["--config.mesh.fsdp=8"], "config.mesh=.*needs 8 devices, 4 are there"),
    (["--config.evaluate.batch_size=30"], "config.evaluate.batch_size=30 cannot be split over 4 devices: --config.evaluate.batch_size=28"),
    (["--program", "answer_shared", "--config.evaluate.share_prefix=off"], "--program answer_shared: config.evaluate.share_prefix='off'"),
    (["--config.train.micro_batches=32"], "micro-batches are split unevenly over 4 devices: --config.train.micro_batches="),
])
def test_what_cannot_be_compiled_is_one_sentence(tiny, change, sentence, capsys):
    assert tools.main([*tiny, *change]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(sentence, error), error


def test_without_the_compiler_it_says_what_to_install(tiny, monkeypatch):
    def missing(*_):
        raise ValueError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(compile_ahead.meshes, "described_devices", missing)
    config = tiny_run.config_module("coin").get_config("batches=mcitlib64").to_dict()
    with pytest.raises(UserError, match=r"--topology v5e:2x2: JAX TPU support not installed.*pip install 'proglora-jax\[aot\]'"):
        compile_ahead.compile_ahead(config, Order("v5e:2x2"))


def test_the_committed_slices_are_of_today(load_benchmark):
    """Commands, room for answers, and gradients that are summed in float32 wherever the backbone is whole on each of several chips."""
    benchmark = load_benchmark("compile_ahead")
    for name in (name for slices in benchmark.SLICES.values() for name in slices):
        report = json.loads(benchmark.path_of(name).read_text())
        by_name = {program["program"]: program for program in report["programs"]}
        assert report["fits"] and report["command"] == shlex.join(benchmark.command(name)), name
        room, rows = by_name["answer"]["new_tokens"], by_name["answer"]["rows"]
        assert room == EvalSettings().first_new_tokens < by_name["answer_late"]["new_tokens"] == 1024, name
        assert by_name["answer_late"]["rows"] == late_rows(rows, report["mesh"]["data"] * report["mesh"]["fsdp"])
        summed = sum(one["bytes"] * one["times"] for one in by_name["train"]["collectives"] if one["kind"] == "all-reduce")
        if 1 < report["chips"] == report["mesh"]["data"]:
            assert summed >= report["trainable_bytes"], name
