"""Writes the embedded benchmark to disk, once and completely, with a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial

import numpy as np
from absl import logging
from PIL import Image

from proglora_jax.data.errors import UserError, disk_errors
from proglora_jax.data.synthetic import layout
from proglora_jax.data.synthetic.ask_shapes import Item
from proglora_jax.data.synthetic.words import named_rng, pick
from proglora_jax.data.templates import instructions, with_instruction

# Raise it whenever the same seed and sizes would give other records or other pixels.
VERSION = 2
MANIFEST = "manifest.json"


def write_benchmark(
    root: str, seed: int = 0, train_size: int = 1600, test_size: int = 200, tasks: Sequence[str] | None = None
) -> dict:
    """Writes the benchmark in CoIN's layout, or finds it already written.

    Everything is built in a folder beside `root` and renamed at the end, so a killed run leaves nothing half done. Item
    i of a split depends on seed, task, split and i only: a larger benchmark contains the smaller one.

    Args:
        root: the data root; holds `playground/` and `cl_dataset/` afterwards.
        seed: seed of every named generator.
        train_size: training records a task.
        test_size: evaluation records a task.
        tasks: task names; all eight if None.

    Returns:
        The manifest: parameters, number of records, sha256 of every JSON file and of the pixels of every split.

    Raises:
        UserError: "<root>: holds another benchmark (train_size=... there, ... asked for); delete the folder or choose another root",
            "<root>: exists and is not a coin_mini benchmark; choose another root",
            "<root>: <what the disk says>; ...",
            "config.data.embedded_train_size=0: sizes must be >= 1" or "config.data.tasks: unknown task(s) ...".
    """
    names = tuple(tasks) if tasks is not None else tuple(layout.TASKS)
    if unknown := [name for name in names if name not in layout.TASKS]:
        raise UserError(f"config.data.tasks: unknown task(s) {', '.join(unknown)}; choose from {', '.join(layout.TASKS)}")
    for field, size in (("train_size", train_size), ("test_size", test_size)):
        if size < 1:
            raise UserError(f"config.data.embedded_{field}={size}: sizes must be >= 1")
    sizes = {"train_size": train_size, "test_size": test_size}
    wanted = {"benchmark": "coin_mini", "version": VERSION, "seed": seed, **sizes, "tasks": list(names)}
    if (found := _existing(root, wanted)) is not None:
        return found
    parent = os.path.dirname(os.path.abspath(root))
    with disk_errors(root, "choose another root", every=True):
        os.makedirs(parent, exist_ok=True)
        partial_root = tempfile.mkdtemp(prefix=f".{os.path.basename(os.path.abspath(root))}.partial.", dir=parent)
    try:
        manifest = wanted | {"records": {}, "files": {}, "pixels": {}}
        for name in names:
            _write_task(partial_root, name, seed, train_size, test_size, manifest)
        _write_json(partial_root, MANIFEST, manifest, None)
        os.chmod(partial_root, 0o755)
        os.rename(partial_root, root)
    except OSError:
        # Another process may have finished the same benchmark first; then its folder is as good.
        if (found := _existing(root, wanted)) is not None:
            return found
        with disk_errors(root, "nothing was kept; make room or choose another root", partial_root):
            raise
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    logging.info("coin_mini: wrote %d tasks x (%d + %d) records to %s", len(names), train_size, test_size, root)
    return manifest


def _existing(root: str, wanted: dict) -> dict | None:
    """The manifest of a complete benchmark with the wanted parameters; None where there is nothing yet."""
    path = os.path.join(root, MANIFEST)
    if not os.path.exists(root) or (os.path.isdir(root) and not os.listdir(root)):
        return None
    if not os.path.isfile(path):
        raise UserError(f"{root}: exists and is not a coin_mini benchmark; choose another root")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        there = {key: manifest[key] for key in wanted}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a coin_mini manifest; delete the folder {root} or choose another root") from error
    different = [f"{key}={there[key]} there, {wanted[key]} asked for" for key in wanted if there[key] != wanted[key]]
    if different:
        raise UserError(f"{root}: holds another benchmark ({'; '.join(different)}); delete the folder or choose another root")
    return manifest


def draw_items(task: str, seed: int, split: str, size: int) -> list[Item]:
    """The items of one split: `split` is `train` or `test`, item i comes from its own named generator."""
    spec = layout.TASKS[task]
    turns = spec.train_turns if split == "train" else 1
    return [spec.draw(named_rng(seed, task, split, i), turns) for i in range(size)]


def _write_task(root: str, task: str, seed: int, train_size: int, test_size: int, manifest: dict) -> None:
    """Writes one task's images, records in three instruction sets, and auxiliary files; fills the manifest."""
    spec = layout.TASKS[task]
    drawn = {"train": draw_items(task, seed, "train", train_size), "test": draw_items(task, seed, "test", test_size)}
    for split, items in drawn.items():
        train = split == "train"
        images = [spec.image(i, train, item) for i, item in enumerate(items)]
        manifest["pixels"][f"{task}/{split}"] = _write_images(root, images, items)
        manifest["records"][f"{task}/{split}"] = len(items)
        record = layout.training_record if train else layout.evaluation_record
        for name, folder in layout.INSTRUCTION_FOLDERS.items():
            choices = instructions(name, task)
            records = []
            for i, (image, item) in enumerate(zip(images, items, strict=True)):
                instruction = pick(named_rng(seed, name, task, split, i), choices)
                records.append(record(task, i, image, item, partial(with_instruction, task=task, instruction=instruction)))
            _write_json(root, f"{folder}/{task}/{'train' if train else spec.split}.json", records, manifest)
    for path, content in layout.auxiliary_files(task, drawn["train"], drawn["test"]).items():
        _write_json(root, f"{layout.IMAGE_FOLDER}/{path}", content, manifest)


def _write_images(root: str, paths: list[str], items: list[Item]) -> str:
    """Writes the pictures and returns the sha256 of their pixels (which, unlike a JPEG's bytes, no library version changes)."""
    digest = hashlib.sha256()
    for path, item in zip(paths, items, strict=True):
        if item.pixels is None:
            continue
        digest.update(np.array(item.pixels.shape, np.int32).tobytes() + item.pixels.tobytes())
        full = os.path.join(root, layout.IMAGE_FOLDER, os.path.normpath(path))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        # Quality 95 without chroma subsampling keeps 8-pixel letters legible.
        options = {"format": "PNG"} if path.endswith(".png") else {"format": "JPEG", "quality": 95, "subsampling": 0}
        Image.fromarray(item.pixels).save(full, **options)
    return digest.hexdigest()


def _write_json(root: str, path: str, content: object, manifest: dict | None) -> None:
    """Writes one JSON file and notes its sha256 in the manifest."""
    data = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    full = os.path.join(root, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "wb") as file:
        file.write(data)
    if manifest is not None:
        manifest["files"][path] = hashlib.sha256(data).hexdigest()
