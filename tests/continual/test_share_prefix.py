"""Whole runs whose questions share images: the shared pass gives the same answers and scores, also killed, resumed, on two processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny_run
from test_processes import Team
from test_resume import FIRST, SECOND, Place, lines
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax.continual import answering
from proglora_jax.data.synthetic.benchmark import write_benchmark

COUNT = 48
FIELDS = {
    "method": "lora", "data__tasks": "TextVQA,ImageNet", "data__embedded_test_size": COUNT, "evaluate__batch_size": 8,
    "evaluate__max_new_tokens": 3,
}  # fmt: skip
OPTIONS = {name: value for name, value in FIELDS.items() if name != "method"}


def draw(root: Path) -> None:
    """The embedded benchmark with three questions of each task, or one, or six, about the same image."""
    write_benchmark(str(root), 0, 20, COUNT)
    for path in [*root.glob("playground/**/test.json"), *root.glob("playground/**/val.json")]:
        records = json.loads(path.read_text())
        images = [record.get("image") for record in records]
        for index, record in enumerate(records):
            if images[index] is not None:
                record["image"] = images[index - index % 3 if index < COUNT // 2 else index if index % 4 else COUNT - 1]
        path.write_text(json.dumps(records))


@pytest.fixture(scope="module")
def plain(here) -> Path:  # noqa: F811
    """The workdir of the run that reads every prompt whole."""
    draw(here.root)
    return here.run("plain", "lora", **OPTIONS, evaluate__share_prefix="off")


class OfHere(Place):
    """Processes that work with the model and the benchmark of the runs in this process."""

    def __init__(self, here: tiny_run.Here):
        self.folder, self.model = here.folder, here.model


def answers(workdir: Path) -> dict[str, tuple[dict, list[dict]]]:
    """{stage and task: (header, answers in the order of the file)}."""
    found = {}
    for path in sorted(workdir.glob("stages/*/answers/*.jsonl")):
        header, *rows = map(json.loads, path.read_text().split("\n")[:-1])
        found[f"{path.parts[-3]}/{path.stem}"] = header, rows
    return found


def same(workdir: Path, plain: Path) -> None:
    """Checks that a run shared what it could, and gave the answers and scores of the other."""
    ours, theirs = answers(workdir), answers(plain)
    assert ours.keys() == theirs.keys() and len(ours) == 3
    for name, (header, rows) in ours.items():
        assert header["shared_prefix"] and not theirs[name][0]["shared_prefix"]
        assert rows == theirs[name][1] and [row["index"] for row in rows] == list(range(COUNT))
    assert tiny_run.outcome(workdir)["scoring"] == tiny_run.outcome(plain)["scoring"]


def forget(workdir: Path, to: Path) -> Path:
    """A copy of a workdir whose stages are trained and have not been asked."""
    shutil.copytree(workdir, to)
    for folder in [*to.glob("stages/*/answers"), *to.glob("stages/*/scores")]:
        shutil.rmtree(folder)
    return to


def test_the_same_answers_by_a_shared_pass_also_where_it_broke_off_in_a_task(here, plain, monkeypatch):  # noqa: F811
    workdir, asked, original = forget(plain, here.folder / "shared"), [], answering._begin

    def counted(session, questions, loader, generate, state, batch, members):
        asked.append("slot" in batch)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return original(session, questions, loader, generate, state, batch, members)

    monkeypatch.setattr(answering, "_begin", counted)
    with pytest.raises(KeyboardInterrupt):
        here.run("shared", "lora", **OPTIONS, evaluate__share_prefix="on")
    partial = next(workdir.glob("stages/*/answers/*.partial.jsonl"))
    assert len(partial.read_text().split("\n")[:-1]) == 1 + 2 * 8, "of the third batch the answers were not read yet"
    here.run("shared", "lora", **OPTIONS, evaluate__share_prefix="on")
    assert all(asked) and len(asked) < 2 * 4 * COUNT // 8
    first = len(asked)
    same(workdir, plain)
    here.run("shared", "lora", **OPTIONS, evaluate__share_prefix="off")
    assert len(asked) == first, "answers do not depend on how the prompts were read"


def test_longer_answers_are_asked_for_again_and_are_the_same_also_where_that_broke_off(here, plain, monkeypatch):  # noqa: F811
    """Room for two tokens at first, where all answers have three: fewer questions are asked again at once, with the cap."""
    workdir, asked, original = forget(plain, here.folder / "longer"), [], answering._begin

    def counted(session, questions, loader, generate, state, batch, members):
        asked.append(len(batch["tokens"]))
        if len(asked) == COUNT // 8 + 3:
            raise KeyboardInterrupt
        return original(session, questions, loader, generate, state, batch, members)

    monkeypatch.setattr(answering, "_begin", counted)
    options = OPTIONS | {"evaluate__share_prefix": "off", "evaluate__first_new_tokens": 2}
    with pytest.raises(KeyboardInterrupt):
        here.run("longer", "lora", **options)
    assert asked == [8] * (COUNT // 8) + [4] * 3
    here.run("longer", "lora", **options)
    assert [rows for _, rows in answers(workdir).values()] == [rows for _, rows in answers(plain).values()]
    assert asked.count(8) == 3 * COUNT // 8 and asked.count(4) == 3 * COUNT // 4 + 2, "one batch was not read, one was not begun"
    here.run("longer", "lora", **options | {"evaluate__first_new_tokens": 0})
    assert tiny_run.outcome(workdir)["scoring"] == tiny_run.outcome(plain)["scoring"]


def test_answers_that_depend_on_the_prompt_never_share_it(here, plain, monkeypatch):  # noqa: F811
    seen, original = [], answering._begin
    monkeypatch.setattr(answering, "_begin", lambda *parts: seen.append("slot" in parts[5]) or original(*parts))
    options = OPTIONS | {"data__tasks": "TextVQA", "train__max_steps": 1}
    here.run("dynamic", "proglora_dynamic", **options, evaluate__share_prefix="auto")
    assert seen and not any(seen)


def test_a_kill_in_the_middle_of_a_task_changes_nothing(tmp_path, here, plain):  # noqa: F811
    place = OfHere(here)
    fields = OPTIONS | {"method": "lora", "evaluate__share_prefix": "on", "mesh__data": 1, "train__batch_size": 4}
    clean = tmp_path / "clean"
    place.finish(clean, **fields)
    workdir, kills = tmp_path / "killed", 0
    for name in (f"{FIRST}/answers/TextVQA", f"{SECOND}/answers/TextVQA", f"{SECOND}/answers/ImageNet"):
        process = place.start(workdir, **fields)
        if process.signal_when(signal.SIGKILL, lines(f"{name}.partial.jsonl", 9)):
            kills += process.wait()[0] == -signal.SIGKILL
    assert kills >= 2
    place.finish(workdir, **fields)
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(clean)) == []
    assert all(header["shared_prefix"] for header, _ in answers(workdir).values())


def test_two_processes_share_as_one_does(tmp_path, here, plain):  # noqa: F811
    place = OfHere(here)
    workdir = forget(plain, tmp_path / "two")
    team = Team(place, workdir, 2, **FIELDS, model__remat="none", evaluate__share_prefix="on", evaluate__first_new_tokens=1,
                train__batch_size=4, train__max_steps=8, run__checkpoint_every_steps=2)  # fmt: skip
    assert team.wait(200) == [0, 0], team.text()
    same(workdir, plain)
