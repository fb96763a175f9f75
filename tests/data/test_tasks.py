"""The task table and the loader of data folders."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from data_fixtures import conversation, write_json

from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import find_set, set_names, task_of, wording
from proglora_jax.data.schema import Question
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import ORDERS, TASKS, get_task, load_auxiliary, load_task, select_subset, task_order
from proglora_jax.data.templates import instructions

TRAIN = [{"id": 1, "image": "./GQA/images/1.jpg", "conversations": conversation(("<image>\nQ", "A"))}]
TEST = [{"question_id": 1, "image": "./GQA/images/1.jpg", "text": "Q", "answer": "a"}]


def test_orders():
    assert task_order("coin") == ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
    assert all(set(order) == set(TASKS) for order in ORDERS.values())
    assert task_order(["ocr-vqa", "gqa"]) == ("OCRVQA", "GQA")
    for bad in ("x", ["x"], [], ["GQA", "gqa"]):
        with pytest.raises(UserError):
            task_order(bad)


def test_coin_image_modes():
    assert {t for t in TASKS if get_task(t).coin_image_mode == "crop"} == {"ScienceQA", "ImageNet", "Grounding", "VQAv2"}


FOLDERS = ["playground/Instructions_Original", "Instructions_Original", "playground/Instructions_Type1", "Instructions"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("with_images", [True, False])
def test_layouts(tmp_path, folder, with_images):
    root = str(tmp_path)
    write_json(f"{root}/{folder}/GQA/train.json", TRAIN)
    write_json(f"{root}/{folder}/GQA/test.json", TEST)
    if with_images:
        os.makedirs(f"{root}/cl_dataset")
    data = load_task(root, "GQA", "Original")
    image_root = os.path.join(root, "cl_dataset") if with_images else root
    assert data.train[0].image == os.path.join(image_root, "GQA", "images", "1.jpg") == data.questions[0].image
    assert data.train is data.train


def test_diverse_aliases(tmp_path):
    root = str(tmp_path)
    write_json(f"{root}/playground/Instructions/GQA/train_new.json", TRAIN)
    write_json(f"{root}/playground/Instructions/GQA/test.json", TEST)
    data = load_task(root, "GQA", "Diverse")
    assert len(data.train) == 1 and len(data.questions) == 1


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("slim", "Instructions_slim"), ("slim_0.1", "Instructions_slim_0.1"), ("Instructions_slim_0.8", "Instructions_slim_0.8"),
        ("Type1", "Instructions_Type1"), ("Instructions", "Instructions"), ("Instructions_Type2", "Instructions_Type2"),
        ("New", "Instructions_New"),
    ],
)  # fmt: skip
def test_former_names_of_sets(tmp_path, name, folder):
    root = str(tmp_path)
    write_json(f"{root}/playground/{folder}/GQA/train.json", TRAIN * 3)
    write_json(f"{root}/playground/{folder}/GQA/test.json", TEST)
    data = load_task(root, "GQA", name)
    assert (len(data.train), len(data.questions)) == (3, 1) and data.folder == os.path.join(root, "playground", folder, "GQA")
    assert instructions(name, "GQA") == instructions("Diverse" if folder[-1] in "2w" else "Original", "GQA")


def test_a_name_of_a_set_means_one_set():
    assert {find_set(name) for name in ("Type2", "New", "Instructions_New", "Instructions_Diverse", "Diverse")} == {"Diverse"}
    assert {find_set(name) for name in ("Type1", "Instructions", "Instructions_Type1", "Original")} == {"Original"}
    assert {find_set(f"slim_0.{n}") for n in range(1, 9)} == {f"slim_0.{n}" for n in range(1, 9)} and wording("slim_0.3") == "Original"
    for unknown in ("slim_0.9", "slim_1", "Instructions_", "Multitask", ""):
        assert unknown not in set_names()
        with pytest.raises(UserError, match="unknown; choose one of Original, Diverse, 10Type, slim, slim_0.1"):
            load_task(".", "GQA", unknown)


def test_the_file_of_all_tasks_stands_in_for_their_own(tmp_path):
    """Shuffled, as CoIN's is: each task finds its own records in it, and none is lost."""
    root = str(tmp_path)
    write_benchmark(root, seed=0, train_size=20, test_size=4)
    folder, everything = tmp_path / "playground" / "Instructions_Diverse", []
    before = {name: load_task(root, name, "Diverse").train for name in TASKS}
    for task in TASKS.values():
        path = folder / task.folder / "train.json"
        everything += json.loads(path.read_text())
        path.unlink()
    everything = [everything[i] for i in np.random.default_rng(0).permutation(len(everything))]
    write_json(str(folder / "Multitask" / "train.json"), everything)
    for name in TASKS:
        data = load_task(root, name, "Diverse")
        assert data.train_path == str(folder / "Multitask" / "train.json") and len(data.train) == 20
        assert sorted(data.train, key=repr) == sorted(before[name], key=repr) and len(data.questions) == 4
        assert len(load_task(root, name, "Original").train) == 20, "another set, with files of its own"
    write_json(str(folder / "GQA" / "train.json"), TRAIN)
    assert len(load_task(root, "GQA", "Diverse").train) == 1, "a file of its own goes first"
    write_json(str(folder / "Multitask" / "train.json"), [record for record in everything if "GQA" in record.get("image", "")])
    with pytest.raises(UserError, match="Multitask/train.json: the file of all tasks holds no records of this task"):
        _ = load_task(root, "VizWiz", "Diverse").train


