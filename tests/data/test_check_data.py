"""The check of records, counts, leaks and lengths on real files with real damage, its agreement with training, and the verb."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from importlib import resources

import numpy as np
import pytest
from check_fixtures import check, edit, image_path, json_path, only, pristine, root, set_value  # noqa: F401 (two are fixtures)
from data_fixtures import conversation, save_tokenizer, write_json
from PIL import Image

from proglora_jax import tools
from proglora_jax.data import images
from proglora_jax.data.check import Batching
from proglora_jax.data.check.counts import PUBLISHED, Expected, count_problems, expected_counts
from proglora_jax.data.check.lengths import Sizes
from proglora_jax.data.check.progress import progress
from proglora_jax.data.errors import UserError
from proglora_jax.data.image_cache import ImageCache
from proglora_jax.data.images import MODES, ImageLoader, ImageSpec, load_image
from proglora_jax.data.rows import encode_rows
from proglora_jax.data.schema import TrainRow
from proglora_jax.data.tasks import TASKS, load_task
from proglora_jax.data.templates import get_template
from proglora_jax.data.tokens import Encoder, load_tokenizer
from proglora_jax.evaluation.evaluator import references

SETS = ("Original", "Diverse", "10Type")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(str(tmp_path_factory.mktemp("tokenizer")), style="always")


# ---- the embedded benchmark


def test_the_embedded_benchmark_passes(pristine):
    findings = check(pristine, instruction_sets=SETS)
    assert findings.ok and findings.exit_status("stop") == 0
    assert [(row.instruction_set, row.task) for row in findings.rows] == [(s, task) for s in SETS for task in TASKS]
    assert all((row.train.records, row.questions.records) == (6, 4) for row in findings.rows)
    data = {task: load_task(pristine, task) for task in TASKS}
    named = {record.image for task in data.values() for record in (*task.train, *task.questions)} - {None}
    assert findings.images == len(named)
    assert all(row.train.turns == sum(len(example.turns) for example in data[row.task].train) for row in findings.rows[:8])


def test_what_passes_loads(root, tokenizer):
    """Odd but usable data pass the check, and every reader and encoder of training takes them."""
    turns = conversation(("no placeholder", "a"), ("q", " "), ("unanswered", "x"))
    edit(root, "TextVQA", "train", set_value(0, "conversations", turns[:-1]))
    edit(root, "TextVQA", "train", set_value(1, "image", "././" + os.path.relpath(image_path(root, "TextVQA"), root / "cl_dataset")))
    Image.open(image_path(root, "TextVQA", record=2)).convert("CMYK").save(image_path(root, "TextVQA", record=2), format="TIFF")
    encoder = Encoder(load_tokenizer(tokenizer), get_template("vicuna_v1"), 4, 400)
    assert check(root, "TextVQA", encoder=encoder).ok
    data = load_task(str(root), "TextVQA")
    rows = encode_rows([TrainRow(example, 0, i) for i, example in enumerate(data.train)], encoder, on_unsupervised="raise")
    assert len(rows) == 6 and not rows.counts["truncated"]
    assert not any(item.truncated for item in encoder.encode_questions(data.questions))
    assert len(references("textvqa", data.questions, data.auxiliary)) == 4
    for mode in MODES:
        assert all(load_image(record.image, 16, mode=mode).shape == (16, 16, 3) for record in (*data.train, *data.questions))


def test_reduced_sets_and_the_file_of_all_tasks(root):
    """A problem in the file that tasks share belongs to the row of the task whose record it is; a reduced set has no sizes to keep to."""
    slim = root / "playground" / "Instructions_slim_0.2"
    shutil.copytree(root / "playground" / "Instructions_Original", slim)
    everything = []
    for task in TASKS.values():
        everything += json.loads((slim / task.folder / "train.json").read_text())
        (slim / task.folder / "train.json").unlink()
    broken = next(record for record in everything if record.get("image", "").startswith("VizWiz"))
    broken["conversations"] = []
    everything.append("no record")
    write_json(str(slim / "Multitask" / "train.json"), everything)
    findings = check(root, instruction_sets=("slim_0.2",), counts="published")
    assert findings.counts == {"schema": 2}
    assert {row.task: dict(row.problems) for row in findings.rows if row.problems} == {"VizWiz": {"schema": 1}, "ScienceQA": {"schema": 1}}
    assert [row.train.records for row in findings.rows] == [7] + [6] * 7
    assert check(root, instruction_sets=("Type1",)).ok


def test_workers_change_nothing(root):
    os.remove(image_path(root, "GQA"))
    open(image_path(root, "VQAv2"), "wb").close()
    assert check(root, workers=1).to_dict("stop") == check(root, workers=5).to_dict("stop")


# ---- files and records


def test_files_that_cannot_be_read(root):
    json_path(root, "GQA").write_bytes('[{"id": "caf\xe9"}]'.encode("latin-1"))
    json_path(root, "VizWiz", "test").write_text('[{"question_id": 1, ', encoding="utf-8")
    os.remove(json_path(root, "VQAv2"))
    shutil.rmtree(json_path(root, "ImageNet").parent)
    write_json(str(json_path(root, "TextVQA")), {"not": "a list"})
    write_json(str(root / "cl_dataset/ScienceQA/problems.json"), [])
    os.remove(root / "cl_dataset/ScienceQA/pid_splits.json")
    findings = check(root)
    assert findings.counts == {"file": 7} and all(problem.stops for problem in findings.problems)
    sentences = "\n".join(problem.sentence for problem in findings.problems)
    for words in ("not UTF-8 text", "not valid JSON (line 1", "no such file", "no files for task ImageNet", "must hold a JSON list",
                  "problems.json: must hold a JSON object", "pid_splits.json: no such file"):
        assert words in sentences
    rows = {row.task: row.problems["file"] for row in findings.rows}
    assert rows == {"ScienceQA": 2, "TextVQA": 1, "ImageNet": 1, "GQA": 1, "VizWiz": 1, "Grounding": 0, "VQAv2": 1, "OCRVQA": 0}


@pytest.mark.parametrize(
    "task, split, change, kind, words",
    [
        ("GQA", "train", set_value(2, "image", "../../secret.jpg"), "schema", "image path '../../secret.jpg' leaves the image root"),
        ("GQA", "train", set_value(2, "conversations", []), "schema", "no 'conversations' list"),
        ("GQA", "train", set_value(2, "conversations", conversation(("<image><image> q", "a"))), "schema", "2 '<image>' placeholders"),
        ("GQA", "test", set_value(2, "text", 7), "schema", "no 'text'"),
        ("Grounding", "test", set_value(2, "answer_bbox", "[0.1, NaN, 0.5, 0.5]"), "box", "must be four numbers between 0 and 1"),
        ("Grounding", "test", set_value(2, "answer_bbox", "[0.1, 0.2, 0.5, 40]"), "box", "must be four numbers between 0 and 1"),
        ("Grounding", "train", set_value(2, "conversations", conversation(("<image>\nq", "[0.1, NaN, 0.5, 0.5]"))), "box",
         "answer of turn 0: box '[0.1, NaN, 0.5, 0.5]' must be four numbers between 0 and 1"),
        ("Grounding", "test", set_value(2, "size", [0, 5]), "schema", "'size' must be [width, height] in pixels"),
    ],
)
def test_records_that_training_refuses(root, task, split, change, kind, words):
    path = edit(root, task, split, change)
    findings = check(root, task)
    sentence = only(findings, kind)
    assert sentence.startswith(f"{path}: record 2 (id ") and words in sentence and findings.problems[0].stops == (split == "test")
    data = load_task(str(root), task)
    with pytest.raises(UserError) as error:
        _ = data.train if split == "train" else data.questions
    assert sentence.removeprefix(f"{path}: ") in str(error.value)


def test_boxes_that_are_read_but_wrong(root):
    def swap(records):
        records[1]["answer_bbox"] = "[0.6, 0.2, 0.5, 0.9]"

    def misteach(records):
        records[0]["conversations"][3]["value"] = "[12, 40, 200, 310]"
        records[4]["conversations"][1]["value"] = "[0.5, 0.5, 0.5, 0.7]"

    edit(root, "Grounding", "test", swap)
    edit(root, "Grounding", "train", misteach)
    findings = check(root, "Grounding")
    assert findings.counts == {"box": 3} and not any(problem.stops for problem in findings.problems)
    first, second, third = (problem.sentence for problem in findings.problems)
    assert "record 0" in first and "answer of turn 1: box '[12, 40, 200, 310]' must be four numbers" in first
    assert "record 4" in second and "has no area" in second
    assert "record 1" in third and "no answer can be right" in third
    assert load_task(str(root), "Grounding").questions[1].bbox == (0.6, 0.2, 0.5, 0.9)


def test_questions_that_cannot_be_scored(root):
    edit(root, "ScienceQA", "test", set_value(1, "question_id", "999"))
    edit(root, "VQAv2", "test", set_value(0, "answer", "  "))
    edit(root, "Grounding", "test", lambda records: records[3].pop("answer_bbox"))
    annotations = root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json"
    content = json.loads(annotations.read_text(encoding="utf-8"))
    content["data"][2]["answers"] = content["data"][2]["answers"][:7]
    write_json(str(annotations), content)
    findings = check(root)
    assert findings.counts == {"reference": 4}
    told = {problem.sentence.split("/")[-2]: (problem.sentence, problem.stops) for problem in findings.problems}
    assert "record 1 (id 999): its id is not in problems.json" in told["ScienceQA"][0] and told["ScienceQA"][1]
    assert "7 answers, 10 are needed" in told["TextVQA"][0] and told["TextVQA"][1]
    assert "hold no box of four numbers" in told["Grounding"][0] and told["Grounding"][1]
    assert "record 0" in told["VQAv2"][0] and "has no 'answer'" in told["VQAv2"][0] and told["VQAv2"][1]


def test_auxiliary_files_of_another_form(root):
    write_json(str(root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json"), {"data": ["x"]})
    problems = root / "cl_dataset/ScienceQA/problems.json"
    content = json.loads(problems.read_text(encoding="utf-8"))
    first = json.loads(json_path(root, "ScienceQA", "test").read_text(encoding="utf-8"))[0]["question_id"]
    content[first] = {"answer": 1}
    write_json(str(problems), content)
    findings = check(root)
    assert findings.counts == {"file": 1, "reference": 1}
    assert "textvqa references: the auxiliary files have another form" in findings.problems[1].sentence
    assert "record 0" in findings.problems[0].sentence and "lacks fields" in findings.problems[0].sentence


def test_repairs_are_remarked_on(root):
    def change(records):
        records[0]["question_id"] = records[1]["question_id"]

    edit(root, "VizWiz", "train", set_value(0, "conversations", conversation(("no placeholder", "a"), ("q", " "))))
    edit(root, "VizWiz", "test", change)
    findings = check(root, "VizWiz")
    assert findings.ok
    remarks = "\n".join(f"{count} x {remark}" for (_, remark), (count, _) in findings.notes.items())
    assert "1 x an image but no '<image>' in the first turn (put there)" in remarks
    assert "1 x an empty answer among others" in remarks and "1 x a question id that was there before" in remarks


# ---- counts


def test_counts_against_the_manifest(root):
    path = edit(root, "GQA", "train", lambda records: records.pop())
    findings = check(root)
    assert only(findings, "count").startswith(f"{path}: holds 5 records, but its manifest.json has 6; ")
    assert check(root, counts="any").ok


def test_counts_against_the_published_table(root):
    os.remove(root / "manifest.json")
    findings = check(root)
    # every file but VQAv2's questions, of which only the most is known; ScienceQA's images and ImageNet's classes besides
    assert findings.counts == {"count": 15 + 2 + 1}
    sentences = [problem.sentence for problem in findings.problems]
    assert any("OCRVQA/train.json: holds 6 records, but the published file has 165,000 to 166,000" in s for s in sentences)
    assert any("ImageNet/test.json: has 4 distinct answers, but the published file has 100" in s for s in sentences)
    assert sum("with an image, but the published file has" in s for s in sentences) == 2


def test_count_tables(tmp_path):
    assert set(PUBLISHED) == set(TASKS) and expected_counts(str(tmp_path)) is PUBLISHED
    assert count_problems(PUBLISHED["ScienceQA"][0], 12_726, 6_218, 0) == [] == count_problems(PUBLISHED["VQAv2"][1], 107_394, 107_394, 9)
    assert len(count_problems(Expected(5, 7, with_image=5, answers=2), 8, 4, 3)) == 3
    write_json(str(tmp_path / "manifest.json"), {"benchmark": "coin_mini", "tasks": ["GQA"]})
    assert expected_counts(str(tmp_path)) is PUBLISHED


# ---- leaks


def test_questions_that_training_asks_of_the_same_picture(root):
    questions = json.loads(json_path(root, "VQAv2", "test").read_text(encoding="utf-8"))
    stolen = questions[2]
    copy = root / "cl_dataset/COCO2014/train2014/a_copy_under_another_name.jpg"
    shutil.copy(image_path(root, "VQAv2", "test", 2), copy)

    def leak(records):
        text = stolen["text"].partition("\n")[0]
        records[4] |= {"image": "COCO2014/train2014/a_copy_under_another_name.jpg",
                       "conversations": conversation(("<image>\nAnother question?\nAnswer briefly.", "a"), (text, "b"))}

    edit(root, "VQAv2", "train", leak)
    findings = check(root, "VQAv2")
    sentence = only(findings, "duplicate")
    assert f"record 2 (id {stolen['question_id']})" in sentence and f"{json_path(root, 'VQAv2')} record 4" in sentence
    assert any("a picture that the training file has too" in remark for _, remark in findings.notes)


def test_equal_text_only_questions_are_a_remark(root):
    question = "Same?\nA. x\nB. y"
    edit(root, "ScienceQA", "train", set_value(0, "conversations", conversation((f"{question}\nOne instruction.", "A"))))
    edit(root, "ScienceQA", "test", set_value(0, "text", f"{question}\nAnother instruction."))
    for split in ("train", "test"):
        edit(root, "ScienceQA", split, set_value(0, "image", None))
    findings = check(root, "ScienceQA")
    assert findings.ok
    assert [count for (_, remark), (count, _) in findings.notes.items() if remark.startswith("a text-only question")] == [1]


# ---- lengths


def run(capsys, *arguments):
    """Exit status and printed lines of check-data."""
    status = tools.main(["check-data", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


def test_lengths(root, tokenizer, tmp_path, capsys):
    word = "so very many words "
    edit(root, "VizWiz", "train", set_value(1, "conversations", conversation(("<image>\n" + word * 200, "a"))))
    edit(root, "VizWiz", "train", set_value(2, "conversations", conversation(("<image>\nq", "a"), (word * 200, "b"))))
    edit(root, "VizWiz", "train", set_value(3, "conversations", conversation(("<image>\nq", " "))))
    edit(root, "VizWiz", "test", set_value(0, "text", word * 200))
    report = tmp_path / "report.json"
    status, _ = run(capsys, root, "--tasks", "VizWiz", "--tokenizer", tokenizer, "--image-tokens", 4, "--max-length", 400, "--json", report)
    content = json.loads(report.read_text(encoding="utf-8"))
    assert status == 1 and content["counts"] == {"over_long": 2, "unsupervised": 2}
    told = [(p["kind"], os.path.basename(p["file"]), p["record"]) for p in content["problems"]]
    assert told == [("unsupervised", "train.json", 1), ("over_long", "train.json", 2), ("unsupervised", "train.json", 3),
                    ("over_long", "val.json", 0)]
    assert "no answer left within 400 positions" in content["problems"][0]["sentence"]
    assert "no answer that is not empty" in content["problems"][2]["sentence"]
    (row,) = content["tasks"]
    assert row["train"]["longest"] == row["questions"]["longest"] == 400 and row["train"]["supervised"] > 0


def test_padding_is_that_of_the_batches_that_a_run_would_make():
    """By hand: 10 and 20, 30 and 40 in batches of two."""
    sizes, two = Sizes(), Batching(2, ((20, 5), (40, 5)), (10, 40))
    for length, labels in ((30, 1), (10, 2), (40, 5), (20, 1)):
        sizes.add(length, labels, length > 20)
    assert sizes.mean() == 25 and sizes.training_padding(two, 50, "bucket") == pytest.approx(1 - 100 / (2 * 20 + 2 * 40))
    assert sizes.training_padding(two, 50, "none") in [pytest.approx(1 - 100 / padded) for padded in (2 * 20 + 2 * 40, 2 * 40 + 2 * 40)]
    sizes.add(20, 30, False)  # so many labels fit into the longest bucket alone
    assert sizes.training_padding(Batching(5, two.buckets), 50, "bucket") == pytest.approx(1 - 120 / 250)
    prompts = Sizes()
    for length in (5, 30, 8):
        prompts.add(length, 0, True)
    assert prompts.prompt_padding(two, 50) == pytest.approx(1 - 43 / (2 * 10 + 2 * 40))
    assert prompts.prompt_padding(Batching(64, prompts=(10,)), 50) == pytest.approx(1 - 43 / 150), "longer ones are as long as may be"
    assert Sizes().training_padding(two, 50, "bucket") == 0


def test_padding_is_told_for_every_file(root, tokenizer, tmp_path, capsys):
    arguments = [root, "--tasks", "VizWiz,ScienceQA", "--tokenizer", tokenizer, "--image-tokens", 4, "--max-length", 400]
    lengths, report = [], tmp_path / "report.json"
    for tops in (["--buckets", 100, 200], ["--buckets", *range(1, 400)], ["--buckets", 100, 200, "--batch-rows", 1]):
        status, _ = run(capsys, *arguments, *tops, "--json", report)
        content = json.loads(report.read_text(encoding="utf-8"))
        lengths.append([list(row[part]["padding"].values()) for row in content["tasks"] for part in ("train", "questions")])
        assert status == 0 and " ".join(map(str, tops[1:3])) in content["batching"]
    assert [len(shares) for shares in lengths[0]] == [2, 1, 2, 1]
    wide, exact, alone = ([share for shares in one for share in shares] for one in lengths)
    assert all(0 <= fine < coarse < 100 for fine, coarse in zip(exact, wide)) and all(a <= b for a, b in zip(alone, wide))
    train = content["tasks"][0]["train"]
    assert 0 < train["mean"] <= train["longest"] and alone[0] == pytest.approx(alone[1]), "a row alone is in its own bucket"


def test_prompts_that_never_fit_and_empty_answers_without_a_tokenizer(root, tokenizer, capsys):
    edit(root, "VizWiz", "train", set_value(3, "conversations", conversation(("<image>\nq", " "))))
    assert "record 3" in only(check(root, "VizWiz"), "unsupervised")
    status, lines = run(capsys, root, "--tasks", "VizWiz", "--tokenizer", tokenizer, "--image-tokens", 4, "--max-length", 30)
    assert status == 1 and any(line.startswith("records that cannot be encoded: 4") for line in lines)
    assert sum("the template and image alone need" in line for line in lines) == 4


# ---- the verb


def test_the_verb_reports_and_obeys_the_policy(root, tmp_path, capsys):
    for record in range(4):
        os.remove(image_path(root, "GQA", record=record))
    edit(root, "GQA", "test", set_value(0, "text", ""))
    report = tmp_path / "report.json"
    status, lines = run(capsys, root, "--tasks", "gqa,VizWiz", "--show", 3, "--json", report)
    assert status == 1 and "repair them" in lines[-1] and "5 problem(s)" in lines[-1]
    assert "images that are missing: 4 (a run stops, or goes on with config.data.on_bad_image=blank)" in lines
    assert sum("no such image" in line for line in lines) == 3 and "  and 1 more" in lines
    table = [re.split(r"\s{2,}", line) for line in lines[-4:-1]]
    assert table == [["task", "train", "turns", "questions", "images", "schema", "missing"],
                     ["GQA", "6", "12", "4", "9", "1", "4"], ["VizWiz", "6", "6", "4", "10", "0", "0"]]
    content = json.loads(report.read_text(encoding="utf-8"))
    assert len([p for p in content["problems"] if p["kind"] == "missing_image"]) == 4 and content["exit_status"] == 1

    status, lines = run(capsys, root, "--tasks", "gqa,VizWiz", "--policy", "skip_and_count")
    assert status == 0 and lines[-1].endswith("5 problem(s) counted and accepted; training stops at 1 of them all the same, repair those; "
                                               "a run goes on at the others with config.data.on_bad_image=blank")


def test_the_verb_with_the_embedded_model(pristine, capsys):
    status, lines = run(capsys, pristine, "--instruction-set", "all", "--model", "embedded", "--template", "vicuna_v1_bare",
                        "--max-length", 92)
    assert status == 0 and lines[-1].endswith("no problems") and len(lines) == 27
    assert lines[0].startswith("padding: share of the positions of batches of 64 rows")
    assert lines[0].endswith("padded lengths 92 and of prompts 92")
    assert re.split(r"\s{2,}", lines[1]) == ["set", "task", "train", "turns", "questions", "images", "mean", "longest", "labels", "prompt",
                                            "padding", "by bucket", "of prompts"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "nowhere: no such folder"),
        ([".", "--instruction-set", "Orginal"], "--instruction-set Orginal: unknown"),
        ([".", "--tasks", "GQB"], "task GQB: unknown"),
        ([".", "--workers", "-2"], "--workers -2: must be 1 or more"),
        ([".", "--tokenizer", "nowhere"], "nowhere: no such folder"),
        ([".", "--model", "nowhere"], "nowhere: no such folder"),
        ([".", "--template", "x"], "data.template=x: unknown"),
        ([".", "--batch-rows", "0"], "--batch-rows 0: must be 1 or more"),
        ([".", "--buckets", "704", "640"], "--buckets 704 640: padded lengths must grow"),
    ],
)
def test_mistakes_in_the_arguments(arguments, words, capsys):
    status = tools.main(["check-data", *arguments])
    assert status == 1 and words in capsys.readouterr().err


def test_a_report_that_cannot_be_written(pristine, tmp_path, capsys):
    assert tools.main(["check-data", pristine, "--tasks", "VizWiz", "--json", str(tmp_path / "no" / "report.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


# ---- the folder of prepared images


def test_images_are_put_into_the_folder_as_runs_ask_for_them(root, tmp_path, capsys, monkeypatch):
    """Padded all, cropped too where CoIN's scripts crop; not what is damaged, which every run counts."""
    tasks, folder = ("TextVQA", "GQA", "ImageNet"), tmp_path / "prepared"
    missing, cut = (image_path(root, "GQA", record=record) for record in (0, 1))
    os.remove(missing)
    with open(cut, "rb") as file:
        content = file.read()
    with open(cut, "wb") as file:
        file.write(content[: len(content) // 2])
    arguments = (root, "--tasks", ",".join(tasks), "--model", "embedded", "--template", "vicuna_v1_bare", "--fill-image-cache", folder)
    status, lines = run(capsys, *arguments)
    assert status == 1 and "2 problem(s)" in lines[-1]
    data = {task: load_task(str(root), task) for task in tasks}
    asked = {(record.image, "pad") for task in tasks for record in (*data[task].train, *data[task].questions)}
    asked |= {(record.image, TASKS[task].coin_image_mode) for task in tasks for record in data[task].questions}
    asked = {(path, mode) for path, mode in asked if path not in (None, missing, cut)}
    assert {mode for _, mode in asked} == {"pad", "crop"}
    assert f"  {folder}: {len(asked)} x an image that lies there prepared" in lines
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert len(files) == len(asked)
    assert run(capsys, *arguments) == (status, lines)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == files, "what lies there stays"

    spec = ImageSpec.from_folder(str(resources.files("proglora_jax") / "assets" / "coin_mini_base"))
    expected = {(path, mode): ImageLoader(spec, mode).pixels(path) for path, mode in asked}
    cache = ImageCache(str(folder))
    monkeypatch.setattr(images, "read_rgb", None)
    assert all(np.array_equal(ImageLoader(spec, mode, folder=cache).pixels(path), expected[path, mode]) for path, mode in asked)


def test_a_full_disk_ends_the_filling(pristine, tmp_path, capsys, monkeypatch):
    usage, written = type(shutil.disk_usage(tmp_path)), []

    def left(folder):
        written.append(folder)
        return usage(1 << 40, 0, 1 << 40 if len(written) < 4 else 0)

    monkeypatch.setattr(shutil, "disk_usage", left)
    status, lines = run(capsys, pristine, "--tasks", "VizWiz", "--model", "embedded", "--template", "vicuna_v1_bare", "--workers", 1,
                        "--fill-image-cache", tmp_path / "prepared")
    assert status == 0 and f"  {tmp_path}/prepared: 3 x an image that lies there prepared" in lines
    (said,) = (line for line in lines if "could not be put there" in line)
    assert int(said.split(": ")[1].split()[0]) >= 7 and len(list((tmp_path / "prepared").glob("*/*"))) == 3


@pytest.mark.parametrize("how", ["without a model", "a file in the way"])
def test_a_folder_that_cannot_be_filled(pristine, tmp_path, capsys, how):
    (tmp_path / "file").write_text("")
    model = () if how == "without a model" else ("--model", "embedded")
    assert tools.main(["check-data", pristine, "--fill-image-cache", str(tmp_path / "file"), *model]) == 1
    sentence = f"={tmp_path}/file: cannot be written (File exists)" if model else "goes with --model, which says how images are prepared"
    said = capsys.readouterr().err
    assert said.startswith("error: --fill-image-cache") and sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_terminals_only(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("images", 10, "images") as tick:
        tick(10)
    assert ("images" in stream.getvalue()) == terminal
