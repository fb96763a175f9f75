"""The task table and the loader of data folders."""

from __future__ import annotations

import os

import pytest
from data_fixtures import conversation, write_json

from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Question
from proglora_jax.data.tasks import ORDERS, TASKS, get_task, load_auxiliary, load_task, select_subset, task_order

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
