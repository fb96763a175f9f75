"""tools predict: answers and gates of any stage from the workdir alone; mistakes give one sentence."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_export import world  # noqa: F401 (a fixture)
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax import tools
from proglora_jax.continual import predict
from proglora_jax.continual.predict import Prediction, describe
from proglora_jax.continual.trained import open_trained
from proglora_jax.data.tasks import load_task
from proglora_jax.methods.moelora import MoELoRA


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(path)
    return path


def said(capsys, *arguments: object) -> str:
    assert tools.main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_an_image_and_a_question(world, photo, capsys):  # noqa: F811
    out = said(capsys, world.run("proglora_dynamic"), "--image", photo, "--question", "What is it?", "--instruction", "gqa")
    assert out.startswith("proglora_dynamic, stage 01_imagenet\n") and f"[{photo}]" in out
    assert "question  What is it? / Answer the question using a single word or phrase." in out and "\nanswer    " in out
    gates = dict(re.findall(r"^  (TextVQA|ImageNet) +([\d.]+)  █*$", out, re.MULTILINE))
    assert list(gates) == ["TextVQA", "ImageNet"] and sum(map(float, gates.values())) == pytest.approx(1, abs=2e-3)


def test_several_questions_from_a_file(world, photo, capsys, tmp_path):  # noqa: F811
    workdir = world.run("proglora_dynamic")
    (photo.parent / "asked.jsonl").write_text(
        '{"question": "Is it red?", "image": "photo.png"}\n\n{"text": "What is up?\\nOne word."}\n{"question": "Why?", "image": ""}\n')
    lines = [json.loads(line) for line in said(capsys, workdir, "--questions", photo.parent / "asked.jsonl", "--json").splitlines()]
    assert [line["question"] for line in lines] == ["Is it red?", "What is up?\nOne word.", "Why?"]
    assert [line["image"] for line in lines] == [str(photo), None, None] and {line["stage"] for line in lines} == {"01_imagenet"}
    assert all(sum(line["gates"].values()) == pytest.approx(1, abs=1e-5) for line in lines)
    assert lines[0]["gates"] != lines[1]["gates"]


def test_earlier_stages_and_methods_without_gates(world, capsys):  # noqa: F811
    first = json.loads(said(capsys, world.run("proglora_dynamic"), "--stage", "0", "--question", "What?", "--json"))
    assert first["gates"] == {"TextVQA": 1.0} and first["stage"] == "00_textvqa"
    out = json.loads(said(capsys, world.run("lora"), "--question", "What?", "--max-new-tokens", 1, "--json"))
    assert out["gates"] == {} and out["method"] == "lora" and out["cut_off"] == bool(out["answer"])


def test_methods_that_are_told_the_task(world, capsys):  # noqa: F811
    workdir = world.run("proglora_static")
    assert said(capsys, workdir, "--question", "What?").startswith("proglora_static, stage 01_imagenet, asked as ImageNet\n")
    first = json.loads(said(capsys, workdir, "--question", "What?", "--task", "textvqa", "--json"))
    assert first["gates"] == {"TextVQA": 1.0, "ImageNet": 0.0}


def test_a_kernel_of_the_machine_that_trained_is_not_needed(world):  # noqa: F811
    trained = open_trained(world.run("proglora_dynamic"))
    trained.model["attention"] = "cudnn"
    predictor = predict.Predictor(trained, trained.backbone()[0])
    (prediction,) = predictor(predict.make_questions([("What?", None)], "", "Original"), 1, max_new_tokens=1)
    assert prediction.question == "What?" and predictor.llava.settings.attention == "xla"


def test_what_is_said_of_an_answer():
    out = describe(Prediction("What?", None, "a", True, {"block 0": -0.2, "block 1": 0.5}, (5,)))
    assert out == "question  What?\nanswer    a   (cut off)\ngates\n  block 0  -0.200  \n  block 1   0.500  " + "█" * 12
    assert describe(Prediction("What?", "x.png", "", False, {}, ())) == "question  What?   [x.png]\nanswer    "


def test_mistakes_give_one_sentence(world, photo, tmp_path, capsys):  # noqa: F811
    workdir = world.run("proglora_dynamic")
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:20])
    bad = '{"question": "What?"}\n{"question": \n[1]\n{"image": "x"}\n{"question": "  <image> "}\n{"text": "a", "image": 3}\n'
    files = {"bad.jsonl": bad, "empty.jsonl": "\n", "latin.jsonl": b"\xe9",
             "lost.jsonl": '{"question": "a", "image": "nowhere.png"}'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments, sentence in {
        (): "give --question TEXT",
        ("--question", "a", "--questions", "b"): "give --question TEXT",
        ("--question", " \n"): "--question: is empty; ask something",
        ("--question", "a", "--image", "nowhere.png"): "--image nowhere.png: no such image",
        ("--question", "a", "--image", str(broken)):
            r"broken.png: cannot be read as an image \(.*\); download it again, or give another file\.$",
        ("--question", "a", "--stage", "7"): "has no trained stage 7; it has 00_textvqa, 01_imagenet",
        ("--question", "a", "--task", "GQA"): "--task GQA: proglora_dynamic does not know tasks",
        ("--question", "a", "--instruction", "Poems"): "--instruction Poems: no such task; choose one of ScienceQA",
        ("--question", "a", "--max-new-tokens", "-1"): "--max-new-tokens -1: must be above 0",
        ("--question", "a", "--base", str(tmp_path / "gone")): "gone: no such folder",
        ("--questions", str(tmp_path / "none")): "none: no such file; give a file with one",
        ("--questions", str(tmp_path / "bad.jsonl")): "5 problem.*line 2: is not JSON.*line 3: is no JSON object.*line 4: has no 'question'"
                                                      ".*line 5: has no 'question'.*line 6: 'image' must be one path",
        ("--questions", str(tmp_path / "empty.jsonl")): "holds no questions",
        ("--questions", str(tmp_path / "latin.jsonl")): "is not UTF-8 text",
        ("--questions", str(tmp_path / "lost.jsonl")): "nowhere.png: no such image",
        ("--questions", "x", "--image", str(photo)): "--image: belongs to --question",
    }.items():  # fmt: skip
        assert tools.main(["predict", str(workdir), *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert re.search(sentence, error) and error.count("\n") == 1, (sentence, error)
    assert tools.main(["predict", str(tmp_path), "--question", "a"]) == 1
    assert "holds no trained stage" in capsys.readouterr().err
    assert tools.main(["predict", str(world.run("proglora_static")), "--question", "a", "--task", "GQA"]) == 1
    assert "has not learned GQA; it knows TextVQA, ImageNet" in capsys.readouterr().err


def test_blocks_that_are_no_tasks_get_numbers(world):  # noqa: F811
    trained = open_trained(world.run("lora"))
    named = predict.Predictor._named
    holder = type("Holder", (), {"trained": trained})
    assert named(holder, np.array([0.2, 0.3, 0.5])) == pytest.approx({"block 0": 0.2, "block 1": 0.3, "block 2": 0.5})
    assert named(holder, np.array([1.0])) == {}


def test_experts_are_not_named_after_tasks_though_there_be_as_many(world):  # noqa: F811
    trained = open_trained(world.run("lora"))
    assert len(trained.tasks()) == 2
    experts = dataclasses.replace(trained, method=MoELoRA(experts=2))
    holder = type("Holder", (), {"trained": experts})
    assert predict.Predictor._named(holder, np.array([0.25, 0.75])) == {"expert 0": 0.25, "expert 1": 0.75}


@pytest.mark.parametrize("legacy", [True, False])
def test_the_tokenizer_is_read_as_the_run_read_it(world, legacy):  # noqa: F811
    trained = open_trained(world.run("lora"))
    config = {**trained.config, "data": {**trained.config["data"], "tokenizer_legacy": legacy}}
    encoder, _ = predict.prompting(dataclasses.replace(trained, config=config), world.source)
    assert encoder.tokenizer.legacy is legacy


def test_a_finished_run_of_the_embedded_model_answers_as_it_did(here, capsys, tmp_path, monkeypatch):  # noqa: F811
    """From the workdir alone: a stage gives the answers and gates of its own evaluation; an earlier one takes a question of one's own."""
    root = here.folder / "embedded_data"
    small = {"data__tasks": "TextVQA,OCRVQA", "train__max_steps": 3, "data__embedded_train_size": 8, "data__embedded_test_size": 4,
             "evaluate__batch_size": 4}
    workdir = here.run("embedded_model", model__path="embedded", data__root=str(root), **small)
    assert json.loads((workdir / "config.json").read_text())["config"]["model"]["path"] == "embedded"
    monkeypatch.chdir(tmp_path)
    questions = load_task(str(root), "TextVQA").questions
    asked = [json.dumps({"question": question.text, "image": question.image}) for question in questions]
    (tmp_path / "asked.jsonl").write_text("\n".join(asked))
    lines = (workdir / "stages" / "01_ocrvqa" / "answers" / "TextVQA.jsonl").read_text().splitlines()[1:]
    then = {row["index"]: row for row in map(json.loads, lines)}
    now = [json.loads(line) for line in said(capsys, workdir, "--questions", "asked.jsonl", "--json").splitlines()]
    assert [line["answer"] for line in now] == [then[index]["text"] for index in range(4)] and any(line["answer"] for line in now)
    for index, line in enumerate(now):
        assert list(line["gates"]) == ["TextVQA", "OCRVQA"] and line["stage"] == "01_ocrvqa"
        np.testing.assert_allclose(list(line["gates"].values()), then[index]["gates"], atol=1e-5)
    first = ("--question", "What word is on the sign?", "--image", questions[0].image, "--instruction", "TextVQA", "--stage", "textvqa")
    out = said(capsys, workdir, *first)
    assert out.startswith("proglora_dynamic, stage 00_textvqa\n") and "\nanswer    " in out
    assert re.findall(r"^  (\w+) +1.000 ", out, re.MULTILINE) == ["TextVQA"]
