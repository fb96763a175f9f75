"""Images in whose place a blank one stood are counted, each once, whatever stops the run and whichever process reads them."""

from __future__ import annotations

import json
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax.continual import blank_images
from proglora_jax.continual.blank_images import BlankRows, odd_questions
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.training.log import RunLogger
from proglora_jax.training.loop import Stopped

SETS = "playground/Instructions_Original"
# 20 records, 4 a step: all are trained on within five of the eight steps.
FIELDS = {"data__benchmark": "coin", "data__tasks": "TextVQA", "data__on_bad_image": "blank"}


def edited(path, change) -> list[dict]:
    """The records of a file after a change."""
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    return records


@pytest.fixture(scope="module")
def damaged(here):  # noqa: F811
    """A benchmark of which four training images are broken or gone (one is named by two records), and those of two questions."""
    write_benchmark(str(here.root), 0, 20, 6)
    root = here.folder / "damaged"
    shutil.copytree(here.root, root)
    images = root / "cl_dataset"
    train = edited(root / SETS / "TextVQA" / "train.json", lambda records: records[1].update(image=records[0]["image"]))
    for number in (0, 6, 11):
        (images / train[number]["image"]).write_bytes(b"no image")
    (images / train[17]["image"]).unlink()
    asked = json.loads((root / SETS / "TextVQA" / "val.json").read_text())
    for number in (1, 4):
        (images / asked[number]["image"]).unlink()
    return root


def told(workdir) -> tuple[list, list]:
    """What results.json says of training and of the questions."""
    results = json.loads((workdir / "results.json").read_text())
    return [stage["blank_images"] for stage in results["data"]], results["blank_images"]


def test_training_and_questions_are_counted_and_told(here, damaged, caplog):  # noqa: F811
    workdir = here.run("whole", "lora", data__root=str(damaged), **FIELDS)
    assert told(workdir) == ([4], [{"TextVQA": 2}])
    assert len(re.findall(r"A blank image stands in \(number", caplog.text)) == 6
    text = (workdir / "report.md").read_text()
    assert "unreadable images, blank" in text and re.search(r"\| 1 TextVQA +\| +20 +\| +4 +\|", text)
    assert re.search(r"\| 1 TextVQA +\| +TextVQA +\| +2 +\|", text)
    (stage,) = tiny_run.stage_folders(workdir)
    lines = [json.loads(line) for line in (stage / "answers" / "TextVQA.jsonl").read_text().splitlines()][1:]
    assert [line["index"] for line in lines if "blank" in line] == [1, 4]


def test_cut_off_images_are_counted_and_told(here, tmp_path, caplog):  # noqa: F811
    write_benchmark(str(here.root), 0, 20, 6)
    root = tmp_path / "cut"
    shutil.copytree(here.root, root)
    train = json.loads((root / SETS / "TextVQA" / "train.json").read_text())
    asked = json.loads((root / SETS / "TextVQA" / "val.json").read_text())
    for record in (train[0], train[6], train[11], asked[4]):
        path = root / "cl_dataset" / record["image"]
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    workdir = here.run("cut", "lora", data__root=str(root), **FIELDS)
    results = json.loads((workdir / "results.json").read_text())
    assert [stage["cut_images"] for stage in results["data"]] == [3] and results["cut_images"] == [{"TextVQA": 1}]
    assert told(workdir) == ([0], [{}])
    assert len(re.findall(r"is cut off or damaged \(", caplog.text)) == 4
    text = (workdir / "report.md").read_text()
    assert "cut off, as far as they go" in text and re.search(r"\| 1 TextVQA +\| +TextVQA +\| +1 +\|", text)
    (stage,) = tiny_run.stage_folders(workdir)
    lines = [json.loads(line) for line in (stage / "answers" / "TextVQA.jsonl").read_text().splitlines()][1:]
    assert [line["index"] for line in lines if "cut" in line] == [4]


def test_a_run_without_bad_images_says_none(here):  # noqa: F811
    workdir = here.run("sound", "lora", **FIELDS)
    assert told(workdir) == ([0], [{}]) and "blank" not in (workdir / "report.md").read_text()


def test_a_stop_in_training_and_one_among_the_questions_lose_none(here, damaged, monkeypatch):  # noqa: F811
    """The process that goes on reads only some of the images again."""
    step = RunLogger.step

    def stop(self, number, *rest, **more):
        step(self, number, *rest, **more)
        if number == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "step", stop)
        with pytest.raises(Stopped):
            here.run("stopped", "lora", data__root=str(damaged), **FIELDS)
    workdir = here.run("stopped", "lora", data__root=str(damaged), **FIELDS)
    assert told(workdir) == ([4], [{"TextVQA": 2}])
    # the answers as a process that was killed behind the first batches leaves them, and a mended image
    (stage,) = tiny_run.stage_folders(workdir)
    answers = stage / "answers" / "TextVQA.jsonl"
    answers.with_suffix(".partial.jsonl").write_text("".join(answers.read_text().splitlines(keepends=True)[:5]))
    answers.unlink()
    (stage / "scores" / "TextVQA.json").unlink()
    (workdir / "results.json").unlink()
    here.run("stopped", "lora", data__root=str(damaged), **FIELDS)
    assert told(workdir) == ([4], [{"TextVQA": 2}])


def rows(*images):
    """Rows as far as they are looked at."""
    made = tuple(SimpleNamespace(example=SimpleNamespace(image=image)) for image in images)
    return type("Rows", (), {"rows": made, "__len__": lambda self: len(made)})()


def test_only_rows_of_the_batches_count_and_each_image_once():
    loader = SimpleNamespace(bad={"a", "c", "elsewhere"}, on_bad="blank")
    blank = BlankRows(rows("a", "a", "b", "c", None, "d"), np.array([[0, 1], [2, 4], [0, 5]]), loader)
    assert blank.numbers() == [0, 1] and blank.images() == {"a"}, "the third bad one is in no batch"
    blank.restore([5])
    assert blank.numbers() == [0, 1, 5] and blank.images() == {"a", "d"}
    assert odd_questions(["a", "b", None, "elsewhere"], loader, "blank") == [True, False, False, True]


def test_what_was_blank_stays_counted_when_bad_images_are_an_error_again():
    blank = BlankRows(rows("a", "b"), np.arange(2), SimpleNamespace(bad=set(), on_bad="raise"))
    blank.restore([1])
    assert blank.images() == {"b"}


def test_what_another_process_read_counts(monkeypatch):
    monkeypatch.setattr(blank_images, "in_any_process", lambda mine: mine | np.array([False, False, True]))
    loader = SimpleNamespace(bad={"a"}, on_bad="blank")
    assert BlankRows(rows("a", "b", "c"), np.arange(3), loader).images() == {"a", "c"}
    cut = SimpleNamespace(bad=set(), cut={"b"}, on_bad="raise")
    assert BlankRows(rows("a", "b", "c"), np.arange(3), cut, "cut").images() == {"b", "c"}
    assert odd_questions(["a", "b", "c"], loader, "blank") == [True, False, True]
