"""What tools doctor says of a config: the plan, hours, memory, advice that holds when it is followed, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_run

from proglora_jax import tools
from proglora_jax.continual.doctor import Machine, diagnose, model_sizes
from proglora_jax.continual.doctor_memory import MemoryPlan, most_rows
from proglora_jax.continual.doctor_plan import PlannedPhase, planned_stages, steps_of
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import TASKS
from proglora_jax.methods.base import Replay
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training import shapes
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import ModelSettings, from_config

ROOT = Path(__file__).parents[2]
COIN = str(ROOT / "configs" / "coin.py")
ONCE = ["--config.evaluate.also_image_mode="]  # no task is asked a second time with its images padded
TINY = LlavaConfig(
    text_config=LlamaConfig(64, 16, 24, num_hidden_layers=2, num_attention_heads=2),
    vision_config=ClipConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2),
    image_token_id=63,
)  # fmt: skip


def planned(argument: str = "", *overrides: str):
    """(settings, stages) of configs/coin.py on a tiny model, every task asked once."""
    values = load_config(f"{COIN}:{argument}", [*ONCE, *overrides])
    values["data"]["root"] = "somewhere"
    settings = from_config(values)
    llava = shapes.abstract_backbone(TINY, settings.model)
    return settings, planned_stages(settings, llava, meshes.abstract_mesh({"data": 1}, 1))


def advice(text: str) -> list[str]:
    """The lines of the last section."""
    return [line.removeprefix("  - ") for line in text.splitlines() if line.startswith("  - ")]


def number(text: str, label: str) -> float:
    """The first number of the line that begins with a label."""
    return float(re.search(rf"^{label} +([\d.]+)", text, re.MULTILINE)[1])


# -------------------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_of_the_papers_run():
    _, stages = planned("method=proglora_static")
    assert [stage.name for stage in stages] == list(TASKS)
    assert [(stage.train_rows, stage.batch) for stage in stages[:2]] == [(12_726, 112), (34_602, 112)]
    assert [stage.replayed for stage in stages] == [200 * index for index in range(8)]
    assert [stage.steps for stage in stages[:2]] == [12_726 // 112, (34_602 + 200) // 112]
    assert [stage.questions for stage in stages[:3]] == [4_241, 9_241, 14_291]


def test_other_protocols():
    _, (whole,) = planned("method=multi_task")
    assert whole.train_rows == sum(task.train_records for task in TASKS.values()) and whole.batch == 56
    assert whole.questions == sum(task.eval_questions for task in TASKS.values())
    _, (nothing,) = planned("method=zero_shot")
    assert (nothing.steps, nothing.train_rows) == (0, 0)
    _, alone = planned("method=lora,isolated,order=alphabet")
    assert [stage.questions for stage in alone[:2]] == [12_578, 30_969] and {stage.shapes.info.total for stage in alone} == {1}


def test_phases_have_steps_of_their_own_and_features_cost_none():
    _, plain = planned("method=lora")
    _, stages = planned("method=sema")  # a second phase trains descriptors on stored features
    assert [stage.steps for stage in stages] == [stage.steps for stage in plain]
    _, stages = planned("method=pclr", "--config.method.integrate_batch_size=48", "--config.method.integrate_epochs=2")
    assert stages[0].steps == 12_726 // 96  # nothing is integrated yet
    assert stages[3].steps == 72_140 // 96 + 2 * (72_140 // 48)
    assert stages[3].rows_passed == 72_140 // 96 * 96 + 2 * (72_140 // 48) * 48


def test_questions_that_are_asked_in_two_ways_count_twice():
    _, stages = planned("method=lora", "--config.evaluate.also_image_mode=pad")
    assert [stage.questions for stage in stages[:3]] == [2 * 4_241, 2 * 4_241 + 5_000, 2 * 4_241 + 5_000 + 2 * 5_050]
    _, alike = planned("method=lora", "--config.evaluate.image_mode=pad", "--config.evaluate.also_image_mode=pad")
    assert alike[0].questions == 4_241, "the same way twice is once"


def test_subsets_leave_out_the_tasks_that_coin_asked_whole():
    _, stages = planned("method=lora,recipe=coin_effective")
    sizes = [4_241, 4_000, 4_000, 4_000, 4_000, 30_969, 4_000, 4_000]
    assert [stage.questions for stage in stages] == [sum(sizes[: index + 1]) for index in range(8)]


def test_limits_of_a_config_are_obeyed():
    limits = ("data.train_examples=1000", "evaluate.subset_size=50", "train.epochs=3", "data.tasks=GQA,VizWiz")
    _, stages = planned("method=lora", *(f"--config.{limit}" for limit in limits))
    assert [(stage.train_rows, stage.steps, stage.questions) for stage in stages] == [(1000, 51, 50), (1000, 24, 100)]
    _, stages = planned("method=lora", "--config.train.max_steps=5")
    assert {stage.steps for stage in stages} == {5}
    with pytest.raises(UserError, match="config.train.batch_size=112: the stage ScienceQA has only 100 rows; lower it or set"):
        planned("method=lora", "--config.data.train_examples=100")


@pytest.mark.parametrize(
    "overrides, replay, expected",
    [((), None, 8), (("data.remainder=wrap",), None, 9), ((), Replay((20,), 2.0, "concat"), 10),
     ((), Replay((20,), 2.0, "separate_batch", 0.25), 83 // 8)],  # two of ten rows are replayed ones
)  # fmt: skip
def test_steps_are_those_of_the_batch_plan(overrides, replay, expected):
    settings, _ = planned("method=lora", *(f"--config.{name}" for name in overrides))
    assert steps_of(settings, 83, replay, 20, 10) == expected


# ------------------------------------------------------------------------------------------------------------------- the text


def test_hours_from_a_peak_and_from_a_measurement():
    config = load_config(COIN, ONCE)
    by_peak = diagnose(config, Machine(devices=1, peak_tflops=989, utilization=0.5, positions=704))
    # 574 thousand rows of 19.7 TFLOP (0.06 are scores that XLA computes again) and 801 thousand prompts of 9.8 at 494.5 TFLOP/s
    assert re.search(r"all +6,968 +801,009 +6h21m +4h24m", by_peak)
    seven = diagnose(config, Machine(devices=7, peak_tflops=989, utilization=0.5, positions=704))
    assert re.search(r"all +6,968 +801,009 +54m\d\ds +37m", seven)
    # four of eight tasks are cropped, and asked once more
    twice = diagnose(load_config(COIN), Machine(devices=1, peak_tflops=989, utilization=0.5, positions=704))
    assert re.search(r"all +6,968 +1,386,852 +6h21m +7h38m", twice)
    measured = diagnose(config, Machine(devices=1, step_seconds=4.0, step_rows=100))
    assert "hours from 4 s measured for a step of 100 rows" in measured and re.search(r"801,009 +6h22m +-", measured)
    assert "no hours: give --step-seconds (measured) or --peak-tflops" in diagnose(config, Machine(devices=1))


def test_hours_and_memory_follow_what_a_method_does_in_each_phase():
    machine = Machine(devices=1, peak_tflops=989, positions=704)
    text = {name: diagnose(load_config(f"{COIN}:method={name}", ONCE), machine) for name in ("lora", "lwf", "pclr")}
    minutes = {}
    for name, said in text.items():
        hours = re.search(r"all +[\d,]+ +801,009 +(\d+)h(\d+)m", said)
        minutes[name] = 60 * int(hours[1]) + int(hours[2])
    assert 1.4 < minutes["lwf"] / minutes["lora"] < 1.5  # a forward pass more in seven of eight stages
    assert minutes["pclr"] > 1.5 * minutes["lora"], "three tasks are distilled from a second pool"
    assert re.search(r"a training row is at most 29\.\d TFLOP", text["lwf"]) and "a training row is 20." in text["lora"]
    assert re.search(r"32 row\(s\) at once in stage 5, which holds most \(phase integrate\) at 320 positions, "
                     r"40 row\(s\) at once in stage 3, which holds most at 672, [\d, ]*2048 positions \(estimated\)", text["pclr"])
    assert "20 row(s) at once in stage 3, which holds most (estimated)" in text["lora"]


def test_the_phase_that_holds_most_is_found_where_it_is():
    """PCLR learns with larger batches in the third stage; in small parts the second pool of a later phase weighs more."""
    settings, stages = planned("method=pclr", "--config.train.micro_batches=8", "--config.model.remat=qkvo")
    sizes, _ = model_sizes(settings.model)
    mesh = meshes.abstract_mesh({"data": 1}, 1)
    llava = shapes.abstract_backbone(sizes, settings.model)
    plan = MemoryPlan.of(settings, llava, planned_stages(settings, llava, mesh), mesh, 80e9)
    assert {phase.shapes.phase.kind for phase in plan.phases} == {"learn", "learn_narrow", "integrate"} and len(stages) == 8
    assert ("16 row(s) at once in stage 5, which holds most (phase integrate) at 320, 672, 704, 768, 832, 960, 1280, 1536 positions, "
            "20 row(s) at once in stage 3, which holds most at 2048 positions (estimated)") in plan.text()


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_the_published_models_need_neither_weights_nor_data(name):
    text = diagnose(load_config(f"{COIN}:backbone=llava15_{name}"), Machine(devices=1, memory_gb=80))
    assert f"the preset llava15_{name}" in text
    assert {"7b": "42,090,752 train", "13b": "65,229,056 train"}[name] in text
    assert number(text, "frozen backbone") == {"7b": 14.13, "13b": 26.70}[name]
    assert "config.data.root is not set" in text and "config.model.path is not set" in text


@pytest.mark.parametrize(
    "devices, memory_gb, argument",
    [(1, 80, ""), (1, 24, "batches=mcitlib64"), (2, 40, "backbone=llava15_13b"), (8, 24, "batches=coin_scripts,backbone=llava15_13b")],
)
def test_advice_fits_when_it_is_followed(devices, memory_gb, argument):
    machine, named = Machine(devices=devices, memory_gb=memory_gb), ["--config.model.remat=qkvo_mlp"]
    before = advice(diagnose(load_config(f"{COIN}:{argument}", named), machine))
    assert any(line.startswith("training needs") for line in before)
    flags = [*named, *(flag for line in before for flag in re.findall(r"--config\.\S+", line))]
    after = advice(diagnose(load_config(f"{COIN}:{argument}", flags), machine))
    assert not any(line.startswith(("training needs", "answering needs")) for line in after), after


def test_beginnings_that_questions_may_share_take_memory_too():
    """At least what benchmarks/prefix.py counts for the 7B model, whatever the images; and off where it alone does not fit."""
    text = diagnose(load_config(f"{COIN}:method=lora"), Machine(devices=1, memory_gb=80))
    shared = number(text, "keys and values of shared beginnings, at most")
    counted = json.loads((ROOT / "benchmarks" / "results" / "prefix.json").read_text())["counted"]
    assert counted and all(shared >= row["shared_cache_gb"] - row["plain_cache_gb"] for row in counted)
    for argument, flags in (("method=proglora_dynamic", []), ("method=lora", ["--config.evaluate.share_prefix=off"])):
        assert "shared beginnings" not in diagnose(load_config(f"{COIN}:{argument}", flags), Machine(devices=1, memory_gb=80))
    whole = ["--config.evaluate.first_new_tokens=0"]
    lines = advice(diagnose(load_config(f"{COIN}:method=lora", whole), Machine(devices=1, memory_gb=125)))
    (line,) = [line for line in lines if line.startswith("answering needs")]
    assert line.endswith("where questions share images: it would fit with --config.evaluate.share_prefix=off")


@pytest.mark.parametrize("devices, rows, room", [(1, 32, 128), (32, 1, 1024)])
def test_answers_are_planned_with_the_room_that_takes_more(devices, rows, room):
    """32 questions with little room hold more than half of them with all; a single one a device cannot be halved."""
    text = diagnose(load_config(f"{COIN}:method=proglora_dynamic,batches=mcitlib64"), Machine(devices=devices, memory_gb=141))
    assert "answers of up to 1024 tokens, asked with room for 128 at first" in text
    position = 2 * 32 * 4096 * 2  # keys and values of 32 layers in 16 bits
    assert number(text, "keys and values") == pytest.approx(rows * (2048 + room) * position / 1e9, abs=0.006)


def test_the_policy_is_chosen_before_anything_is_advised():
    (line,) = [line for line in advice(diagnose(load_config(f"{COIN}:batches=mcitlib64"), Machine(devices=1, memory_gb=24)))
               if line.startswith("training needs")]
    assert "--config.train.micro_batches=" in line and "remat" not in line


@pytest.mark.parametrize("named", ["qkvo_mlp", "auto"])
def test_cutting_rows_comes_last(named):
    config = load_config(f"{COIN}:backbone=llava15_13b", [f"--config.model.remat={named}"])
    (line,) = [line for line in advice(diagnose(config, Machine(devices=2, memory_gb=40))) if line.startswith("training needs")]
    flag = "" if named == "auto" else "--config.model.remat=full "
    assert re.search(rf"max_length=\d+ .*buckets=\(\(320,64\),\(672,64\).* {flag}.*mesh.fsdp=2", line)
    longer = advice(diagnose(load_config(COIN), Machine(devices=1, memory_gb=80)))
    assert not any("max_length" in line for line in longer)


def test_encoders_of_similarity_are_looked_for():
    flags = ["--config.similarity.encoders=vit_bert", "--config.similarity.vit_path=/nowhere"]
    said = advice(diagnose(load_config(f"{COIN}:method=proglora_static", flags), Machine(devices=1)))
    assert "config.similarity.vit_path=/nowhere: no such folder; give the Hugging Face folder of a ViT (nothing is downloaded)" in said
    assert not any("similarity" in line for line in advice(diagnose(load_config(f"{COIN}:method=lora", flags), Machine(devices=1))))


def test_what_cannot_fit_says_so():
    lines = advice(diagnose(load_config(COIN), Machine(devices=1, memory_gb=12)))
    assert any("no setting known here makes it fit: take devices with more memory" in line for line in lines)
    assert any("even one question a device does not fit" in line for line in lines)


def test_other_batches_are_named_where_the_own_ones_cannot_be_split_as_far():
    """The batches of the papers' era share no more than 14 parts; 64 rows for every task have 64."""
    machine = Machine(devices=1, memory_gb=24)
    lines = advice(diagnose(load_config(COIN), machine))
    (line,) = [line for line in lines if line.startswith("training needs")]
    assert ("batches of 56, 70, 84, 112, 140 rows split evenly into 14 parts at most; with 64 rows for every task "
            "(configs/coin.py:batches=mcitlib64) it would fit with --config.train.micro_batches=64 (1 row(s) at once") in line
    assert "no setting known here" not in line
    flags = [flag for line in lines for flag in re.findall(r"--config\.\S+", line)]
    after = advice(diagnose(load_config(f"{COIN}:batches=mcitlib64", flags), machine))
    assert not any(line.startswith(("training needs", "answering needs")) for line in after), after
    three = advice(diagnose(load_config(COIN, ["--config.evaluate.batch_size=30"]), Machine(devices=3, memory_gb=24)))
    assert any("with 63 rows for every task it would fit with" in line for line in three)


