"""A process of the GPU benchmark: imports, waits for its cases on stdin, and writes each result as soon as it is there.

Started by benchmarks/gpu.py. What it writes are lines of JSON, {"event": "begin" | "compile" | "result", "case": name, ...}: from them the
parent knows which case a process died of.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Case, Sizes


LAST = 15.0
"""Seconds before the end of the time in which no further case is begun."""


class Lines:
    """The file of events."""

    def __init__(self, path: str):
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, event: str, case: Case, **fields: Any) -> None:
        """One line, at once."""
        self.file.write(json.dumps({"event": event, "case": case.name, **fields}) + "\n")


def main() -> None:
    """Does what a line on stdin says: {"cases": [names], "seconds": left, "threads": that compile, "profile": [names], "trace": folder}."""
    side, path, tiny = sys.argv[1], sys.argv[2], sys.argv[3] == "tiny"
    sizes = gpu_cases.sizes_of(tiny)
    if side == "ours":
        from gpu_ours import run
    else:
        from gpu_peers import run
    order = json.loads(sys.stdin.readline() or "{}")
    if not order:
        return
    deadline = time.monotonic() + order["seconds"] - LAST
    by_name = {case.name: case for cases in gpu_cases.series(tiny) for case in cases}
    lines = Lines(path)
    run([by_name[name] for name in order["cases"]], sizes, lines, Order(deadline, order["threads"], order["profile"], Path(order["trace"])))


class Order:
    """How the cases are run.

    Attributes:
        threads: that compile at the same time.
        profile: names of the cases that are profiled.
        folder: for traces.
    """

    def __init__(self, deadline: float, threads: int, profile: list[str], folder: Path):
        self.deadline, self.threads, self.profile, self.folder = deadline, threads, profile, folder

    @property
    def over(self) -> bool:
        """Whether no further case should be begun."""
        return time.monotonic() > self.deadline


def attempt(lines: Lines, case: Case, measure: Callable[[], dict[str, Any]]) -> bool:
    """Writes what `measure` returns, or why it could not; whether it could."""
    lines.write("begin", case)
    try:
        lines.write("result", case, **measure())
        return True
    except Exception as error:  # out of memory has a type of its own in every library
        traceback.print_exc()
        lines.write("result", case, error=_sentence(error))
        return False


def _sentence(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return "out of memory" if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() else " ".join(text.split())[:300]


def timed(call: Callable[[], Any], wait: Callable[[Any], None], sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a call: median, lowest and highest over rounds, each of a few calls that are dispatched without waiting."""
    for _ in range(2):
        wait(call())
    found = []
    for _ in range(sizes.rounds):
        began = time.perf_counter()
        for _ in range(sizes.steps):
            last = call()
        wait(last)
        found.append((time.perf_counter() - began) / sizes.steps * 1e3)
    return {"ms": statistics.median(found), "ms_lowest": min(found), "ms_highest": max(found)}


def speed(case: Case, times: dict[str, float]) -> dict[str, float]:
    """Samples and tokens a second."""
    samples = case.rows / times["ms"] * 1e3
    return times | {"samples_per_s": samples} | ({"tokens_per_s": samples * case.positions} if case.what == "train" else {})


if __name__ == "__main__":
    main()
