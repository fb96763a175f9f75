"""Which records of earlier calls the benchmark of the embedded tasks takes over."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def coin_mini(load_benchmark):
    """benchmarks/coin_mini.py as a module."""
    return load_benchmark("coin_mini")


@pytest.mark.parametrize("recorded, here, shared", [("a1", "a1", True), ("a1", "b2", False), (None, "a1", False), ("", "", False)])
def test_another_set_shares_a_run_of_the_same_commit_alone(coin_mini, tmp_path, monkeypatch, recorded, here, shared):
    record = {"variant": "proglora_dynamic", "seed": 1, "base_model": "m", "ACC": 68.0} | ({} if recorded is None else {"commit": recorded})
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/coin_mini_headline.json").write_text(json.dumps([record]))
    monkeypatch.setattr(coin_mini, "ROOT", tmp_path)
    monkeypatch.setattr(coin_mini, "base_model", lambda: "m")
    monkeypatch.setattr(coin_mini, "commit", lambda: here)
    title = next(iter(coin_mini.SETS["gates"]))
    found = coin_mini.known("gates", title, *coin_mini.SETS["gates"][title], 1)
    assert found == ([record | {"variant": title}] if shared else [])
    assert coin_mini.known("gates", title, *coin_mini.SETS["gates"][title], 2) == []


def test_a_checkout_with_changes_has_no_commit(coin_mini, tmp_path, monkeypatch):
    monkeypatch.setattr(coin_mini, "ROOT", tmp_path)
    assert coin_mini.commit() == ""
