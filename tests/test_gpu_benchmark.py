"""The GPU benchmark runs on a CPU at tiny sizes with the same code; what a process dies of becomes a row, the rest is still measured."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """benchmarks/gpu.py as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("gpu")
    sys.path.remove(str(FOLDER))


def measured(gpu, tmp_path, side: str, names: list[str], profile: tuple[str, ...] = ()) -> dict[str, dict]:
    """{name: result} of cases measured in this process, as a child would."""
    torch.set_num_threads(1)  # at these sizes more threads only wait for one another
    cases, child = importlib.import_module("gpu_cases"), importlib.import_module("gpu_child")
    known = {case.name: case for series in cases.series(True) for case in series}
    order = child.Order(time.monotonic() + 300, 1, list(profile), tmp_path / "trace")
    importlib.import_module(f"gpu_{side}").run(
        [known[name] for name in names], cases.sizes_of(True), child.Lines(str(tmp_path / gpu.EVENTS)), order)
    events = [json.loads(line) for line in (tmp_path / gpu.EVENTS).read_text().splitlines()]
    found = {event["case"]: event for event in events if event["event"] == "result"}
    assert set(names) <= set(found) and not [event for event in found.values() if "error" in event], found
    return found


@pytest.mark.slow
def test_our_side_runs_and_the_loop_over_blocks_is_the_same_function(gpu, tmp_path):
    names = ["ours train N=8 r=2 B=8 S=44", "ours train N=8 r=2 B=8 S=44 loop"]
    rows = measured(gpu, tmp_path, "ours", names, profile=(names[0],))
    fused, loop = (rows[name] for name in names)
    assert fused["loss"] == pytest.approx(loop["loss"], rel=1e-5)
    assert fused["loss"] > fused["loss_later"] == pytest.approx(loop["loss_later"], rel=1e-5), "gradients agree, not the values alone"
    assert loop["total_flops"] == fused["total_flops"] > fused["model_flops"] > 0 and fused["planned_bytes"] > 0
    assert 5 < len(fused["costliest"]) <= 10 and 0.3 < sum(one["share"] for one in fused["costliest"]) <= 1
    answers = measured(gpu, tmp_path, "ours", ["ours answer N=8 r=2 B=16 S=40"])
    theirs = measured(gpu, tmp_path, "peers", ["peers answer N=8 r=2 B=1 S=40", "peers train N=8 r=2 B=1 S=44"])
    known = {case.name: dataclasses.asdict(case) for series in importlib.import_module("gpu_cases").series(True) for case in series}
    found = importlib.import_module("gpu_report").ratios([row | {"fields": known[name]} for name, row in (rows | answers | theirs).items()])
    speed = {name: row["samples_per_s"] for name, row in (answers | theirs).items()}
    assert found["loop over blocks / fused, N 8"] == pytest.approx(loop["ms"] / fused["ms"])
    assert found["answers/s by generate's, batch 1"] == pytest.approx(
        speed["ours answer N=8 r=2 B=16 S=40"] / speed["peers answer N=8 r=2 B=1 S=40"])
    assert found["samples/s by PEFT's best setting, N 8"] > 0 and found["MFU, r 16, N 8, largest over batches"] is None


def test_a_process_of_its_own_measures_and_writes_all_files(gpu, tmp_path):
    name = "peers train N=1 r=2 B=8 S=44 checkpointing"
    gpu.main(["--tiny", "--budget", "300", "--out", str(tmp_path), "--only", f"^{name}$"])
    row, = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["case"] == name and row["samples_per_s"] == pytest.approx(8 / row["ms"] * 1e3)
    text = (tmp_path / "gpu.md").read_text()
    assert "No number below means anything" in text and f"| {name} | sdpa |" in text and (tmp_path / "gpu.png").exists()


class Scripted:
    """A child that writes what a script says for each of its cases and then ends, in peace or not."""

    def __init__(self, fates: dict[str, str]):
        self.fates, self.process = fates, SimpleNamespace(kill=lambda: None)

    def obey(self, item, seconds, profile):
        events = []
        if item.threads > 1 and "compiler" in [self.fates.get(name) for name in item.names]:
            return [{"event": "compile", "case": name} for name in item.names[:2]], "its process ended with -11: it said nothing"
        for name in item.names:
            events.append({"event": "begin", "case": name})
            if self.fates.get(name) in ("dies", "compiler"):
                return events, "its process ended with -9: it said nothing"
            if self.fates.get(name) == "stops":
                return events[:-1], ""
            events.append({"event": "result", "case": name, "ms": 1.0, "ms_lowest": 1.0, "ms_highest": 1.0, "samples_per_s": 1.0,
                           "attention": "xla"})
        return events, ""


@pytest.mark.parametrize("fate, wanted", [("dies", "ended with -9"), ("compiler", "ended with -9"), ("stops", "time was over")])
def test_what_a_process_dies_of_is_a_row(gpu, tmp_path, monkeypatch, fate, wanted):
    series = importlib.import_module("gpu_cases").series(True, "ours train N=8 r=2 B=.* S=44$")
    bad, names = series[0][1].name, [case.name for cases in series for case in cases]
    monkeypatch.setattr(gpu.Bench, "_start", lambda self, item: Scripted({bad: fate}))
    arguments = SimpleNamespace(budget=100.0, go_on=False, tiny=True, profile=None, isolate=False, threads=2)
    bench = gpu.Bench(arguments, tmp_path, tmp_path)
    bench.run(series)
    failed = {name: row["error"] for name, row in bench.rows.items() if "error" in row}
    assert set(bench.rows) == set(names) and wanted in failed[bad]
    assert (set(failed) == {bad}) == (fate != "stops"), "behind a failure the rest is measured; behind the end of the time nothing is"
    assert f"| {bad} | " in (tmp_path / "gpu.md").read_text()


def test_going_on_measures_what_is_missing(gpu, tmp_path):
    done = {"event": "result", "case": "ours train N=8 r=2 B=8 S=44", "ms": 1.0}
    failed = {"event": "result", "case": "ours train N=1 r=2 B=8 S=44", "error": "out of memory"}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (done, failed)) + '{"event": "res')
    arguments = SimpleNamespace(budget=100.0, go_on=True, tiny=True, profile=None, isolate=False, threads=1)
    assert list(gpu.Bench(arguments, tmp_path, tmp_path).rows) == [done["case"]]


def test_an_error_of_memory_is_told_from_others(gpu):
    child = importlib.import_module("gpu_child")
    assert child._sentence(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes")) == "out of memory"
    assert child._sentence(ValueError("shapes do\nnot fit")) == "ValueError: shapes do not fit"


def test_every_case_has_its_own_name_at_both_sizes(gpu):
    cases = importlib.import_module("gpu_cases")
    for tiny in (False, True):
        listed = [case.name for series in cases.SERIES for case in series]
        kept = [case.name for series in cases.series(tiny) for case in series]
        assert len(set(kept)) == len(kept) == len(set(listed))
    wanted = {"B=4", "B=8", "B=16", "B=24", "S=640", "S=1024", "N=1", "r=128", "loop", "xla", "remat full", "torch.compile", "answer"}
    assert all(any(word in name for name in kept + listed) for word in wanted)