def test_devices_that_do_not_divide_the_batches():
    lines = advice(diagnose(load_config(COIN), Machine(devices=8)))
    assert any(line.startswith("batches of 70, 84, 140 rows cannot be split over 8 devices") for line in lines)
    lines = advice(diagnose(load_config(f"{COIN}:batches=coin_scripts"), Machine(devices=8)))
    assert "micro-batches are split unevenly over 8 devices: --config.train.micro_batches=8 is even" in lines
    lines = advice(diagnose(load_config(COIN, ["--config.evaluate.batch_size=30"]), Machine(devices=7)))
    assert "config.evaluate.batch_size=30 cannot be split over 7 devices: --config.evaluate.batch_size=28" in lines


def test_rows_that_fit_grow_with_the_device():
    settings, _ = planned("", "--config.train.micro_batches=1")
    llava = shapes.abstract_backbone(model_sizes(settings.model)[0], settings.model)
    mesh = meshes.abstract_mesh({"data": 1}, 1)
    stage = list(shapes.abstract_stages(settings.method, llava, list("abcdefgh"), [1000] * 8, mesh))[-1]
    plan = MemoryPlan(settings, llava, stage, (PlannedPhase(112, 1, stage),), mesh, 0.0, {"ScienceQA": 112})
    rows = [most_rows(plan, (704, 128), 1e9 * size) for size in (12, 24, 40, 80, 141)]
    assert rows[0] == 0 and rows == sorted(rows) and 16 <= rows[3] <= 24
    assert "rows that fit at once at 672 positions, by the device's memory: 24 GB: " in plan.text()


