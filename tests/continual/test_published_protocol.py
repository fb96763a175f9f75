"""The papers' protocol end to end, small: CoIN's files, Vicuna + projector + CLIP, configs/coin.py, export, the same answers in torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import transformers
from PIL import Image
from test_original_layout import take_apart
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax import main, tools
from proglora_jax.continual import stage_data
from proglora_jax.continual.answering import read_answers
from proglora_jax.continual.predict import Predictor, prompting
from proglora_jax.continual.torch_check_gates import load_module
from proglora_jax.continual.trained import open_trained
from proglora_jax.data.images import ImageLoader
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import load_task, task_order
from proglora_jax.training.config_file import load_config

TASKS = task_order("coin")
# What makes the published config fit a model of two narrow layers and a few records a task; all else is as published.
SMALL = {
    "method.rank": 2, "method.alpha": 4.0, "model.dtype": "float32", "model.param_dtype": "float32", "model.remat": "none",
    "data.max_length": 352, "data.buckets": ((352, 24),), "train.batch_size": 2, "train.batch_sizes": {}, "train.micro_batches": 2,
    "train.loss_groups": 2, "train.max_steps": 2, "evaluate.batch_size": 2, "evaluate.max_new_tokens": 4,
    "evaluate.prompt_lengths": (352,), "evaluate.image_mode": "pad", "evaluate.also_image_mode": "",
    "similarity.max_samples": 2, "run.tensorboard": False, "mesh.data": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(here) -> dict[str, str]:  # noqa: F811
    """The benchmark's folder, and where the three parts of the model lie."""
    write_benchmark(str(here.root), train_size=4, test_size=2)
    science = here.root / "cl_dataset" / "ScienceQA"  # a question of the test split that test.json does not ask
    problems, splits = (json.loads((science / name).read_text()) for name in ("problems.json", "pid_splits.json"))
    (science / "problems.json").write_text(json.dumps(problems | {"7": {"answer": 0, "choices": ["a", "b"]}}))
    (science / "pid_splits.json").write_text(json.dumps(splits | {"test": [*splits["test"], "7"]}))
    return take_apart(here.model, here.folder / "parts") | {"data__root": str(here.root)}


def run(here, parts: dict[str, str], argument: str, **more) -> Path:  # noqa: F811
    """Runs configs/coin.py with an argument, as the command line does."""
    config = load_config(f"{tiny_run.CONFIGS / 'coin.py'}:backbone=any,{argument}",
                         [f"--config.{name.replace('__', '.')}={value}" for name, value in parts.items()])
    for name, value in (SMALL | more | {"run.compilation_cache": tiny_run.compiled()}).items():
        section, field = name.split(".")
        assert field in config[section], name
        config[section][field] = value
    workdir = here.folder / argument
    main.run(config, workdir, "run")
    return workdir


