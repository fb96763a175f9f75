"""Where CoIN keeps things and what its files look like: image paths, training and evaluation records, auxiliary files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from proglora_jax.data.synthetic import ask_shapes, ask_text, ask_things
from proglora_jax.data.synthetic.ask_shapes import Item

INSTRUCTION_FOLDERS: Mapping[str, str] = {name: f"playground/Instructions_{name}" for name in ("Original", "Diverse", "10Type")}
IMAGE_FOLDER = "cl_dataset"


@dataclass(frozen=True)
class Task:
    """One task of the embedded benchmark.

    Attributes:
        draw: (generator, number of turns) -> item.
        train_turns: turns of a training record (evaluation records have one).
        split: name of the evaluation file, `test` or `val`.
        image: (index, is it a training image, item) -> path below the image folder.
    """

    draw: Callable[[np.random.Generator, int], Item]
    train_turns: int
    split: str
    image: Callable[[int, bool, Item], str]


def _hex(index: int, train: bool) -> str:
    """Sixteen hexadecimal digits that look like an Open Images id."""
    return hashlib.sha256(f"{'train' if train else 'val'} {index}".encode()).hexdigest()[:16]


def science_id(index: int, train: bool) -> str:
    """ScienceQA's problem id: one numbering for both splits."""
    return str(index + 1 if train else 1_000_001 + index)


def _imagenet(index: int, train: bool, item: Item) -> str:
    wnid = f"n{item.extra['class'] + 1:08d}"
    return "ImageNet_withlabel/" + (f"train/{wnid}/{wnid}_{index}.JPEG" if train else f"val/ILSVRC2012_val_{index + 1:08d}.JPEG")


TASKS: Mapping[str, Task] = {
    "ScienceQA": Task(ask_things.scienceqa, 1, "test",
                      lambda i, train, _: f"ScienceQA/images/{'train' if train else 'test'}/{science_id(i, train)}/image.png"),
    "TextVQA": Task(ask_text.textvqa, 1, "val", lambda i, train, _: f"TextVQA/train_images/{_hex(i, train)}.jpg"),
    "ImageNet": Task(ask_things.imagenet, 1, "test", _imagenet),
    "GQA": Task(ask_shapes.gqa, 2, "test", lambda i, train, _: f"./GQA/images/{2_300_000 + i if train else f'n{100_000 + i}'}.jpg"),
    "VizWiz": Task(ask_text.vizwiz, 1, "val",
                   lambda i, train, _: "VizWiz/{0}/VizWiz_{0}_{1:08d}.jpg".format("train" if train else "val", i)),
    # Training and test expressions both live in train2014, as in RefCOCO; numbers keep them and VQAv2's pictures apart.
    "Grounding": Task(ask_shapes.grounding, 2, "test",
                      lambda i, train, _: f"COCO2014/train2014/COCO_train2014_{(100_000 if train else 200_000) + i:012d}.jpg"),
    "VQAv2": Task(ask_shapes.vqav2, 2, "val",
                  lambda i, train, _: "COCO2014/{0}2014/COCO_{0}2014_{1:012d}.jpg".format("train" if train else "val", 300_000 + i)),
    "OCRVQA": Task(ask_text.ocrvqa, 2, "test", lambda i, train, _: f"OCR-VQA/images/{(1_500_000_000 if train else 1_600_000_000) + i}.jpg"),
}


def question_id(task: str, index: int, train: bool, image: str) -> str:
    """The id of a record, in the form that the real files use."""
    if task == "ScienceQA":
        return science_id(index, train)
    if task in ("TextVQA", "ImageNet") and not train:
        name = image.rsplit("/", 1)[1]
        return name.rsplit(".", 1)[0] if task == "TextVQA" else name
    return str((10_000_000 if train else 20_000_000) + index)


def training_record(task: str, index: int, image: str, item: Item, instruct: Callable[[str], str]) -> dict:
    """One record of `train.json`.

    Args:
        task: task name.
        index: position in the file.
        image: path below the image folder (unused for a text-only item).
        item: what was drawn.
        instruct: puts the instruction to a question; only the first turn carries it.

    Returns:
        `{"id", "image", "conversations"}`, without `image` for a text-only item.
    """
    conversations = []
    for turn, (question, answer) in enumerate(item.turns):
        placeholder = "<image>\n" if turn == 0 and item.pixels is not None else ""
        conversations.append({"from": "human", "value": placeholder + (instruct(question) if turn == 0 else question)})
        conversations.append({"from": "gpt", "value": answer + ("." if task == "ImageNet" else "")})
    record = {"id": question_id(task, index, True, image), "image": image, "conversations": conversations}
    return record if item.pixels is not None else {k: v for k, v in record.items() if k != "image"}


def evaluation_record(task: str, index: int, image: str, item: Item, instruct: Callable[[str], str]) -> dict:
    """One record of `test.json` or `val.json`; arguments as in `training_record`."""
    (question, answer), *_ = item.turns
    record = {"question_id": question_id(task, index, False, image)}
    if item.pixels is not None:
        record["image"] = image
    record["text"] = instruct(question)
    if task == "Grounding":
        return record | {"answer_bbox": answer, "origin_answer_bbox": item.extra["origin"], "size": item.extra["size"]}
    return record | {"answer": answer}


def auxiliary_files(task: str, train: list[Item], test: list[Item]) -> dict[str, object]:
    """The files that CoIN's evaluators read beside the records.

    Args:
        task: task name.
        train: training items in order.
        test: evaluation items in order.

    Returns:
        {path below the image folder: JSON content}; empty for most tasks.
    """
    if task == "ScienceQA":
        problems = {science_id(i, True): _problem(item, "train") for i, item in enumerate(train)}
        problems |= {science_id(i, False): _problem(item, "test") for i, item in enumerate(test)}
        splits = {name: [k for k, v in problems.items() if v["split"] == name] for name in ("train", "test")}
        return {"ScienceQA/problems.json": problems, "ScienceQA/pid_splits.json": splits | {"val": []}}
    if task == "TextVQA":
        data = [
            {"question_id": 34_602 + i, "image_id": _hex(i, False), "question": item.turns[0][0], "answers": item.extra["answers"]}
            for i, item in enumerate(test)
        ]
        head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        return {"TextVQA/TextVQA_0.5.1_val.json": head | {"data": data}}
    if task == "GQA":
        questions = {
            question_id("GQA", i, False, ""): {
                "question": item.turns[0][0], "answer": item.turns[0][1], "imageId": f"n{100_000 + i}", "isBalanced": True,
                "types": {"structural": "verify" if item.turns[0][1] in ("yes", "no") else "query", "semantic": "rel"},
            }
            for i, item in enumerate(test)
        }
        return {"GQA/testdev_balanced_questions.json": questions}
    return {}


def _problem(item: Item, split: str) -> dict:
    """One entry of ScienceQA's problems.json."""
    return {
        "question": item.extra["question"], "choices": item.extra["choices"], "answer": item.extra["answer"], "hint": "",
        "image": "image.png" if item.pixels is not None else None, "task": "closed choice", "split": split,
    }
