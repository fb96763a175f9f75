"""LLaVA-1.5 7B on one GPU, training and answering, against transformers and PEFT in torch: one command, under ten minutes, no network.

    python benchmarks/gpu.py --out results          everything that the time allows, the most important first
    python benchmarks/gpu.py --out results --go-on  what the time did not allow or what failed, from results/events.jsonl on
    python benchmarks/gpu.py --only "B=16|answer"   cases with this in their names, a regular expression (--list shows the names)
    python benchmarks/gpu.py --tiny                 the same code on a CPU at sizes that only show that it runs

Weights are random and made on the device, images and words are random; nothing is read or downloaded. It needs jax with its CUDA plugin,
and for the other side torch, transformers and peft; where these are missing their rows say so. A checkout will do, installed or not.

Processes: cases of a series share one, with its weights, and compile side by side; the next process imports while one measures. What does
not fit, fails or hangs leaves a row with the reason, and a fresh process goes on behind it; --isolate gives each case a process of its own,
which takes longer. Every result is written at once: events.jsonl as they come, gpu.json and gpu.md after each series, gpu.png at the end.
The costliest kernels of a step are listed for the main case, or for those that --profile names, and their programs are compiled once more,
from the cache; a profiler that fails costs no result. A benchmark that goes on keeps what did not fit: without --go-on all is tried again.
All is sized to end within a call of ten minutes, by what its parts took on an H200; how long each took is in gpu.json.
What a call did not reach a second one does: events.jsonl into its folder, and --go-on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_cases  # noqa: E402
import gpu_report  # noqa: E402
from gpu_child import FULL, NOT_TRIED  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EVENTS = "events.jsonl"
SILENCE = 240.0
"""Seconds without an event after which a process is taken for dead: a large program compiles for a minute or two."""
LOOKING = 90.0
"""The same while it looks into a case that has its result."""
CLOSING = 8.0
"""Seconds kept for the report."""


def main(argv: list[str] | None = None) -> Path:
    """Measures, and writes the results; their folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results by default, with --tiny a temporary one")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all")
    parser.add_argument("--only", default="", help="cases in whose names this regular expression is found")
    parser.add_argument("--go-on", action="store_true", help="keep what is there and what did not fit, measure what is missing or failed")
    parser.add_argument("--isolate", action="store_true", help="a process for each case")
    parser.add_argument("--threads", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="programs compiled at a time")
    parser.add_argument("--profile", nargs="*", help="cases of ours to list the costliest kernels of; the main case by default")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes that only show that it runs")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    arguments = parser.parse_args(argv)
    series = gpu_cases.series(arguments.tiny, arguments.only)
    if arguments.list:
        print("\n".join(case.name for cases in series for case in cases))
        raise SystemExit(0)
    if not series:
        raise SystemExit(f'error: --only "{arguments.only}": no case has this in its name; --list shows the names')
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="gpu_tiny_")) if arguments.tiny else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_") as folder:
        Bench(arguments, out, Path(folder)).run(series)
    return out


@dataclasses.dataclass
class Item:
    """Cases for one process, and how many programs it compiles at a time."""

    side: str
    names: list[str]
    threads: int


