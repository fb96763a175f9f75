"""Runs of methods with several phases that are killed inside each of them: what comes out is the uninterrupted run's, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import here  # noqa: F401

from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual import feature_data, phases
from proglora_jax.data.errors import UserError

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
