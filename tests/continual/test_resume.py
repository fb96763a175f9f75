"""Runs that are killed, stopped, damaged and started again: the real process, and bit-identical results each time."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import warm_start

ROOT = Path(__file__).parents[2]
FIRST, SECOND, THIRD = "stages/00_textvqa", "stages/01_imagenet", "stages/02_ocrvqa"


class Place:
    """Where the processes of this file work: one model, one benchmark, one compile cache."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = tiny_run.save_model(folder / "model")

    def start(self, workdir: Path, devices: int = 1, afresh: bool = False, **fields) -> Process:
        """Starts the run in a workdir, or goes on with it; `afresh` in a new interpreter, as a user does."""
        fields = {"train__batch_size": 8, "run__compilation_cache": tiny_run.compiled(), "mesh__data": -1} | fields
        flags = [*tiny_run.flags(self.model, self.folder / "data", **fields), f"--workdir={workdir}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": tiny_run.xla_flags(devices)}
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"  # as in a user's run, but for the flags of conftest.py
        return Process(flags, environment, workdir, afresh)

    def finish(self, workdir: Path, **fields) -> str:
        """Runs to the end, which must be a good one; returns what was printed."""
        code, text = self.start(workdir, **fields).wait()
        assert code == 0, text
        return text


class Process:
    """A run in a process of its own, which can be watched through its workdir."""

    def __init__(self, flags: list[str], environment: dict[str, str], workdir: Path, afresh: bool):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.workdir, self.log = workdir, workdir.parent / f"{workdir.name}.log"
        if not afresh:
            self.popen = warm_start.start(flags, environment, self.log, workdir.parent)
            return
        with open(self.log, "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "proglora_jax.main", *flags]
            self.popen = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=workdir.parent)

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        """(exit code, what was printed)."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        return code, self.log.read_text(encoding="utf-8")

    def signal_when(self, number: int, event: Callable[[Path], bool], delay: float = 0.0) -> bool:
        """Sends a signal `delay` seconds after an event in the workdir; False if the run ended before."""
        end = time.monotonic() + 300
        while not event(self.workdir):
            if self.popen.poll() is not None:
                return False
            assert time.monotonic() < end, self.log.read_text(encoding="utf-8")
            time.sleep(0.002)
        time.sleep(delay)
        self.popen.send_signal(number)
        return True


def seen(*patterns: str) -> Callable[[Path], bool]:
    """The event that a file or folder of one of these names is there."""
    return lambda workdir: any(next(workdir.glob(pattern), None) for pattern in patterns)


def lines(name: str, count: int) -> Callable[[Path], bool]:
    """The event that a file has so many lines."""
    return lambda workdir: (workdir / name).exists() and (workdir / name).read_bytes().count(b"\n") >= count


def step(stage: int, number: int) -> Callable[[Path], bool]:
    """The event that a step of a stage is in the record."""
    return lambda workdir: any(entry["stage"] == stage and entry["step"] >= number for entry in steps(workdir))


def steps(workdir: Path) -> list[dict]:
    """The recorded training steps."""
    record = workdir / "metrics.jsonl"
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    entries = [json.loads(line) for line in text.split("\n")[:-1]]
    return [entry for entry in entries if entry["kind"] == "step"]


def losses(workdir: Path) -> list[tuple[int, int, float]]:
    """(stage, step, loss) of the record."""
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in steps(workdir)]


def listing(workdir: Path) -> list[str]:
    """All files of a workdir, but for what Orbax names by process or time."""
    files = [str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()]
    return sorted(re.sub(r"/(d|ocdbt\.process_\d+/d)/[0-9a-f]+$", r"/\1/...", name) for name in files)


def flip(path: Path, position: float = 0.5) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    """The largest file below a folder."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def copy(workdir: Path, to: Path) -> Path:
    """A copy of a workdir that belongs to the same run."""
    shutil.copytree(workdir, to)
    return to