def test_figures_for_one_length_are_for_rows_with_an_image():
    """Whatever shorter buckets there are for text; and no advice cuts all images off."""
    text = lambda *flags: diagnose(load_config(COIN, flags), Machine(devices=1, peak_tflops=989))
    assert "at 672 positions a training row is" in text() and "rows that fit at once at 672 positions" in text()
    assert "at 640 positions a training row is" in text("--config.data.buckets=((64,64),(576,64),(640,64),(2048,2048))")
    # 320 positions would fit into this device, but no image into 320 positions
    lines = advice(diagnose(load_config(f"{COIN}:backbone=llava15_13b,batches=mcitlib64"), Machine(devices=1, memory_gb=35.3)))
    (line,) = [line for line in lines if line.startswith("training needs")]
    assert "no setting known here makes it fit" in line and "max_length" not in line


def test_the_embedded_benchmark_and_its_model():
    text = diagnose(load_config(str(ROOT / "configs" / "coin_mini.py") + ":smoke"), Machine(devices=1, memory_gb=16))
    assert "coin_mini_base/config.json" in text and "Nothing speaks against this config." in text
    assert re.search(r"1 +TextVQA +160 +32 +12 +40", text)
    zero = diagnose(load_config(str(ROOT / "configs" / "coin_mini.py") + ":method=zero_shot"), Machine(devices=1, memory_gb=16))
    assert "while training" not in zero and "while answering" in zero


