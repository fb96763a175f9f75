"""Every setting of a method that the papers' rows have, ablations too: two small stages, whose losses are numbers."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import tiny_run

from proglora_jax.methods.registry import METHODS

ROWS = tiny_run.config_module("published").ROWS
# Rows that differ in backbone, order or templates train the same method.
SETTINGS = {(method, tuple(sorted(changes.items()))): row for row, (method, _, changes) in reversed(ROWS.items())}
# Sizes that a row may not be about; what it changes wins.
SMALL = {"rank": 4, "alpha": 8.0, "proj_width": 4, "recall_per_task": 6, "shared_layers": 1, "fisher_batches": 2, "experts": 2,
         "descriptor_width": 3, "top_ranks": 4, "capacity": 8, "narrow_ranks": 2, "narrow_from": 3, "shared_ranks": 2}  # fmt: skip


@pytest.mark.parametrize("name, changes", SETTINGS, ids=SETTINGS.values())
def test_two_stages(name, changes):
    known = {field for field in METHODS[name].__dataclass_fields__}
    method = METHODS[name](**{field: value for field, value in SMALL.items() if field in known} | dict(changes))
    game = literal.play(method, 0, stages=2, layers=7 if "shared_layers" in dict(changes) else 2)
    assert [int(state.stage) for state in game.ends] == [0, 1]
    assert bool(game.moments) == bool(method.phases(literal.TaskInfo(0, "", 3, 1, np.zeros(0), 0)))
    for moment in game.moments[-1:]:
        if not moment.phase.features:
            assert np.isfinite(game.in_training(moment)["loss"])