def same(workdir: Path, clean: Path) -> None:
    """Checks that a run left what the uninterrupted one left: every bit that is computed, every file, every step once."""
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(clean)) == []
    assert losses(workdir) == losses(clean)
    assert sorted(set(listing(workdir))) == sorted(set(listing(clean)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """One place for all tests of this file."""
    return Place(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def clean(place) -> Path:
    """The workdir of the uninterrupted run."""
    workdir = place.folder / "clean"
    place.finish(workdir, afresh=True)
    assert len(losses(workdir)) == 24
    return workdir


# The moments at which the run is killed, in their order: an event, and for some a random time after it.
KILLS = [
    ("starting", seen(".lock"), 2.0),
    ("saving the first progress", seen(f"{FIRST}/progress/*.tmp-*", f"{FIRST}/progress/train_0000002"), 0.0),
    ("between two steps", step(0, 3), 0.1),
    ("right after a save", seen(f"{FIRST}/progress/train_0000004"), 0.0),
    ("saving the stage", seen(f"{FIRST}/adapter.tmp-*", f"{FIRST}/adapter"), 0.0),
    ("right after the stage is saved", seen(f"{FIRST}/adapter"), 0.0),
    ("with the first answers", lines(f"{FIRST}/answers/TextVQA.partial.jsonl", 2), 0.0),
    ("between two stages", seen(f"{FIRST}/scores/TextVQA.json"), 0.4),
    ("saving a progress that pushes an old one out", seen(f"{SECOND}/progress/train_0000006*"), 0.05),
    ("inside the save of the second stage", seen(f"{SECOND}/adapter.tmp-*", f"{SECOND}/adapter"), 0.2),
    ("evaluating an old task", lines(f"{SECOND}/answers/TextVQA.partial.jsonl", 1), 0.05),
    ("writing scores", seen(f"{SECOND}/scores/.*.tmp-*", f"{SECOND}/scores/TextVQA.json"), 0.0),
    ("evaluating the new task", seen(f"{SECOND}/answers/ImageNet*"), 0.1),
    ("in the last stage", step(2, 1), 0.3),
    ("saving late", seen(f"{THIRD}/progress/train_0000006.tmp-*", f"{THIRD}/progress/train_0000006"), 0.1),
    ("with the last stage saved", seen(f"{THIRD}/adapter"), 0.1),
    ("at the last task", lines(f"{THIRD}/answers/OCRVQA.partial.jsonl", 1), 0.02),
    ("writing the report", seen("report.md", "report_*.png"), 0.0),
]  # fmt: skip


def test_kills_at_any_moment_change_no_bit(place, clean):
    rng = random.Random(0)
    workdir, delivered, stages = place.folder / "killed" / "run", 0, set()
    for name, event, spread in KILLS:
        process = place.start(workdir)
        if process.signal_when(signal.SIGKILL, event, rng.uniform(0, spread)):
            code, text = process.wait()
            assert code in (-signal.SIGKILL, 0), f"{name}: {text}"
            delivered += code == -signal.SIGKILL
            stages.add(len(list(workdir.glob("stages/*"))))
    assert delivered >= 12 and stages >= {1, 2, 3}
    assert "Traceback" not in place.finish(workdir)
    same(workdir, clean)


def test_stopped_and_damaged_on_the_way(place, clean):
    workdir = place.folder / "stopped" / "run"
    process = place.start(workdir)
    assert process.signal_when(signal.SIGTERM, seen("config.json"), 0.05)  # before the model is loaded
    code, text = process.wait()
    assert code == 0 and "run the same command to go on" in text and "Traceback" not in text

    process = place.start(workdir)
    assert process.signal_when(signal.SIGTERM, step(1, 4))
    code, text = process.wait()
    assert code == 0 and "the progress is saved; run the same command to go on" in text and "Traceback" not in text

    newest, older = sorted((workdir / SECOND / "progress").iterdir(), reverse=True)[:2]
    damaged = largest(newest)
    flip(damaged)
    process = place.start(workdir)
    assert process.signal_when(signal.SIGTERM, lines(f"{SECOND}/answers/ImageNet.partial.jsonl", 2))
    code, text = process.wait()
    assert code == 0 and "while evaluating ImageNet" in text and "the answers are kept" in text
    assert f"Progress {newest.name} is skipped: {damaged.relative_to(newest)} was changed after it was written" in text
    assert f"resumed after step {int(older.name[-7:])} of phase train" in text

    partial = workdir / SECOND / "answers" / "ImageNet.partial.jsonl"
    kept = partial.read_bytes()
    assert kept.count(b"\n") >= 3
    partial.write_bytes(kept[:-7])  # as if the power had gone while the last line was written
    text = place.finish(workdir)
    assert "step 8/8" in text and "stage 2/3 ImageNet train" not in text
    same(workdir, clean)


def test_damage_in_a_finished_run_is_mended_and_nothing_else_is_done_again(place, clean):
    workdir = copy(clean, place.folder / "damaged")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    flip(largest(workdir / SECOND / "adapter" / "adapter"))
    flip(workdir / FIRST / "scores" / "TextVQA.json")
    flip(workdir / THIRD / "answers" / "TextVQA.jsonl")
    (workdir / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text()[:-9])
    text = place.finish(workdir)
    assert "Stage ImageNet is trained again: adapter/" in text and "was changed after it was written" in text
    assert "stage 2/3 ImageNet train step 8/8" in text and "stage 1/3" not in text and "stage 3/3" not in text
    assert re.findall(r"evaluate (\w+): 6 of 6", text) == ["TextVQA"]  # the damaged answers; the scores come from intact ones
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(clean)) == []
    assert sorted(losses(workdir)) == losses(clean)
    rewritten = {str(path.relative_to(workdir)) for path, when in before.items() if not path.exists() or path.stat().st_mtime_ns != when}
    allowed = (f"{SECOND}/adapter/", f"{FIRST}/scores/", f"{THIRD}/answers/TextVQA", f"{THIRD}/scores/TextVQA")
    allowed += ("report", "results", "metrics")
    assert [name for name in rewritten if not name.startswith(allowed) and name != ".lock"] == []


def test_a_finished_run_only_writes_its_report_again(place, clean):
    workdir = copy(clean, place.folder / "finished")
    record = (workdir / "metrics.jsonl").read_bytes()
    for name in ("report.md", "report.html", "results.json"):
        (workdir / name).unlink()
    text = place.finish(workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == record
    assert "train step" not in text and "6 of 6" not in text
    assert (workdir / "report.md").read_text() == (clean / "report.md").read_text()
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(clean)) == []


def test_a_workdir_has_one_process(place, clean):
    with open(clean / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, text = place.start(clean).wait()
    assert code == 1
    assert text == f"error: --workdir={clean}: another process is using it; wait for it or choose another folder\n"


def test_two_devices_go_on_with_what_one_began(place, clean):
    """Eight do in test_processes.py."""
    workdir = copy(clean, place.folder / "two")
    shutil.rmtree(workdir / THIRD)
    text = place.finish(workdir, devices=2)
    assert "2 device(s)" in text and "stage 2/3" not in text and "stage 3/3 OCRVQA train step 8/8" in text
    ours, theirs = tiny_run.outcome(workdir), tiny_run.outcome(clean)
    changed = tiny_run.differences(ours, theirs)
    assert [name for name in changed if not name.startswith(("02_ocrvqa", "gates"))] == []
    np.testing.assert_allclose([x[2] for x in losses(workdir)], [x[2] for x in losses(clean)], rtol=1e-5)
    for name in [name for name in changed if isinstance(ours[name], np.ndarray)]:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
