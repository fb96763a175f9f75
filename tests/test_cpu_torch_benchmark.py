"""The CPU benchmark against torch: our sides among themselves at a tiny size, and ratios by hand."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def cpu_torch(load_benchmark):
    """benchmarks/cpu_torch.py as a module."""
    return load_benchmark("cpu_torch")


@pytest.mark.slow
def test_our_sides_take_turns_and_the_loop_trains_as_the_pool_does(cpu_torch, tmp_path):
    shape = cpu_torch.Shape(layers=2, width=32, inner=48, heads=2, vocabulary=128, positions=80, new_tokens=3)
    cpu_torch.save_random(shape, str(tmp_path / "model"))
    rows = cpu_torch.compare_ours(shape, str(tmp_path / "model"), 1, 1, generation=False)
    assert [(row["above"], row["below"]) for row in rows] == [*cpu_torch.PAIRS]
    assert all(row["ratio"] == pytest.approx(row["above_ms"] / row["below_ms"]) for row in rows)
    found = cpu_torch.read(cpu_torch.RESULTS, "cpu_torch") | {"ours_alone": rows, "cores": 4, "load": 1.0, "threads": 1}
    cpu_torch.write(found, tmp_path)
    text = (tmp_path / "cpu_torch.md").read_text()
    assert "--threads 1`" in text and text.count("| pool of 8, summed | ") == 2 + 1
