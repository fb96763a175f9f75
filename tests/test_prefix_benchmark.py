"""The benchmark of shared beginnings: its two ways give the same answers, and what it counts at 7B is what positions say."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def prefix(load_benchmark):
    """benchmarks/prefix.py as a module."""
    return load_benchmark("prefix")


def test_work_at_7b_follows_the_positions(prefix):
    found = prefix.counted(3.2, 10)
    by_hand = 32 * 704 / (10 * 611 + 32 * 64)
    assert by_hand == pytest.approx(2.76, abs=0.01) and found["prompts"] == pytest.approx(by_hand, rel=0.05)
    assert found["shared_cache_gb"] / found["plain_cache_gb"] == pytest.approx((10 * 611 + 32 * 685) / (32 * 714))


def test_both_ways_are_timed_and_written(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix.meshes, "make_mesh", lambda shape, devices=None, make=prefix.meshes.make_mesh: make(
        shape, devices or prefix.jax.devices()[:1]))
    measured = prefix.measure(tmp_path, 12, 1)
    assert measured["positions"] > 1 and min(measured["ratio"], measured["cpu_ratio"], measured["plain_per_s"]) > 0
    prefix.write({"measured": measured, "counted": []}, tmp_path / "out")
    assert "12 questions, 3 an image" in (tmp_path / "out" / "prefix.md").read_text()