def test_the_compiled_step(monkeypatch):
    config = load_config(str(ROOT / "configs" / "coin_mini.py") + ":smoke", ["--config.mesh.data=1"])
    text = diagnose(config, Machine(devices=1, memory_gb=16), compile_step=True)
    head = r"Compiled training step, per device, 32 row\(s\) of 92 positions at once, for 1 x cpu: "
    found = re.search(head + r"([\d.]+) GB \(arguments", text)
    assert found and 1.5 < float(found[1]) < 16 and "XLA for CPU computes 16-bit formats in 32 bits" in text


# --------------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        ([f"--config={COIN}:backbone=llava16"], "backbone=llava16: choose one of llava15_7b"),
        ([f"--config={COIN}", "--config.train.micro_batch=2"], "micro_batch"),
        ([f"--config={COIN}", "--fast"], "--fast: unknown argument; fields are set with --config.section.field=value"),
        ([f"--config={COIN}", "--config.mesh.fsdp=3", "--devices=8"], "8 devices cannot be divided by 3"),
        ([f"--config={COIN}:backbone=any"], "config.model.preset is empty; give a folder with a config.json, or a preset: llava15_7b"),
        ([f"--config={COIN}", "--utilization=1.5"], "--utilization=1.5: must be a share of the peak"),
        *(([f"--config={COIN}", f"--memory-gb={value}"], f"--memory-gb={said}: must be positive")
          for value, said in (("-1", "-1"), ("0", "0"), ("nan", "nan"), ("inf", "inf"))),
        ([f"--config={COIN}", "--step-seconds=nan"], "--step-seconds=nan: must be positive"),
        ([f"--config={COIN}", "--config.model.attention=cudnn"], "config.model.attention='cudnn': is a kernel for NVIDIA GPUs"),
        ([f"--config={COIN}", "--devices=0"], "--devices=0: must be positive"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys):
    assert tools.main(["doctor", *arguments]) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""


