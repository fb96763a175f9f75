"""Another instruction set from the Original files: only the instruction changes; what has none is left and counted, and that is told."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from check_fixtures import check, edit, pristine, root  # noqa: F401 (two are fixtures)

from proglora_jax import tools
from proglora_jax.continual import results
from proglora_jax.data.tasks import TASKS, load_task
from proglora_jax.data.templates import INSTRUCTIONS


@pytest.fixture
def original(root):  # noqa: F811
    """A data root with the Original files alone."""
    for name in ("Diverse", "10Type"):
        shutil.rmtree(root / "playground" / f"Instructions_{name}")
    return root


def make(root, *arguments) -> int:  # noqa: F811
    return tools.main(["make-instructions", str(root), *arguments])


def records(root, name, task, file):  # noqa: F811
    return json.loads((root / "playground" / f"Instructions_{name}" / task / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["Diverse", "10Type"])
def test_only_the_instruction_changes(original, name, capsys):
    assert make(original, "--set", name) == 0
    said = capsys.readouterr().out
    assert "GQA: 6 training records and 4 questions, 0 and 0 of them as they were" in said
    for task, row in TASKS.items():
        words = INSTRUCTIONS[name][task]
        for file in ("train.json", row.eval_file):
            before, after = records(original, "Original", task, file), records(original, name, task, file)
            assert len(before) == len(after) and (before != after or name == "Diverse")
            for old, new in zip(before, after):
                text = new["text"] if "text" in new else new["conversations"][0]["value"]
                lines = text.removeprefix("<image>\n").split("\n")
                assert (lines[0].partition(": ")[0] if task == "Grounding" else lines[-1].removesuffix(".")) in words
                plain = old["text"] if "text" in old else old["conversations"][0]["value"]
                if task != "Grounding":
                    assert text.rpartition("\n")[0] == plain.rpartition("\n")[0] and text.endswith(".")
                else:
                    assert text.partition(": ")[2] == plain.partition(": ")[2]
                assert text.startswith("<image>\n") == plain.startswith("<image>\n")
                for record in (old, new):
                    if "text" in record:
                        record["text"] = ""
                    else:
                        record["conversations"][0]["value"] = ""
                assert old == new, "everything else stays, unknown keys included"
    findings = check(original, instruction_sets=[name])
    assert findings.ok
    assert any("made from Original" in remark and name in where for where, remark in findings.notes)


def test_the_seed_chooses_among_several(original, tmp_path):
    other = shutil.copytree(original, tmp_path / "other")
    third = shutil.copytree(original, tmp_path / "third")
    assert [make(place, "--set", "10Type", *more) for place, more in ((original, ()), (other, ()), (third, ("--seed", "1")))] == [0] * 3
    files = [records(place, "10Type", "VQAv2", "train.json") for place in (original, other, third)]
    assert files[0] == files[1] != files[2]


def test_records_without_a_known_instruction_stay_as_they_are_and_are_counted(original, capsys):
    def change(found):
        found[0]["conversations"][0]["value"] = "<image>\nWhat is it?\nSay it in French."
        found[1]["conversations"][0]["value"] = "<image>\nWhat is it?"

    edit(original, "GQA", "train", change)
    assert make(original, "--set", "Diverse") == 0
    assert "GQA: 6 training records and 4 questions, 2 and 0 of them as they were (no instruction of Original in them)" in (
        capsys.readouterr().out)
    after = records(original, "Diverse", "GQA", "train.json")
    texts = [record["conversations"][0]["value"] for record in after[:2]]
    assert texts == ["<image>\nWhat is it?\nSay it in French.", "<image>\nWhat is it?"]
    data = load_task(str(original), "GQA", "Diverse")
    assert data.made_from == {"from": "Original", "seed": 0, "train": 6, "questions": 4, "train_kept": 2, "questions_kept": 0}
    plain = load_task(str(original), "GQA")
    assert plain.made_from == {}
    told = [results._instruction_set(SimpleNamespace(settings=SimpleNamespace(data=SimpleNamespace(instruction_set="Diverse")),
                                                     data={"GQA": task})) for task in (plain, data)]
    assert told == ["Diverse", "Diverse (made from Original: 8 records and questions re-templated, 2 could not be)"]


def test_mistakes_are_one_sentence(original, tmp_path, capsys):
    edit(original, "GQA", "train", lambda found: [record["conversations"][0].update(value="<image>\nWhy?\nBe brief.") for record in found])
    cases = (
        (("--set", "Type3"), "--set Type3: choose one of Original, Diverse, 10Type"),
        (("--set", "Original"), "--set Original: is what the files are made from"),
        (("--set", "Diverse"), "train.json: none of 6 records has an instruction of Original in it"),
        (("--set", "Diverse", "--from", "10Type"), "no files for task ScienceQA of instruction set 10Type"),
    )
    for arguments, sentence in cases:
        assert make(original, *arguments) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
        assert [path.name for path in (original / "playground").iterdir()] == ["Instructions_Original"]
    assert make(original, "--set", "Diverse", "--tasks", "VQAv2") == 0
    assert make(original, "--set", "Diverse", "--tasks", "VizWiz") == 1
    assert "Instructions_Diverse: is not empty; choose another folder or remove it" in capsys.readouterr().err
