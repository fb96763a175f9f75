"""The scaling model's arithmetic: rings by hand, what grows with chips and rows, and that the committed table follows from its numbers."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def scaling(load_benchmark):
    """benchmarks/scaling.py as a module."""
    return load_benchmark("scaling")


def test_a_ring_by_hand(scaling):
    network = scaling.Network(rate=100.0, inside=4, outside=10.0, wraps=1, hop=0.5)
    assert scaling.send_seconds(network, 4, "all-gather", 400.0, 2, 4) == pytest.approx(2 * (300 / 100 + 3 * 0.5))
    assert scaling.send_seconds(network, 4, "all-reduce", 400.0, 1, 4) == pytest.approx(600 / 100 + 6 * 0.5)
    assert scaling.send_seconds(network, 8, "all-reduce", 400.0, 1, 8) == pytest.approx(700 / 10 + 14 * 0.5), "the slowest link counts"
    assert scaling.send_seconds(network, 4, "reduce-scatter", 100.0, 1, 4) == pytest.approx(300 / 100 + 3 * 0.5)
    assert scaling.send_seconds(network, 1, "all-reduce", 400.0, 1, 1) == 0
    opened = scaling.Network(rate=100.0, inside=64, wraps=16, hop=0.0)
    assert scaling.send_seconds(opened, 8, "all-gather", 80.0, 1, 8) == pytest.approx(70 / 50), "an open ring has half the rate"


def test_gradients_are_all_that_a_data_parallel_step_sends(scaling):
    counted = json.loads((scaling.RESULTS / "scaling.json").read_text())["counted"]
    assert {one["kind"] for one in counted["collectives"]} == {"all-reduce"}
    size = sum(one["bytes"] * one["times"] for one in counted["collectives"])
    # Trainable parameters of ProgLoRA (dynamic) at 7B in float32, and a few numbers for the log.
    assert size == pytest.approx(4 * (42_090_752 + 20_979_712), rel=1e-3)
    lines = list(scaling.data_parallel(counted, 0.5))
    weak = [line for line in lines if "rows a chip" in line.system]
    assert len({line.compute for line in weak}) == 1 and [line.chips for line in weak] == list(scaling.COUNTS)
    assert [line.efficiency[0] for line in weak] == sorted((line.efficiency[0] for line in weak), reverse=True)
    # 16 rows of 18.64 TFLOP at half of 989 TFLOP/s
    assert weak[0].compute == pytest.approx(16 * 18.64 / (0.5 * 989), rel=0.005)
    assert not [line for line in lines if line.rows < line.chips]


def test_the_committed_table_follows_from_its_numbers(scaling):
    content = json.loads((scaling.RESULTS / "scaling.json").read_text())
    lines = list(scaling.data_parallel(content["counted"], content["gpu_mfu"]))
    kept = [line for line in content["lines"] if line["system"].startswith("H100")]
    assert [(line["chips"], line["compute"], line["network"]) for line in kept] == [
        (line.chips, pytest.approx(line.compute), pytest.approx(line.network)) for line in lines]
    text = (scaling.RESULTS / "scaling.md").read_text()
    assert "Computed, not timed" in text and text.count("\n| H100") == len(kept)
    assert content["gpu_mfu_is"].startswith(("assumed", "measured by benchmarks/gpu.py"))


def test_slices_gather_within_fsdp_and_sum_over_all(scaling):
    gather = {"kind": "all-gather", "bytes": 160.0, "times": 2, "group": 16, "turn": False}
    reduce = {"kind": "all-reduce", "bytes": 64.0, "times": 1, "group": 16, "turn": False}
    loop = {"kind": "all-gather", "bytes": 1e12, "times": 1, "group": 16, "turn": True}  # of decoding
    report = {"chip": "TPU v5e", "chips": 16, "model": "the preset llava15_7b", "mesh": {"data": 1, "fsdp": 16, "model": 1}, "programs": [
        {"program": "train", "fits": True, "rows": 64, "flops": 1e12, "collectives": [gather, reduce, loop]}]}  # fmt: skip
    small, middle, large = scaling.slices([report], 0.5)
    assert [line.mesh for line in (small, middle, large)] == ["1 x 8", "4 x 16", "16 x 16"]
    assert small.sent == pytest.approx(2 * 160 * 7 / 8 + 2 * 64 * 7 / 8)
    assert large.sent == pytest.approx(2 * 160 * 15 / 16 + 2 * 64 * 255 / 256)
    assert small.compute == large.compute == pytest.approx(1e12 / (197e12 * 0.5)) and large.rows == 4 * 256