def test_other_verbs_still_refuse_unknown_arguments(capsys):
    with pytest.raises(SystemExit):
        tools.main(["report", "folder", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_the_counts_of_reduced_sets_are_not_known():
    note = ("config.data.instruction_set=slim_0.3: how many records its files have is not known here; rows, steps, questions and hours are "
            "those of the whole set, at most")
    assert note in advice(diagnose(load_config(COIN, ["--config.data.instruction_set=slim_0.3"]), Machine(devices=1)))
    assert not any("is not known here" in line for line in advice(diagnose(load_config(COIN), Machine(devices=1))))


def test_a_folder_is_asked_for_its_sizes(tmp_path):
    folder = tiny_run.save_model(tmp_path / "model")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # config.json is enough
    sizes, source = model_sizes(ModelSettings(path=str(folder)))
    assert sizes.text_config.hidden_size == 16 and source == f"{folder}/config.json"
    with pytest.raises(UserError, match="config.model.preset='llava15_7b': text_config.hidden_size must be 4096"):
        model_sizes(ModelSettings(path=str(folder), preset="llava15_7b"))


def test_the_verb_prints_and_is_quick():
    done = subprocess.run(
        [sys.executable, "-m", "proglora_jax.tools", "doctor", f"--config={COIN}:method=lora,backbone=llava15_13b", "--memory-gb=80"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "500,695,040 train" in done.stdout and "Before you run it:" in done.stdout
    assert jax.device_count() == 8, "the tests' own devices are not touched"