def test_eight_tasks_from_vicuna_to_torch(here, parts, capsys):  # noqa: F811
    workdir = run(here, parts, "method=proglora_dynamic", **tiny_run.DYNAMIC)
    results = json.loads((workdir / "results.json").read_text())
    assert results["tasks"] == list(TASKS) and [len(row) for row in results["scoring"]["coin"]] == list(range(1, 9))
    clean, out = here.folder / "clean", here.folder / "exported"
    vision, projector = parts["model__vision_path"], parts["model__projector_path"]
    arguments = ["--vision", vision, "--projector", projector, "--out", str(clean)]
    assert tools.main(["convert", "from-hf", parts["model__path"], *arguments]) == 0
    torch.set_num_threads(1)
    assert tools.main(["convert", "to-hf", str(workdir), "--kind", "dynamic", "--base", str(clean), "--out", str(out)]) == 0
    assert "vicuna_projector_custom" in (said := capsys.readouterr().out) and "reloaded in torch: the same" in said

    model = load_module(out / "gated_llava.py").GatedLlava.load(str(out))
    assert model.columns == list(TASKS)
    images = text_only = 0
    for task in TASKS:
        questions = load_task(str(here.root), task, "Original").questions
        asked = read_answers(workdir / "stages" / "07_ocrvqa" / "answers" / f"{task}.jsonl")
        answers = model.answer([question.text for question in questions], [question.image for question in questions], 4)
        assert answers == [asked[index]["text"] for index in range(len(questions))], task
        np.testing.assert_allclose(model.gates.numpy(), [asked[index]["gates"] for index in range(len(questions))], atol=1e-5)
        images += sum(question.image is not None for question in questions)
        text_only += sum(question.image is None for question in questions)
    assert images + text_only == 16 and images > 8

    # the run's own questions from the workdir alone, and a new one to an earlier stage, from the command line
    trained = open_trained(workdir)
    found = Predictor(trained, trained.backbone()[0])(questions, 0)
    assert [answer.answer for answer in found] == answers
    picture = here.folder / "mine.png"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(picture)
    command = ["predict", str(workdir), "--stage", "gqa", "--question", "What is this?", "--image", str(picture), "--json"]
    assert tools.main(command) == 0
    line = json.loads(capsys.readouterr().out)
    assert list(line["gates"]) == list(TASKS[:4]) and line["stage"] == "03_gqa"
    assert sum(line["gates"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("templates", ["Diverse", "10Type"])
def test_the_other_instruction_sets(here, parts, capsys, caplog, templates):  # noqa: F811
    workdir = run(here, parts, f"method=multi_task,templates={templates}")
    results = json.loads((workdir / "results.json").read_text())
    assert results["tasks"] == list(TASKS) and None not in results["scoring"]["clean"][0]
    science = json.loads((workdir / "stages" / "00_multi_task" / "scores" / "ScienceQA.json").read_text())
    assert (science["count"], science["missing"]) == (3, 1) and science["ceiling"] == {"coin": pytest.approx(200 / 3), "clean": 100.0}
    assert "ScienceQA: its file asks 2 of the 3 questions of the test split; the others count as wrong" in caplog.text
    asked = read_answers(workdir / "stages" / "00_multi_task" / "answers" / "GQA.jsonl")
    questions = load_task(str(here.root), "GQA", templates).questions
    assert [asked[index]["prompt"] for index in range(2)] == [question.text for question in questions]
    out = here.folder / f"merged_{templates}"
    torch.set_num_threads(1)
    assert tools.main(["convert", "to-hf", str(workdir), "--kind", "merged", "--out", str(out)]) == 0
    assert "reloaded in torch: logits differ by" in capsys.readouterr().out

    # all eight tasks' answers by transformers alone, from the merged folder and the ids and pixels that the run used
    trained = open_trained(workdir)
    encoder, spec = prompting(trained, trained.backbone()[0])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    unused = list(range(encoder.tokenizer.size, model.config.text_config.vocab_size)) or None
    for task in TASKS:
        questions = load_task(str(here.root), task, templates).questions
        asked = read_answers(workdir / "stages" / "00_multi_task" / "answers" / f"{task}.jsonl")
        for index, (question, item) in enumerate(zip(questions, encoder.encode_questions(questions), strict=True)):
            ids, loader = torch.tensor(item.tokens[None]).long(), ImageLoader(spec, "pad")
            shown = {"pixel_values": torch.tensor(loader(question.image).transpose(2, 0, 1)[None])} if question.image else {}
            with torch.no_grad():
                made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                                      suppress_tokens=unused, eos_token_id=encoder.tokenizer.eos_id, pad_token_id=encoder.tokenizer.pad_id,
                                      **shown)
            assert encoder.tokenizer.decode(made[0, ids.shape[1]:].tolist()).strip() == asked[index]["text"], (task, index)


@pytest.mark.parametrize("templates", ["Diverse", "10Type"])
def test_a_sequence_with_another_instruction_set_and_images_as_coin_prepares_them(here, parts, monkeypatch, templates):  # noqa: F811
    """Stage after stage trains on the set's records; questions are the set's, and cropped for the tasks that CoIN's scripts crop."""
    taught, prepared = {}, []
    encode, prepare = stage_data.encode_rows, ImageLoader.pixels

    def encode_and_note(rows, *rest):
        taught.setdefault(rows[0].example.task, []).extend(row.example for row in rows)
        return encode(rows, *rest)

    monkeypatch.setattr(stage_data, "encode_rows", encode_and_note)
    monkeypatch.setattr(ImageLoader, "pixels", lambda self, path: prepared.append((path, self.mode)) or prepare(self, path))
    tasks = ("ScienceQA", "GQA", "Grounding")
    options = tiny_run.DYNAMIC | {"data.tasks": ",".join(tasks), "evaluate.image_mode": "coin"}
    workdir = run(here, parts, f"method=proglora_dynamic,templates={templates}", **options)
    results = json.loads((workdir / "results.json").read_text())
    assert results["tasks"] == list(tasks) and [len(row) for row in results["scoring"]["coin"]] == [1, 2, 3]
    assert results["settings"]["instruction set"] == templates

    asked_in, trained = set(prepared), open_trained(workdir)
    predictor = Predictor(trained, trained.backbone()[0])
    for task, mode in zip(tasks, ("crop", "pad", "crop")):
        mine, original = (load_task(str(here.root), task, name) for name in (templates, "Original"))
        same = templates == "Diverse" and task != "GQA"  # in the others these two sets ask alike
        assert taught[task] == mine.train and (mine.train == original.train) == same
        assert {(example.image, "pad") for example in mine.train if example.image} <= asked_in, "training pads everything"
        assert {(question.image, mode) for question in mine.questions if question.image} <= asked_in
        if mode == "crop":
            assert not {(question.image, "pad") for question in mine.questions if question.image} & asked_in
        folder = workdir / "stages" / "02_grounding"
        lines = [json.loads(line) for line in (folder / "answers" / f"{task}.jsonl").read_text().splitlines()]
        answers = {line["index"]: line for line in lines[1:]}
        assert lines[0]["image_mode"] == json.loads((folder / "scores" / f"{task}.json").read_text())["image_mode"] == mode
        assert [answers[index]["prompt"] for index in range(2)] == [question.text for question in mine.questions]
        assert (mine.questions == original.questions) == same
        found = predictor(mine.questions, 0, image_mode=mode)
        assert [answer.answer for answer in found] == [answers[index]["text"] for index in range(2)]

    # the same answers in torch, the images prepared by the exported module
    clean, out = here.folder / f"clean_{templates}", here.folder / f"exported_{templates}"
    places = ["--vision", parts["model__vision_path"], "--projector", parts["model__projector_path"], "--out", str(clean)]
    assert tools.main(["convert", "from-hf", parts["model__path"], *places]) == 0
    torch.set_num_threads(1)
    assert tools.main(["convert", "to-hf", str(workdir), "--kind", "dynamic", "--base", str(clean), "--out", str(out)]) == 0
    model = load_module(out / "gated_llava.py").GatedLlava.load(str(out))
    for task, mode in zip(tasks, ("crop", "pad", "crop")):
        questions = load_task(str(here.root), task, templates).questions
        asked = read_answers(workdir / "stages" / "02_grounding" / "answers" / f"{task}.jsonl")
        found = model.answer([question.text for question in questions], [question.image for question in questions], 4, mode)
        assert found == [asked[index]["text"] for index in range(len(questions))], task
