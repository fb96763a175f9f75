"""A small benchmark to damage, and helpers that read and alter its files."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from proglora_jax.data.check import check_data
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import TASKS
from proglora_jax.evaluation.evaluator import reference_problems


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("benchmark") / "data")
    write_benchmark(root, seed=0, train_size=6, test_size=4)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def json_path(root, task, split="train", instruction_set="Original"):
    """A task's training or evaluation file."""
    file = "train.json" if split == "train" else TASKS[task].eval_file
    return root / "playground" / f"Instructions_{instruction_set}" / task / file


def edit(root, task, split, change, instruction_set="Original"):
    """Lets `change` alter the list of records of a file."""
    path = json_path(root, task, split, instruction_set)
    records = json.loads(path.read_text(encoding="utf-8"))
    change(records)
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def set_value(record, key, value):
    """A change for `edit`."""

    def change(records):
        records[record][key] = value

    return change


def image_path(root, task, split="train", record=0):
    """The file of a record's image."""
    records = json.loads(json_path(root, task, split).read_text(encoding="utf-8"))
    return os.path.normpath(os.path.join(root, "cl_dataset", records[record]["image"]))


def check(root, task=None, **options):
    """The findings; every problem must be one line for people that names its file."""
    options.setdefault("references", reference_problems)
    findings = check_data(str(root), [task] if task else "coin", **options)
    for problem in findings.problems:
        assert "\n" not in problem.sentence and problem.file in problem.sentence, problem.sentence
        assert not re.search(r"Traceback|Error\(|<class|NoneType", problem.sentence), problem.sentence
    return findings


def only(findings, kind, count=1):
    """The sentence of the first problem, where all are of one kind."""
    assert findings.counts == {kind: count}, [problem.sentence for problem in findings.problems]
    return findings.problems[0].sentence