@pytest.mark.parametrize(
    ("image", "answer", "task"),
    [
        (None, "A", "ScienceQA"), ("ScienceQA/images/train/1/image.png", "A", "ScienceQA"), ("./GQA/images/1.jpg", "yes", "GQA"),
        ("ImageNet_withlabel/train/n01/n01_1.JPEG", "Hog.", "ImageNet"), ("ImageNet/train/n01/n01_1.JPEG", "Hog.", "ImageNet"),
        ("TextVQA/train_images/f.jpg", "[x]", "TextVQA"), ("VizWiz/train/VizWiz_train_1.jpg", "no", "VizWiz"),
        ("COCO2014/train2014/COCO_train2014_1.jpg", "[0.1, 0.2, 0.3, 0.4]", "Grounding"),
        ("COCO2014/train2014/COCO_train2014_1.jpg", "[0.1, nan, 0.3]", "Grounding"),
        ("COCO2014/train2014/COCO_train2014_1.jpg", "2", "VQAv2"), (".\\OCR-VQA\\images\\1.jpg", "yes", "OCRVQA"),
        ("elsewhere/1.jpg", "yes", "ScienceQA"), (7, "yes", "ScienceQA"),
    ],
)  # fmt: skip
def test_whose_a_record_of_the_file_of_all_tasks_is(image, answer, task):
    record = {"conversations": conversation(("Q", answer))} | ({} if image is None else {"image": image})
    assert task_of(record) == task


BROKEN = (None, [], "x", {"image": "COCO2014/x.jpg"}, {"image": "COCO2014/x.jpg", "conversations": [1, {"from": "gpt"}]})


@pytest.mark.parametrize("record", BROKEN)
def test_a_damaged_record_is_some_tasks(record):
    assert task_of(record) in TASKS


def test_image_folder_alias(tmp_path):
    root = str(tmp_path)
    record = {"image": "ImageNet_withlabel/train/a.JPEG", "conversations": conversation(("Q", "A"))}
    write_json(f"{root}/playground/Instructions_Original/ImageNet/train.json", [record])
    os.makedirs(f"{root}/cl_dataset/ImageNet")
    assert load_task(root, "ImageNet").train[0].image.endswith("cl_dataset/ImageNet/train/a.JPEG")


def test_missing_task_and_set(tmp_path):
    with pytest.raises(UserError, match="no files for task GQA of instruction set Diverse; looked for"):
        load_task(str(tmp_path), "GQA", "Diverse")
    with pytest.raises(UserError, match="config.data.instruction_set=x"):
        load_task(str(tmp_path), "GQA", "x")


def test_auxiliary_files(tmp_path):
    root = str(tmp_path)
    write_json(f"{root}/cl_dataset/ScienceQA/problems.json", {"1": {"answer": 0}})
    with pytest.raises(UserError, match="pid_splits.json: no such file"):
        load_auxiliary(root, "ScienceQA")
    write_json(f"{root}/cl_dataset/ScienceQA/pid_splits.json", {"test": ["1"]})
    assert load_auxiliary(root, "ScienceQA") == {"problems": {"1": {"answer": 0}}, "pid_splits": {"test": ["1"]}}
    assert load_auxiliary(root, "VizWiz") == {}
    write_json(f"{root}/cl_dataset/GQA/testdev_balanced_questions.json", [])
    with pytest.raises(UserError, match="must hold a JSON object"):
        load_auxiliary(root, "GQA")


def test_subset_depends_on_ids_only():
    questions = [Question(str(i), "GQA", None, "q", "a") for i in range(100)]
    chosen = select_subset(questions, 20, seed=0)
    assert len(chosen) == 20 and [int(q.id) for q in chosen] == sorted(int(q.id) for q in chosen)
    assert {q.id for q in select_subset(questions[::-1], 20, seed=0)} == {q.id for q in chosen}
    assert {q.id for q in chosen} < {q.id for q in select_subset(questions, 30, seed=0)}
    assert {q.id for q in select_subset(questions, 20, seed=1)} != {q.id for q in chosen}
    assert select_subset(questions, 0) == select_subset(questions, 500) == questions
    assert len(select_subset(questions[:1] * 10, 4)) == 4
    with pytest.raises(UserError, match="subset size -1"):
        select_subset(questions, -1)