class Bench:
    """The processes of a benchmark and what they have found.

    Attributes:
        rows: {name of a case: its result}.
    """

    def __init__(self, arguments: argparse.Namespace, out: Path, folder: Path):
        self.arguments, self.out, self.folder, self.children = arguments, out, folder, 0
        self.began = time.monotonic()
        self.deadline = self.began + arguments.budget - CLOSING
        if not arguments.go_on:
            (out / EVENTS).unlink(missing_ok=True)
        before = _read(out / EVENTS, 0) if (out / EVENTS).exists() else []
        self.rows = {name: row for name, row in _rows(before).items() if row.get("error", FULL).startswith((FULL, NOT_TRIED))}
        main = gpu_cases.tiny(gpu_cases.MAIN) if arguments.tiny else gpu_cases.MAIN
        self.profile = [main.name] if arguments.profile is None else arguments.profile
        self.cases: dict[str, gpu_cases.Case] = {}

    @property
    def left(self) -> float:
        """Seconds that are left for measuring."""
        return self.deadline - time.monotonic()

    def run(self, series: list[list[gpu_cases.Case]]) -> None:
        """All series, one after the other."""
        self.cases = {case.name: case for cases in gpu_cases.series(self.arguments.tiny) for case in cases}
        items = []
        for cases in series:
            names = [case.name for case in cases if case.name not in self.rows]
            groups = [[name] for name in names] if self.arguments.isolate else [names] if names else []
            items += [Item(cases[0].side, group, self.arguments.threads) for group in groups]
        ready = self._start(items[0]) if items else None
        try:
            for place, item in enumerate(items):
                child, ready = ready, None
                if place + 1 < len(items):
                    ready = self._start(items[place + 1])  # it imports meanwhile
                self._finish(item, child)
                self._write(figure=False)
        finally:
            if ready is not None:
                ready.process.kill()
        self._write(figure=True)
        print((self.out / "gpu.md").read_text(encoding="utf-8"))

    def _finish(self, item: Item, child: Child | None) -> None:
        """Lets processes run until every case of an item has a result or the time is over."""
        while item.names and self.left > 0:
            child = child or self._start(item)
            events, why = child.obey(item, self.left, self.profile, {name: row.get("samples_per_s") for name, row in self.rows.items()})
            known = _rows(events)
            self.rows |= known
            for row in known.values():
                print(json.dumps(row), flush=True)
            item.names = [name for name in item.names if name not in known]
            if not why:  # it left in peace: what it did not begin, the time did not allow
                break
            self._blame(item, events, why)
            child = None
        if child is not None:
            child.process.kill()
        for name in item.names:
            self.rows[name] = {"case": name, "error": "not reached: the time was over"}

    def _blame(self, item: Item, events: list[dict], why: str) -> None:
        """Gives the case that a process died of its row; where several were compiling, they are compiled one by one next."""
        last = events[-1] if events else {}
        if last.get("event") == "look":
            self.rows[last["case"]] |= {f"{last['field']}_error": why}
            return
        open_ = lambda first, last: [name for name in item.names if _has(events, name, first) and not _has(events, name, last)]
        guilty = open_("begin", "result") or open_("compile", "compiled")
        if len(guilty) > 1 and item.threads > 1 and self.left > 0:
            item.threads = 1
            return
        for name in guilty[:1] or item.names[:1]:
            self.rows[name] = {"case": name, "error": why}
            item.names.remove(name)

    def _start(self, item: Item) -> Child:
        self.children += 1
        return Child(item.side, self.folder, self.out, self.children, self.arguments.tiny)

    def _write(self, figure: bool) -> None:
        rows = [self.rows[name] | {"fields": dataclasses.asdict(self.cases[name])} for name in self.cases if name in self.rows]
        gpu_report.write(rows, gpu_cases.sizes_of(self.arguments.tiny), self.out, time.monotonic() - self.began, figure=figure)


def _has(events: list[dict], name: str, kind: str) -> bool:
    return any(event["case"] == name and event["event"] == kind for event in events)


def _read(path: Path, start: int) -> list[dict]:
    """The events of a file from a byte on; a line that is not whole is left out."""
    with open(path, encoding="utf-8") as file:
        file.seek(start)
        return [json.loads(line) for line in file.read().splitlines() if line.endswith("}")]


def _rows(events: list[dict]) -> dict[str, dict]:
    """{name of a case: its result}, with what was found beside it and the seconds that it took, compilation not counted."""
    rows: dict[str, dict] = {}
    begun: dict[str, float] = {}
    for event in events:
        name, at = event["case"], event.get("at")
        fields = {key: value for key, value in event.items() if key not in ("event", "at")}
        if event["event"] == "begin" and at:
            begun[name] = at
        elif event["event"] == "result":
            rows[name] = fields | ({"seconds": at - begun[name]} if at and name in begun else {})
        elif event["event"] == "more":
            rows[name] = rows.get(name, {}) | fields
    return rows


class Child:
    """A process that has imported what it needs, or is about to, and waits for its cases."""

    def __init__(self, side: str, folder: Path, out: Path, number: int, tiny: bool):
        self.events, self.log, self.trace = out / EVENTS, folder / f"log_{number}.txt", folder / f"trace_{number}"
        self.events.touch()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        } | ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if tiny else {})  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_child.py"), side, str(self.events), "tiny" if tiny else "full"]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environment)

    def obey(self, item: Item, seconds: float, profile: list[str], known: dict[str, float | None]) -> tuple[list[dict], str]:
        """Gives it its cases, and what is known of others, and waits until it ends: (its events, why it did not end in peace or "")."""
        order = {"cases": item.names, "seconds": seconds, "threads": item.threads, "profile": profile, "trace": str(self.trace),
                 "known": known}
        start = self.events.stat().st_size
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died while it imported; its exit says so below
        deadline, seen, last, why, patience = time.monotonic() + seconds, start, time.monotonic(), "", SILENCE
        while self.process.poll() is None and not why:
            time.sleep(0.1)
            now, size = time.monotonic(), self.events.stat().st_size
            if size != seen:
                seen, last = size, now
                patience = LOOKING if [event["event"] for event in _read(self.events, start)][-1:] == ["look"] else SILENCE
            if now > deadline:
                why = "cut off: the time was over"
            elif now - last > patience:
                why = f"cut off: nothing was heard of it for {patience:.0f} s"
        if why:
            self.process.kill()
        code = self.process.wait()
        if code and not why:
            why = f"its process ended with {code}: {self._last_words()}"
        return _read(self.events, start), why

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return ((errors or lines)[-1:] or ["it said nothing"])[0][:300]


if __name__ == "__main__":
    main()
