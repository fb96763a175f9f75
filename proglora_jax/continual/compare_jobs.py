"""Runs the main job for each run of a comparison, each in a process of its own; one that fails does not stop the others."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from proglora_jax.continual.compare_plan import PlannedRun
from proglora_jax.continual.report_tables import duration, number
from proglora_jax.continual.run_record import load_run
from proglora_jax.data.errors import UserError

STOPPED = 75  # what a run that obeyed a stop signal exits with
CONSOLE = "console.log"
COMMAND = (sys.executable, "-m", "proglora_jax.main")
# One thread a run where several share the cores: they would wait for each other at every operation.
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Stop:
    """Remembers a stop signal, and hands each one on to the processes that run."""

    def __init__(self):
        self.number = 0
        self.running: list[subprocess.Popen] = []

    def note(self, number: int, _frame) -> None:
        """Handles a signal: the first lets the runs save and leave, a second ends them at once."""
        self.number = number
        for process in list(self.running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM go to a `Stop` inside."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(
    runs: Sequence[PlannedRun], jobs: int, say: Callable[[str], None] = print, command: Sequence[str] = COMMAND,
    clock: Callable[[], float] = time.monotonic, pause: float = 0.2,
) -> tuple[dict[str, str], int]:
    """Runs what is not finished, several at a time.

    Args:
        runs: from `compare_plan.plan`.
        jobs: how many run at the same time.
        say: takes a line of progress.
        command: the main job; another one for tests.
        clock: seconds.
        pause: seconds between two looks at the processes.

    Returns:
        ({label: the sentence of a run that failed}, the number of the stop signal that came or 0).

    Raises:
        UserError: "compare: --jobs 0: must be 1 or more"
    """
    if jobs < 1:
        raise UserError(f"compare: --jobs {jobs}: must be 1 or more")
    waiting = collections.deque(run for run in runs if not run.finished)
    if kept := len(runs) - len(waiting):
        say(f"{kept} of {len(runs)} runs are there already")
    progress, failed, running = _Progress(len(runs), kept, jobs), {}, {}
    with stop_signals() as stop:
        try:
            while running or (waiting and not stop.number):
                while waiting and len(running) < jobs and not stop.number:
                    run = waiting.popleft()
                    process = _start(run, command, alone=jobs == 1)
                    running[process] = (run, clock())
                    stop.running = list(running)
                    if stop.number:  # the signal came while the process was made
                        process.send_signal(signal.SIGTERM)
                for process in [process for process in running if process.poll() is not None]:
                    run, began = running.pop(process)
                    stop.running = list(running)
                    left = collections.Counter(bool(other.families) for other in [*waiting, *(run for run, _ in running.values())])
                    say(_ended(run, process.returncode, clock() - began, progress, left, failed, stop.number))
                time.sleep(pause if running else 0)
        finally:
            for process in running:  # an error of ours: no run is left without its parent
                process.terminate()
        for process in running:
            process.wait()
    return failed, stop.number


def _start(run: PlannedRun, command: Sequence[str], alone: bool) -> subprocess.Popen:
    """Starts a run; a session of its own keeps the terminal's Ctrl-C from reaching it twice."""
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        log = open(run.workdir / CONSOLE, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run.workdir}: cannot be written ({error.strerror}); choose another --out") from error
    environment = dict(os.environ)
    if not alone:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
    with log:
        return subprocess.Popen(
            [*command, *run.arguments, f"--stopped_exit_code={STOPPED}"], env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True)


def _ended(
    run: PlannedRun, code: int, seconds: float, progress: _Progress, left: collections.Counter, failed: dict[str, str], stopping: int
) -> str:
    """The line that tells how a run ended; a failure is added to `failed`."""
    if code == STOPPED or (stopping and code == -signal.SIGTERM):  # the latter before it could listen, with nothing to save
        return f"{run.label}: stopped after {duration(seconds)}, its progress is saved"
    if code == 0 and run.finished:
        progress.add(bool(run.families), seconds)
        return progress.line(f"{run.label} in {duration(seconds)}{_scores(run)}", left)
    failed[run.label] = sentence(run.workdir / CONSOLE, code)
    progress.done += 1
    return progress.line(f"{run.label} FAILED: {failed[run.label]}", left)


def sentence(console: Path, code: int) -> str:
    """Why a run failed, in one sentence, from the end of what it printed."""
    with open(console, "rb") as file:
        file.seek(max(0, console.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == 0:
        return f"ended before it was finished; see {console}"
    if code < 0:
        return f"ended by signal {-code}, as when memory runs out; see {console}"
    if said:
        return said[-1]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Failed)\b", line)]
    return f"{(raised or lines or ['it printed nothing'])[-1][:300]} (exit status {code}; see {console})"


def _scores(run: PlannedRun) -> str:
    record = load_run(run.workdir)
    found = record.metrics(record.modes[0])
    return f": ACC {number(found.acc)}" + (f", BWT {number(found.bwt)}" if found.bwt is not None else "")


class _Progress:
    """How many runs are done, and how long the rest will take at the pace of their kind."""

    def __init__(self, total: int, done: int, jobs: int):
        self.total, self.done, self.jobs, self.seconds = total, done, jobs, {False: [], True: []}

    def add(self, isolated: bool, seconds: float) -> None:
        self.done += 1
        self.seconds[isolated].append(seconds)

    def line(self, text: str, left: collections.Counter) -> str:
        """[3/12] text; time left, where a run of any kind was timed."""
        known = self.seconds[False] + self.seconds[True]
        if not known or not sum(left.values()):
            return f"[{self.done}/{self.total}] {text}"
        pace = {kind: sum(times) / len(times) if times else sum(known) / len(known) for kind, times in self.seconds.items()}
        seconds = sum(count * pace[kind] for kind, count in left.items()) / min(self.jobs, sum(left.values()))
        return f"[{self.done}/{self.total}] {text}; about {duration(seconds)} left"
