"""The benchmark of the embedded tasks: which records of earlier calls it takes over, and what a run costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

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


def test_a_command_is_measured_alone(coin_mini, tmp_path):
    began = time.monotonic()
    code = "import time; print('told'); time.sleep(0.3); end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    found = coin_mini.measured([sys.executable, "-c", code], tmp_path / "log", {"NAMED": "1"})
    assert 0.5 <= found["wall_s"] <= time.monotonic() - began and 0.2 <= found["cpu_s"] < found["wall_s"]
    assert found["peak_bytes"] > 1 << 20 and found["cores"] >= 1 and found["load"] >= 0
    assert (tmp_path / "log").read_text() == "told\n"
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        coin_mini.measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", {})


def finished(workdir, command, seconds=6.0):
    """What a run leaves: results, pictures, and a log with what JAX compiled."""
    stages = [{"train": 30.0, "evaluate": 3.0}, {"train": 20.0, "evaluate": 4.0}]
    scores = {"coin": [[50.0], [40.0, 60.0]], "clean": [[50.0], [40.0, 60.0]]}
    record = {"method": "proglora_dynamic", "seed": 0, "tasks": ["A", "B"], "scoring": scores, "gates": {}, "seconds": stages,
              "versions": {"jax": "0.10", "python": "3.11"}, "command": " ".join(command)}
    (workdir / "results.json").write_text(json.dumps(record))
    for name in ("report_accuracy_coin.png", "report_gates.png"):
        (workdir / name).write_bytes(name.encode())
    (workdir / "console.log").write_text(
        "12:00:00 WARNING: Finished tracing step for jit in 0.5 sec\n12:00:00 WARNING: Finished jaxpr to MLIR module conversion "
        f"jit(step) in 2.5e-01 sec\nWARNING: Finished XLA compilation of jit(step) in {seconds} sec\n"
        "WARNING: Finished XLA compilation of jit(answer) in 1.5 sec\n")
    return {"cores": 2, "load": 0.25, "wall_s": 90.0, "cpu_s": 120.0, "peak_bytes": 3 << 29}


@pytest.fixture
def folder(coin_mini, tmp_path, monkeypatch):
    """An empty checkout whose runs end at once."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(coin_mini, "ROOT", tmp_path)
    monkeypatch.setattr(coin_mini, "base_model", lambda: "m")
    monkeypatch.setattr(coin_mini, "measured", lambda command, log, environment: finished(log.parent, command))
    return results


def test_the_default_run_is_timed_by_part(coin_mini, folder, monkeypatch):
    (coin_mini.ROOT / "runs/benchmark/time/stages").mkdir(parents=True)  # of an earlier call, which goes
    monkeypatch.setattr(sys, "argv", ["coin_mini.py", "--set", "time"])
    coin_mini.main()
    assert not (coin_mini.ROOT / "runs/benchmark/time/stages").exists()
    found = json.loads((folder / "coin_mini_time.json").read_text())
    assert found["compiled"] == {"programs": 2, "trace_s": 0.5, "lower_s": 0.25, "xla_s": 7.5}
    text = (folder / "coin_mini_time.md").read_text()
    assert "**1.5 minutes** (90 s), 120 s of CPU time, peak memory 1.50 GiB, ACC 50.0, BWT -5.0" in text
    assert "| training | 50.0 | 56% |" in text and "| answering | 7.0 | 8% |" in text and "load of the machine before: 0.2" in text
    assert (folder / "coin_mini_dynamic_gates.png").read_bytes() == b"report_gates.png"
    assert (folder / "coin_mini_time.png").stat().st_size > 1000
    before = text, (folder / "coin_mini_time.json").read_text()
    monkeypatch.setattr(sys, "argv", ["coin_mini.py", "--set", "time", "--draw"])
    coin_mini.main()
    assert before == ((folder / "coin_mini_time.md").read_text(), (folder / "coin_mini_time.json").read_text())


def test_minutes_stand_in_the_table_of_runs_that_began_anew(coin_mini, folder, monkeypatch):
    (coin_mini.ROOT / "runs/benchmark/lora_seed0").mkdir(parents=True)  # an earlier call began it: nobody knows how long it took
    monkeypatch.setattr(sys, "argv", ["coin_mini.py", "--seeds", "0", "--variants", "lora", "proglora_dynamic"])
    coin_mini.main()
    text = (folder / "coin_mini_headline.md").read_text()
    assert "| wall minutes |" in text and "| 1.5 (load 0.2) |" in text and "| no gates | – |" in text
    assert (folder / "coin_mini_dynamic_accuracy.png").read_bytes() == b"report_accuracy_coin.png"
    again = coin_mini.run("proglora_dynamic", "proglora_dynamic", {}, 0, 0)
    assert again["costs"]["wall_s"] == 90.0, "what the first call measured is kept"
