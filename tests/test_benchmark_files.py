"""What the benchmarks share: cores, turns, bars; and that the committed tables follow from the committed numbers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def shared(load_benchmark):
    """benchmarks/shared.py as a module."""
    return load_benchmark("shared")


HOLD = """
import json, os, numpy, jax, jax.numpy as jnp
from shared import hold
before = len(os.sched_getaffinity(0))
kept = hold(1)
(jnp.ones((300, 300)) @ jnp.ones((300, 300))).block_until_ready()
print(json.dumps([before, kept, sorted({len(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")})]))
"""


def test_a_process_keeps_to_its_cores_with_the_threads_it_had():
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", HOLD], env=environment, capture_output=True, text=True, check=True)
    before, kept, masks = json.loads(done.stdout)
    assert before >= kept == 1 and masks == [1]


def test_turns_by_hand(shared):
    now, order = [0.0], []

    def call(name: str, seconds: float):
        order.append(name)
        now[0] += seconds

    found = shared.in_turns({"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}, 2, 2, clock=lambda: now[0])
    assert found == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert "".join(order) == "aaabbb" + "bbbaaa" + "aaabbb", "each is called once before it is timed, and another one begins each round"
    assert shared.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == {"ratio": 2.0, "lowest": 1.0, "highest": 3.0}


def test_a_figure_leaves_empty_panels_out(shared):
    bar = shared.Bar("one", 2.0, 1.0, 3.0)
    assert shared.bars({"full": [bar, bar], "empty": []}, mark=1.0).startswith(PNG)


@pytest.mark.parametrize("name", ["input", "prefix", "host_memory", "growth", "cpu_torch", "pool"])
def test_committed_tables_follow_from_their_numbers(shared, tmp_path, monkeypatch, name):
    module, found = importlib.import_module(name), shared.read(shared.RESULTS, name)
    if name == "growth":
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        module.write(**found)
    else:
        module.write(found, tmp_path)
    for kind in ("md", "json"):
        assert (tmp_path / f"{name}.{kind}").read_text() == (shared.RESULTS / f"{name}.{kind}").read_text()
    drawn = (tmp_path / f"{name}.png").read_bytes()
    assert drawn.startswith(PNG) and (shared.RESULTS / f"{name}.png").exists()
    assert f"({name}.png)" in (tmp_path / f"{name}.md").read_text()


def test_what_malloc_costs_is_measured_in_processes(shared, tmp_path):
    host_memory = importlib.import_module("host_memory")
    found = host_memory.measure(1, host_memory.TINY)
    assert {name: row["made"] for name, row in found["variants"].items()} == {"as it is": False, "freed memory kept": True}
    assert all(row["user_s"] > 0 and row["peak_mib"] > 50 for row in found["variants"].values())
    host_memory.write(found, tmp_path)
    assert "| freed memory kept |" in (tmp_path / "host_memory.md").read_text()
