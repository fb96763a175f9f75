"""The record has no duplicates after a resume, the console says how fast and how long, and a missing TensorBoard is one warning."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from proglora_jax.training import log
from proglora_jax.training.console import (
    ParameterRow,
    Progress,
    format_bytes,
    format_seconds,
    parameter_table,
)
from proglora_jax.training.log import RunLogger


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What goes to the console."""
    printed: list[str] = []
    monkeypatch.setattr(logging, "info", lambda form, *args: printed.append(form % args))
    return printed


def read(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run_phase(logger: RunLogger, stage: int, phase: str, first: int, last: int) -> None:
    logger.start_phase(stage=stage, stages=3, task=f"t{stage}", phase=phase, steps=4, first_step=first)
    for step in range(first + 1, last + 1):
        logger.step(step, {"loss": 10 * stage + step})


def test_lines_are_self_contained_and_numbers_are_right(tmp_path, lines):
    clock = Clock()
    with RunLogger(tmp_path / "run", 10, tensorboard=False, clock=clock) as logger:
        logger.start_phase(stage=2, stages=8, task="GQA", phase="train", steps=200, steps_after=1000)
        clock.now += 30  # compile and 10 steps
        logger.step(10, {"loss": np.float32(2.5), "lr": 2.1e-4, "grad_norm": 0.5}, tokens=3000)
        clock.now += 20
        logger.step(20, {"lr": 2e-4, "loss": 1.25, "extra": 3}, tokens=4000, memory_peak=3 * 2**30)
        logger.event("note", text="é", value=np.arange(2))
    first, second, note = read(tmp_path / "run")
    assert {k: first[k] for k in ("kind", "stage", "task", "phase", "step", "steps", "loss")} == {
        "kind": "step", "stage": 2, "task": "GQA", "phase": "train", "step": 10, "steps": 200, "loss": 2.5,
    }  # fmt: skip
    assert first["seconds_per_step"] == 3.0 and first["tokens_per_second"] == 100.0 and first["time"] > 1e9
    assert second["seconds_per_step"] == 2.0 and second["memory_peak_bytes"] == 3 * 2**30
    assert note["text"] == "é" and note["value"] == [0, 1] and note["stage"] == 2
    assert lines[0] == "=== stage 3/8 GQA: train, 200 steps ==="
    assert lines[1].startswith("stage 3/8 GQA train step 10/200  loss 2.5  lr 2.10e-04  grad norm 0.5  100 tokens/s  3 s/step  left: ")
    # 180 steps at 2 s: the interval with the compile no longer counts; 1000 more steps after the stage
    assert lines[2] == (
        "stage 3/8 GQA train step 20/200  loss 1.25  lr 2.00e-04  extra 3  200 tokens/s  2 s/step  "
        "left: stage 6m00s, run 39m20s of training  memory peak 3.00 GiB"
    )


def test_due_every_so_many_steps_and_at_the_end(tmp_path):
    logger = RunLogger(tmp_path, 10, tensorboard=False)
    logger.start_phase(stage=0, stages=1, task="t", phase="train", steps=25)
    assert [step for step in range(1, 26) if logger.due(step)] == [10, 20, 25]
    logger.close()


@pytest.mark.parametrize("killed_mid_line", [False, True])
def test_a_resumed_run_records_every_step_once(tmp_path, killed_mid_line):
    with RunLogger(tmp_path, 1, tensorboard=False) as logger:
        logger.event("config", seed=1)
        run_phase(logger, 0, "train", 0, 4)
        run_phase(logger, 1, "probe", 0, 4)
        run_phase(logger, 1, "train", 0, 3)
    if killed_mid_line:
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"kind": "step", "stage": 1, "pha')
    with RunLogger(tmp_path, 1, tensorboard=False, resumed=True) as logger:
        assert logger.rewind(1, "train", 2) == 1 + killed_mid_line
        run_phase(logger, 1, "train", 2, 4)
        logger.start_phase(stage=1, stages=3, task="t1", phase="evaluate", steps=1)
        logger.event("accuracy", task="t0", value=0.5)
        run_phase(logger, 2, "probe", 0, 4)
    with RunLogger(tmp_path, 1, tensorboard=False, resumed=True) as logger:
        assert logger.rewind(2, "probe", 4) == 0
        assert logger.rewind(2, "probe", 0) == 4
    entries = read(tmp_path)
    steps = [(e["stage"], e["phase"], e["step"]) for e in entries if e["kind"] == "step"]
    assert steps == [(s, p, n) for s, p in [(0, "train"), (1, "probe"), (1, "train")] for n in (1, 2, 3, 4)]
    assert [e["kind"] for e in entries if e["kind"] != "step"] == ["config", "accuracy"]
    with RunLogger(tmp_path, 1, tensorboard=False, resumed=True) as logger:
        logger.rewind(1, "probe", 2)
    assert [(e["stage"], e["phase"]) for e in read(tmp_path)[1:]] == [(0, "train")] * 4 + [(1, "probe")] * 2


def test_a_fresh_run_starts_a_new_record_and_other_processes_write_nothing(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("old\n")
    with RunLogger(tmp_path, 1, tensorboard=False) as logger:
        run_phase(logger, 0, "train", 0, 1)
    assert len(read(tmp_path)) == 1
    lines.clear()
    with RunLogger(tmp_path / "other", 1, chief=False) as logger:
        run_phase(logger, 0, "train", 0, 4)
        assert logger.rewind(0, "train", 0) == 0
    assert not (tmp_path / "other").exists() and lines == []


def test_tensorboard_has_a_run_per_phase_and_forgets_steps_that_are_done_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    def events(folder: Path) -> list[Event]:
        found = []
        for file in sorted(folder.iterdir()):
            data, at = file.read_bytes(), 0
            while at < len(data):  # length, checksum, event, checksum
                size = int.from_bytes(data[at : at + 8], "little")
                found.append(Event.FromString(data[at + 12 : at + 12 + size]))
                at += size + 16
        return found

    with RunLogger(tmp_path, 1) as logger:
        run_phase(logger, 0, "train", 0, 3)
    with RunLogger(tmp_path, 1, resumed=True) as logger:
        run_phase(logger, 0, "train", 2, 4)
        run_phase(logger, 1, "train", 0, 1)
    assert sorted(p.name for p in (tmp_path / "tensorboard").iterdir()) == ["01_t0_train", "02_t1_train"]
    first = events(tmp_path / "tensorboard" / "01_t0_train")
    losses = [(e.step, e.summary.value[0].simple_value) for e in first if e.summary.value and e.summary.value[0].tag == "loss"]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]
    assert [e.step for e in first if e.HasField("session_log")] == [3]


def test_without_tensorboardx_there_is_one_warning_and_a_record(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(log.logging, "warning", lambda form, *args: warnings.append(form % args))
    with RunLogger(tmp_path, 1) as logger:
        run_phase(logger, 0, "train", 0, 4)
    assert warnings == ["tensorboardX is not installed: no TensorBoard files are written; metrics.jsonl holds all numbers."]
    assert len(read(tmp_path)) == 4 and not (tmp_path / "tensorboard").exists()


def test_parameter_table_adds_up_and_lines_up():
    rows = [
        ParameterRow("language_model", 12, 6_738_415_616, 2 * 6_738_415_616, False),
        ParameterRow("pool/block_02", 14, 39_976_960, 4 * 39_976_960, True),
        ParameterRow("mm_projector", 4, 20_979_712, 4 * 20_979_712, True),
    ]
    assert parameter_table(rows).splitlines() == [
        "group           leaves     parameters     bytes  trainable",
        "----------------------------------------------------------",
        "language_model      12  6,738,415,616  12.6 GiB  no",
        "pool/block_02       14     39,976,960   152 MiB  yes",
        "mm_projector         4     20,979,712  80.0 MiB  yes",
        "----------------------------------------------------------",
        "trainable           18     60,956,672   233 MiB  0.897 %",
        "total               30  6,799,372,288  12.8 GiB",
    ]
    assert "0 %" in parameter_table([])


def test_durations_and_sizes():
    values = [0, 45.4, 59.6, 200, 7500, 3 * 86400 + 4 * 3600, float("inf"), float("nan"), -1]
    assert [format_seconds(x) for x in values] == ["0s", "45s", "1m00s", "3m20s", "2h05m", "3d04h", "?", "?", "0s"]
    assert [format_bytes(x) for x in (0, 512, 1536, 31.2 * 2**30, 5e18)] == ["0 B", "512 B", "1.50 KiB", "31.2 GiB", "4547474 TiB"]


def test_progress_off_a_terminal_is_a_line_now_and_then(lines):
    clock, stream = Clock(), io.StringIO()
    with Progress("evaluate GQA", 100, every_seconds=30, stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now += 10
            progress.update(10)
    assert lines == [
        "evaluate GQA: 30/100, 1/s, 1m10s left",
        "evaluate GQA: 60/100, 1/s, 40s left",
        "evaluate GQA: 90/100, 1/s, 10s left",
        "evaluate GQA: 100 of 100 done in 1m40s",
    ]
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_rewrites_one_line(lines):
    clock, stream = Clock(), io.StringIO()
    stream.isatty = lambda: True
    with Progress("evaluate", 10, stream=stream, clock=clock) as progress:
        clock.now += 9
        progress.update(1)
        clock.now += 1
        progress.update(9)
    progress.finish()
    shown = stream.getvalue().split("\r")
    assert lines == [] and shown[0] == "" and shown[1] == "evaluate: 1/10, 0.111/s, 1m21s left"
    assert shown[2].rstrip() == "evaluate: 10/10, 1/s, 0s left" and len(shown[2]) == len(shown[1])
    assert shown[3].rstrip() == "evaluate: 10 of 10 done in 10s" and shown[3].endswith("\n") and len(shown) == 4
    with Progress("evaluate", 0, stream=stream, chief=False):
        pass
    assert len(stream.getvalue().split("\r")) == 4


def test_console_shows_our_lines_and_others_warnings(tmp_path):
    script = (
        "import logging, sys; from absl import flags, logging as absl_logging\n"
        "from proglora_jax.training.console import setup_console; from proglora_jax.training.log import RunLogger\n"
        "flags.FLAGS.mark_as_parsed(); setup_console(chief=sys.argv[2] == '1'); logger = RunLogger(sys.argv[1], 1, tensorboard=False)\n"
        "logger.message('ours'); absl_logging.info('theirs'); logging.getLogger('x').warning('careful'); absl_logging.error('bad')\n"
        "assert 'jax' not in sys.modules\n"
    )
    outputs = []
    for chief in "10":
        command = [sys.executable, "-c", script, str(tmp_path), chief]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
        assert done.stdout == ""
        outputs.append([line.split(" ", 1)[1] for line in done.stderr.splitlines()])
    assert outputs == [["ours", "WARNING: careful", "ERROR: bad"], ["ERROR: bad"]]
