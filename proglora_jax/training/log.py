"""The record of a run, line by line: JSONL on disk, and as views of it console lines with speed and time left, and TensorBoard curves.

`metrics.jsonl` in the workdir holds one self-contained JSON object per line. Nothing here imports jax: losses and the device's memory
peak come in as numbers.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from proglora_jax.checkpoints.integrity import atomic_write_text
from proglora_jax.training.console import format_bytes, format_seconds

RECORD = "metrics.jsonl"


class RunLogger:
    """Writes the record, the console lines and the TensorBoard files of one run, phase by phase.

    Stages are counted from 0 in arguments and in the record, as in the state; the console counts them from 1.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        log_every: int,
        tensorboard: bool = True,
        resumed: bool = False,
        *,
        chief: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the record.

        Args:
            workdir: the run's folder; made if missing.
            log_every: steps between two lines.
            tensorboard: write `workdir/tensorboard/<stage>_<task>_<phase>` too, if tensorboardX is installed.
            resumed: append to the record (call `rewind` next) instead of starting a new one.
            chief: False in all processes but one: they write and print nothing.
            clock: seconds; another one for tests.
        """
        self._workdir, self._log_every, self._chief, self._clock = Path(workdir), max(1, log_every), chief, clock
        self._phase: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._board = None
        self._board_class = _tensorboard_writer() if tensorboard and chief else None
        if chief:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(self._workdir / RECORD, "a" if resumed else "w", encoding="utf-8")

    def rewind(self, stage: int, phase: str, step: int) -> int:
        """Drops from the record what a resumed run is about to do again, and a last line that a kill cut short.

        Kept: other stages (later ones are there when a damaged stage in the middle is trained again), earlier phases of this stage,
        and this phase up to and including `step`.

        Args:
            stage: the stage that is resumed, from 0.
            phase: its phase.
            step: steps of the phase that are done.

        Returns:
            Number of lines dropped.
        """
        if self._file is None:
            return 0
        self._file.close()
        path, kept, reached = self._workdir / RECORD, [], False
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            entry = _parse(line)
            if entry is None:
                continue
            here = entry.get("stage") == stage and entry.get("phase") == phase
            reached = reached or here
            before = not reached or entry.get("stage") != stage
            if entry["step"] <= step if here and "step" in entry else before:
                kept.append(line)
        atomic_write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")
        return len(lines) - len(kept)

    def start_phase(
        self, *, stage: int, stages: int, task: str, phase: str, steps: int, first_step: int = 0, steps_after: int = 0
    ) -> None:
        """Prints a banner and starts the clock of a phase.

        Args:
            stage: index of the stage, from 0.
            stages: how many stages the run has.
            task: name of the stage's task.
            phase: name of the phase ("train").
            steps: how many steps the phase has.
            first_step: steps that are done already (a resumed phase).
            steps_after: training steps of all later phases and stages, for the run's time left.
        """
        self._phase = dict(stage=stage, task=task, phase=phase)
        self._stages, self._steps, self._steps_after = stages, steps, steps_after
        self._last, self._since, self._pace, self._intervals = first_step, self._clock(), 0.0, 0
        done = f", resumed after step {first_step}" if first_step else ""
        self.message(f"=== stage {stage + 1}/{stages} {task}: {phase}, {steps} steps{done} ===")
        self._close_board()
        if self._board_class is not None:
            folder = self._workdir / "tensorboard" / re.sub(r"[^A-Za-z0-9_.-]", "_", f"{stage + 1:02}_{task}_{phase}")
            # the suffix: two writers of one second would share a file name, and the second would empty it
            purge = first_step + 1 if first_step else None
            self._board = self._board_class(str(folder), purge_step=purge, filename_suffix=f".{first_step:09}")

    def due(self, step: int) -> bool:
        """Whether `step` (steps done, from 1) gets a line: every `log_every` steps, and the last one of the phase."""
        return step % self._log_every == 0 or step == self._steps

    def step(self, step: int, metrics: Mapping[str, float], *, tokens: int = 0, memory_peak: int | None = None) -> None:
        """Records a step, and prints its line.

        Args:
            step: steps of the phase that are done, this one included.
            metrics: name -> number; "loss", "lr" and "grad_norm" come first in the line.
            tokens: tokens that went through the model since the last call (or the phase's start).
            memory_peak: the device's peak memory so far, bytes; None where it is not known.
        """
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        pace = seconds / max(1, step - self._last)
        # the first interval holds the compile: it counts until there is another
        self._pace = pace if self._intervals < 2 else 0.7 * self._pace + 0.3 * pace
        self._intervals, self._last, self._since = self._intervals + 1, step, now
        numbers = {name: float(value) for name, value in metrics.items()}
        numbers["seconds_per_step"] = pace
        if tokens:
            numbers["tokens_per_second"] = tokens / seconds
        if memory_peak is not None:
            numbers["memory_peak_bytes"] = memory_peak
        self.event("step", step=step, steps=self._steps, **numbers)
        for name, value in numbers.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        self.message(self._line(step, numbers))

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to the record: its kind, stage, task, phase, time (seconds since 1970), and the fields."""
        if self._file is not None:
            entry = {"kind": kind, **self._phase, "time": round(time.time(), 3), **fields}
            self._file.write(json.dumps(entry, ensure_ascii=False, default=_number) + "\n")
            self._file.flush()

    def message(self, text: str) -> None:
        """Prints a line, or several, to the console."""
        if self._chief:
            logging.info("%s", text)

    def close(self) -> None:
        """Closes the record and the TensorBoard files."""
        self._close_board()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _line(self, step: int, numbers: Mapping[str, float]) -> str:
        left = self._pace * (self._steps - step)
        parts = [f"stage {self._phase['stage'] + 1}/{self._stages} {self._phase['task']} {self._phase['phase']} step {step}/{self._steps}"]
        shown = dict.fromkeys(["loss", "lr", "grad_norm", *numbers])
        for name in [n for n in shown if n in numbers and n not in ("seconds_per_step", "tokens_per_second", "memory_peak_bytes")]:
            parts.append(f"{name.replace('_', ' ')} {numbers[name]:{'.2e' if name == 'lr' else '.4g'}}")
        if "tokens_per_second" in numbers:
            parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{numbers['seconds_per_step']:.3g} s/step")
        parts.append(f"left: stage {format_seconds(left)}, run {format_seconds(left + self._pace * self._steps_after)} of training")
        if "memory_peak_bytes" in numbers:
            parts.append(f"memory peak {format_bytes(numbers['memory_peak_bytes'])}")
        return "  ".join(parts)


def _tensorboard_writer() -> Callable | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        logging.warning("tensorboardX is not installed: no TensorBoard files are written; %s holds all numbers.", RECORD)
        return None
    return SummaryWriter


def _parse(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and jax, without importing them
        return value.tolist()
    return os.fspath(value)
