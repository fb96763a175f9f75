"""Replay: how many samples, which ones, and how they join the current rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.data.replay import mix_rows, replay_count, replay_indices, task_rows
from proglora_jax.data.schema import Example


@pytest.mark.parametrize(
    ("similarity", "per_task", "count"),
    [
        (0.0, 200, 200), (1.0, 200, 0), (0.5, 200, 100), (0.9975, 200, 1), (-0.2, 200, 200), (1.3, 200, 0),
        (0.9, 25, 3), (0.7, 5, 2), (0.5, 5, 3),
    ],  # fmt: skip
)
def test_counts_round_half_up_and_are_clipped(similarity, per_task, count):
    assert replay_count(similarity, per_task) == count


def test_bad_counts():
    for similarity, per_task in ((math.nan, 5), (0.5, -1)):
        with pytest.raises(UserError):
            replay_count(similarity, per_task)


def test_selections_are_prefixes_of_one_permutation():
    whole = replay_indices(50, 50, 0, "GQA")
    assert sorted(whole) == list(range(50))
    for count in range(51):
        assert np.array_equal(replay_indices(50, count, 0, "GQA"), whole[:count])
    assert len(replay_indices(5, 200, 0, "GQA")) == 5
    assert not np.array_equal(whole, replay_indices(50, 50, 0, "VizWiz")) and not np.array_equal(whole, replay_indices(50, 50, 1, "GQA"))


def test_mixed_rows_carry_task_index_and_weight():
    examples = [[Example(f"{t}{i}", t, None, (("q", "a"),)) for i in range(6)] for t in ("GQA", "VizWiz")]
    replayed = task_rows(examples[0], 0, positions=replay_indices(6, 2, 0, "GQA"))
    rows = mix_rows(task_rows(examples[1], 1), [replayed], weight=2.0)
    assert len(rows) == 8 and [r.weight for r in rows] == [1.0] * 6 + [2.0] * 2 and [r.task_id for r in rows] == [1] * 6 + [0] * 2
    assert all(examples[r.task_id][r.index] is r.example for r in rows)
    for bad in (-1.0, math.nan):
        with pytest.raises(UserError, match="recall_weight"):
            mix_rows([], [], bad)
