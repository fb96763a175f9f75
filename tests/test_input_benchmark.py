"""The benchmark of the input: its pictures decode, its parts add up, and waiting is counted as it should be."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module")
def inputs(load_benchmark):
    """benchmarks/input.py as a module."""
    return load_benchmark("input")


def test_images_are_like_photos_and_rates_are_positive(inputs, tmp_path):
    found = inputs.image_rates(tmp_path, (640, 480), 4)
    assert 40 < found["file_kb"] < 160, "a photo of this size has about 80 KB"
    assert min(found["decode_ms"], found["resize_ms"], found["normalise_ms"], found["per_s_and_core"]) > 0
    assert len(os.listdir(tmp_path)) == 4
    assert found["folder"]["per_s_and_core"] > found["per_s_and_core"] and round(found["folder"]["file_kb"]) == 339
    inputs.write({"images": [found], "loops": [], "cores": 1}, tmp_path / "out")
    text = (tmp_path / "out" / "input.md").read_text()
    assert "| 640x480 | " in text and "| from the cache folder | 339 | " in text


def test_waiting_by_hand(inputs):
    # Two steps compile; then three steps of 1 s, of which the waits for their batches took 0.1, 0.2 and 0.3 s.
    had = [0.0, 50.0, 60.0, 61.0, 62.0, 63.0]
    asked = [0.0, 10.0, 59.0, 60.9, 61.8, 62.7]
    found = inputs.stall(asked, had)
    assert found == pytest.approx({"stall": 0.2, "step_ms": 1000.0, "wait_ms": 200.0})
