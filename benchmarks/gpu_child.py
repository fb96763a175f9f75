"""A process of the GPU benchmark: imports, waits for its cases on stdin, and writes each result as soon as it is there.

Started by benchmarks/gpu.py. What it writes are lines of JSON, {"event": ..., "case": name, "at": seconds since 1970, ...}: from them the
parent knows which case a process died of, and how long each took.

    compile, compiled   a program
    begin, result       a case; the result has its numbers, or an "error"
    look, more          further numbers of a case that has its result, {"field": name} and then {name: ...} or {name_error: why}
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Case, Sizes


NOT_TRIED, FULL = "not tried", "out of memory"
"""Of rows without a result, with which a benchmark that goes on is content."""
LAST = 15.0
"""Seconds before the end of the time in which no further case is begun."""


class Lines:
    """The file of events."""

    def __init__(self, path: str):
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, event: str, case: Case, **fields: Any) -> None:
        """One line, at once."""
        self.file.write(json.dumps({"event": event, "case": case.name, "at": round(time.time(), 1), **fields}) + "\n")


def main() -> None:
    """Does what a line on stdin says: {"cases": [names], "seconds": left, "threads": that compile, "profile": [names], "trace": folder,
    "known": {name of a case: its samples a second, or null where it failed}}.
    """
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
    told = Order(deadline, order["threads"], order["profile"], Path(order["trace"]), order["known"])
    run([by_name[name] for name in order["cases"]], sizes, lines, told)


class Order:
    """How the cases are run.

    Attributes:
        threads: that compile at the same time.
        profile: names of the cases that are profiled.
        folder: for traces.
        known: {name of a case that was measured before: its samples a second, or None where it failed}.
    """

    def __init__(self, deadline: float, threads: int, profile: list[str], folder: Path, known: dict[str, float | None]):
        self.deadline, self.threads, self.profile, self.folder, self.known = deadline, threads, profile, folder, known

    @property
    def over(self) -> bool:
        """Whether no further case should be begun."""
        return time.monotonic() > self.deadline


def attempt(lines: Lines, case: Case, measure: Callable[[], dict[str, Any]], more: Mapping[str, Callable[[], Any]] = {}) -> dict | None:
    """Writes what `measure` returns, or why it could not, and then, one by one, what is to be found out beside it.

    Args:
        lines: the file of events.
        case: what is measured.
        measure: returns the result.
        more: {field of the result: returns it}; whatever happens there, the result stays.

    Returns:
        The result, None where there is none.
    """
    lines.write("begin", case)
    try:
        found = measure()
    except Exception as error:  # out of memory has a type of its own in every library
        traceback.print_exc()
        lines.write("result", case, error=_sentence(error))
        return None
    lines.write("result", case, **found)
    for field, look in more.items():
        lines.write("look", case, field=field)
        try:
            lines.write("more", case, **{field: look()})
        except Exception as error:  # a profiler fails in its own ways too
            traceback.print_exc()
            lines.write("more", case, **{f"{field}_error": _sentence(error)})
    return found


def _sentence(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return FULL if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() else " ".join(text.split())[:300]


def timed(call: Callable[[], Any], wait: Callable[[Any], None], sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a call: median, lowest and highest over rounds, each of a few calls that are dispatched without waiting."""
    wait(call())
    began = time.perf_counter()
    wait(call())
    steps, found = 1 if time.perf_counter() - began > 1 else sizes.steps, []
    for _ in range(sizes.rounds):
        start = time.perf_counter()
        for _ in range(steps):
            last = call()
        wait(last)
        found.append((time.perf_counter() - start) / steps * 1e3)
        if len(found) >= 3 and time.perf_counter() - began > sizes.seconds:
            break
    return {"ms": statistics.median(found), "ms_lowest": min(found), "ms_highest": max(found), "rounds": len(found)}


def speed(case: Case, times: dict[str, float]) -> dict[str, float]:
    """Samples and tokens a second."""
    samples = case.rows / times["ms"] * 1e3
    return times | {"samples_per_s": samples} | ({"tokens_per_s": samples * case.positions} if case.what == "train" else {})


if __name__ == "__main__":
    main()
