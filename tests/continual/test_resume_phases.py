"""Runs of methods with several phases that are killed inside each of them: what comes out is the uninterrupted run's, bit by bit."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
import tiny_run
from tiny_run import here  # noqa: F401

from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual import feature_data, phases
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Phase
from proglora_jax.training import loop
from proglora_jax.training.settings import TrainSettings

# SEMA's second task has both of its phases; PCLR integrates in no task but the second of three.
SMALL = {
    "sema": {"data__tasks": "TextVQA,ImageNet", "method__threshold": 0.0, "method__descriptor_width": 4, "method__detect_samples": 8},
    "pclr": {"method__rank": 4, "method__alpha": 8.0, "method__top_ranks": 4, "method__capacity": 8, "method__narrow_ranks": 2,
             "method__narrow_from": 3, "method__near_from": 3, "method__shared_ranks": 2, "method__query_samples": 8},
}  # fmt: skip


class Killed(Exception):
    """The process is gone."""


def kill_after(monkeypatch, stage: str, name: str) -> None:
    """The run ends right after it has saved this progress."""
    save = phases.save_checkpoint

    def saving(path, trees, records):
        save(path, trees, records)
        if path.name == name and path.parents[1].name == stage:
            raise Killed

    monkeypatch.setattr(phases, "save_checkpoint", saving)


def losses(workdir: Path) -> list[tuple]:
    """(stage, phase, step, loss) of the record."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [(entry["stage"], entry["phase"], entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "step"]


# method -> where it is killed, one after the other: (stage, progress).
KILLS = {
    "sema": [("00_textvqa", "func_0000004"), ("01_imagenet", "rd_0000006")],
    "pclr": [("01_imagenet", "learn_0000008"), ("01_imagenet", "integrate_0000004")],
}  # fmt: skip


@pytest.mark.parametrize("method", KILLS)
def test_kills_inside_each_phase_change_no_bit(here, method, monkeypatch):  # noqa: F811
    clean = here.run(f"{method}_clean", method, **SMALL[method])
    for stage, name in KILLS[method]:
        with monkeypatch.context() as patch:
            kill_after(patch, stage, name)
            with pytest.raises(Killed):
                here.run(f"{method}_killed", method, **SMALL[method])
    killed = here.run(f"{method}_killed", method, **SMALL[method])
    assert tiny_run.differences(tiny_run.outcome(killed), tiny_run.outcome(clean)) == []
    assert losses(killed) == losses(clean)
    kinds = {(stage, phase) for stage, phase, _, _ in losses(clean)}
    assert kinds == ({(stage, phase) for stage in range(2) for phase in ("func", "rd")} if method == "sema" else
                     {(0, "learn"), (1, "learn"), (1, "integrate"), (2, "learn")})  # fmt: skip
    if method == "sema":
        tree = load_checkpoint(tiny_run.stage_folders(clean)[-1] / "adapter")[0]["adapter"]["modules"]
        np.testing.assert_array_equal(tree["modules"], [[1, 0], [1, 1]])
        assert np.all(tree["records"] == 500) and np.all(tree["deviation"] > 0)  # the newest of eight steps of 128 rows


def progress(folder: Path, phase: str, batches, step: int) -> loop.PhaseState:
    """Saves a phase's progress as a run does, if it has made a step; returns the phase's beginning."""
    begin = loop.start_phase({"a": np.ones(3, np.float32)}, TrainSettings(), tiny_llava.mesh())
    if step:
        meta = {"step": step, "phase": phase, "origin": "the stage before", "loss": 1.0, "seconds": 2.0}
        records = {"meta": meta, "iterator": phases._position(batches, step)}
        phases.save_checkpoint(folder / f"{phase}_{step:07d}", phases._changed(begin), records)
    return begin


def test_other_features_drop_their_own_phase_and_those_after_it(tmp_path, rng, caplog):
    """The phase before is done and stays so; what began with another state is dropped as a whole."""
    folder, aside = tmp_path / "progress", tmp_path / "progress_dropped"
    features = rng.standard_normal((5, 3)).astype(np.float32)
    of = lambda x: feature_data.FeatureBatches(x, np.arange(5), feature_data.plan_rows(5, 4, epochs=4, max_steps=0, seed=1), 0)
    turns = tuple(map(Phase, ("func", "rd", "func1", "rd1")))
    session = types.SimpleNamespace(chief=True, logger=types.SimpleNamespace(message=lambda text: None))

    def resume(place: int, x, origin: str = "the stage before") -> tuple[int, float]:
        begin, data = progress(folder, turns[place].name, None, 0), phases._PhaseData(of(x), 8, str, {})
        seconds = phases._resume(session, folder, turns, place, origin, begin, data)
        assert data.batches.next_index == begin.step
        return begin.step, seconds

    for phase, step in (("func", 4), ("func", 8), ("rd", 8), ("func1", 2)):
        progress(folder, phase, of(features), step)
    assert resume(0, features) == (8, 2.0) and resume(1, features) == (8, 2.0) and not aside.exists()
    with caplog.at_level("WARNING"):
        assert resume(1, features + 1) == (0, 0.0)
    assert "The phase rd begins anew; the old progress is kept in" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["func_0000004", "func_0000008"]
    assert sorted(path.name for path in aside.iterdir()) == ["func1_0000002", "rd_0000008"]
    assert resume(0, features) == (8, 2.0) and resume(2, features) == (0, 0.0)
    progress(folder, "rd", of(features), 2)
    assert resume(0, features, "another") == (0, 0.0) and "The stage begins anew" in caplog.text
    assert not list(folder.iterdir()) and len(list(aside.iterdir())) == 3


def test_batches_of_features_are_planned_once_and_refuse_others(rng):
    features = rng.standard_normal((5, 2, 3)).astype(np.float32)
    plan = feature_data.plan_rows(5, 4, epochs=3, max_steps=0, seed=1)
    assert plan.shape == (6, 4) and all(set(plan[2 * epoch : 2 * epoch + 2].ravel()) == set(range(5)) for epoch in range(3))
    assert len(feature_data.plan_rows(5, 4, epochs=3, max_steps=2, seed=1)) == 2
    batches = feature_data.FeatureBatches(features, np.arange(5) * 10, plan, 2)
    first = [next(batches) for _ in range(3)]
    np.testing.assert_array_equal(first[1]["features"], features[plan[1]])
    np.testing.assert_array_equal(first[1]["example"], plan[1] * 10)
    again = feature_data.FeatureBatches(features, np.arange(5) * 10, plan, 2)
    again.set_state(batches.get_state() | {"next_index": 2})
    np.testing.assert_array_equal(next(again)["features"], first[2]["features"])
    other = feature_data.FeatureBatches(features + 1, np.arange(5) * 10, plan, 2)
    with pytest.raises(UserError, match="feature batches: they were saved with other features .fingerprint"):
        other.set_state(batches.get_state())
