"""The embedded benchmark on disk: CoIN's layout, repeatable bytes, true answers in the real forms, and low blind baselines."""

from __future__ import annotations

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import read_examples
from proglora_jax.data.synthetic import baselines, write_benchmark
from proglora_jax.data.synthetic.benchmark import MANIFEST, draw_items
from proglora_jax.data.synthetic.layout import TASKS
from proglora_jax.data.synthetic.words import OBJECTS, SIGN_WORDS
from proglora_jax.data.tasks import TASKS as TABLE
from proglora_jax.data.tasks import load_auxiliary, load_task
from proglora_jax.data.templates import INSTRUCTIONS

TRAIN, TEST = 60, 30


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A small benchmark."""
    folder = str(tmp_path_factory.mktemp("coin_mini") / "data")
    write_benchmark(folder, 0, TRAIN, TEST)
    return folder


def test_same_tasks_and_files_as_the_real_benchmark(root):
    assert list(TASKS) == list(TABLE)
    for name, task in TASKS.items():
        assert f"{task.split}.json" == TABLE[name].eval_file
    for name in TABLE:
        for instruction_set in INSTRUCTIONS:
            data = load_task(root, name, instruction_set)
            assert len(data.train) == TRAIN and len(data.questions) == TEST


@pytest.mark.parametrize("name", list(TASKS))
def test_records_are_read_by_the_real_loader(root, name):
    data = load_task(root, name)
    pictures = [e.image for e in data.train] + [q.image for q in data.questions]
    assert all(image is None or os.path.isfile(image) for image in pictures)
    there = [image for image in pictures if image is not None]
    assert len(set(there)) == len(there)
    assert len({e.id for e in data.train}) == TRAIN and len({q.id for q in data.questions}) == TEST
    turns = {len(e.turns) for e in data.train}
    assert turns == ({2} if name in ("GQA", "Grounding", "VQAv2", "OCRVQA") else {1})
    instruction = INSTRUCTIONS["Original"][name][0]
    for example in data.train:
        first, *rest = example.turns
        assert instruction in first[0] and all(instruction not in human for human, _ in rest)
    assert all(instruction in q.text for q in data.questions)
    if name != "ScienceQA":
        assert None not in pictures


def test_answer_forms(root):
    science = load_task(root, "ScienceQA")
    assert {gpt for e in science.train for _, gpt in e.turns} <= set("ABCD")
    blind = sum(e.image is None for e in science.train) / TRAIN
    assert 0.1 < blind < 0.42
    assert any(q.image is None for q in science.questions)
    names = {name.capitalize() for name in OBJECTS}
    imagenet = load_task(root, "ImageNet")
    assert all(gpt.endswith(".") and gpt[:-1] in names for e in imagenet.train for _, gpt in e.turns)
    assert all(q.answer in names for q in imagenet.questions)
    assert all(q.answer in SIGN_WORDS for q in load_task(root, "TextVQA").questions)
    assert {"yes", "no"} <= {q.answer for q in load_task(root, "GQA").questions}
    assert "unanswerable" in {q.answer for q in load_task(root, "VizWiz").questions}
    assert {q.answer for q in load_task(root, "VQAv2").questions} & set("12345")


def test_boxes(root):
    data = load_task(root, "Grounding")
    form = re.compile(r"\[(0\.\d\d|1\.00)(, (0\.\d\d|1\.00)){3}\]")
    answers = [gpt for e in data.train for _, gpt in e.turns] + [q.answer for q in data.questions]
    assert all(form.fullmatch(answer) for answer in answers)
    assert any(q.size != (48, 48) for q in data.questions) or any(Image.open(e.image).size != (48, 48) for e in data.train)
    for q in data.questions:
        x1, y1, x2, y2 = q.bbox
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and Image.open(q.image).size == q.size
        ox1, oy1, ox2, oy2 = json.loads(q.extra["origin_answer_bbox"])
        (width, height), side = q.size, max(q.size)
        moved = (
            (ox1 * width + max(height - width, 0) / 2) / side, (oy1 * height + max(width - height, 0) / 2) / side,
            (ox2 * width + max(height - width, 0) / 2) / side, (oy2 * height + max(width - height, 0) / 2) / side,
        )
        np.testing.assert_allclose(moved, q.bbox, atol=0.011)


def test_auxiliary_files(root):
    science, questions = load_auxiliary(root, "ScienceQA"), load_task(root, "ScienceQA").questions
    assert set(science["pid_splits"]["test"]) == {q.id for q in questions}
    for q in questions:
        problem = science["problems"][q.id]
        assert "ABCD"[problem["answer"]] == q.answer and 2 <= len(problem["choices"]) <= 4
        assert f"{q.answer}. {problem['choices'][problem['answer']]}" in q.text
        assert (problem["image"] is None) == (q.image is None)
    notes = {entry["image_id"]: entry for entry in load_auxiliary(root, "TextVQA")["annotations"]["data"]}
    for q in load_task(root, "TextVQA").questions:
        entry = notes[q.id]
        assert len(entry["answers"]) == 10 and entry["answers"].count(q.answer) >= 4
        assert q.text.startswith(entry["question"]) and os.path.basename(q.image).startswith(q.id)
    balanced = load_auxiliary(root, "GQA")["questions"]
    for q in load_task(root, "GQA").questions:
        assert balanced[q.id]["answer"] == q.answer and balanced[q.id]["isBalanced"] and q.text.startswith(balanced[q.id]["question"])


def test_instruction_sets_share_questions_and_differ_in_wording(root):
    for name in TASKS:
        original, diverse, ten = (load_task(root, name, s) for s in ("Original", "Diverse", "10Type"))
        assert [e.image for e in original.train] == [e.image for e in ten.train]
        assert [q.answer for q in original.questions] == [q.answer for q in diverse.questions]
        last = {e.turns[0][0].rpartition("\n")[2] if name != "Grounding" else e.turns[0][0].partition(": ")[0] for e in ten.train}
        assert len(last) > 4
    assert load_task(root, "GQA").questions[0].text != load_task(root, "GQA", "Diverse").questions[0].text


def test_same_seed_same_bytes_and_a_larger_one_contains_a_smaller_one(root, tmp_path):
    manifest = write_benchmark(str(tmp_path / "again"), 0, TRAIN, TEST)
    with open(os.path.join(root, MANIFEST), encoding="utf-8") as file:
        assert json.load(file) == manifest
    other = write_benchmark(str(tmp_path / "other"), 1, 20, 10, ["GQA"])
    assert other["pixels"]["GQA/test"] != manifest["pixels"]["GQA/test"]
    write_benchmark(str(tmp_path / "small"), 0, 20, 10, ["VQAv2"])
    small, large = load_task(str(tmp_path / "small"), "VQAv2"), load_task(root, "VQAv2")
    assert [e.turns for e in small.train] == [e.turns for e in large.train[:20]]
    assert [q.text for q in small.questions] == [q.text for q in large.questions[:10]]


def test_train_and_test_pictures_differ():
    for name in ("GQA", "ImageNet"):
        train, test = ({item.pixels.tobytes() for item in draw_items(name, 0, split, 40)} for split in ("train", "test"))
        assert len(train) == len(test) == 40 and not train & test


def test_an_existing_folder_is_reused_or_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    first = write_benchmark(str(folder), 0, 2, 2, ["TextVQA"])
    stamp = os.stat(folder / MANIFEST).st_mtime_ns
    assert write_benchmark(str(folder), 0, 2, 2, ["TextVQA"]) == first and os.stat(folder / MANIFEST).st_mtime_ns == stamp
    with pytest.raises(UserError, match="train_size=2 there, 3 asked for"):
        write_benchmark(str(folder), 0, 3, 2, ["TextVQA"])
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "holiday.txt").write_text("x")
    with pytest.raises(UserError, match="is not a coin_mini benchmark"):
        write_benchmark(str(strange), 0, 2, 2)
    (strange / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="not a coin_mini manifest"):
        write_benchmark(str(strange), 0, 2, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [((0, 0, 2), "config.data.embedded_train_size=0"), ((0, 2, 0), "embedded_test_size=0"), ((0, 2, 2, ["X"]), "unknown task")],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_benchmark(str(tmp_path / "data"), *arguments)


def test_blind_baselines_are_low(tmp_path, capsys):
    folder = str(tmp_path / "data")
    write_benchmark(folder, 0, 400, 200, ["ScienceQA", "TextVQA", "GQA", "VizWiz", "VQAv2", "OCRVQA"])
    result = baselines(folder)
    limits = {"ScienceQA": 45, "TextVQA": 15, "GQA": 42, "VizWiz": 35, "VQAv2": 45, "OCRVQA": 35}
    assert all(max(result[name]) <= limit for name, limit in limits.items())
    assert "question only" in capsys.readouterr().out
    letters = Counter(gpt for e in load_task(folder, "ScienceQA").train for _, gpt in e.turns)
    assert max(letters["A"], letters["B"], letters["C"]) < 0.42 * 400 and letters["D"] > 0.05 * 400
    unanswerable = sum(q.answer == "unanswerable" for q in load_task(folder, "VizWiz").questions)
    assert unanswerable <= 0.32 * 200


def test_pictures_survive_being_stored(root):
    items = draw_items("OCRVQA", 0, "test", 5)
    for item, question in zip(items, load_task(root, "OCRVQA").questions, strict=False):
        stored = np.asarray(Image.open(question.image).convert("RGB"), np.int16)
        assert np.abs(stored - item.pixels).mean() < 4


def test_a_written_training_file_is_plain_coin(root):
    path = os.path.join(root, "playground/Instructions_Original/GQA/train.json")
    with open(path, encoding="utf-8") as file:
        record = json.load(file)[0]
    assert set(record) == {"id", "image", "conversations"} and record["image"].startswith("./GQA/images/")
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
    assert record["conversations"][0]["value"].startswith("<image>\n")
    assert len(read_examples(path, "GQA", os.path.join(root, "cl_dataset"))[0]) == TRAIN
