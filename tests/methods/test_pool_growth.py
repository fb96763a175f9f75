"""A pool that grows chunk by chunk computes what one of full size computes, and what it computed before it grew."""

from __future__ import annotations

import dataclasses

import harness
import jax
import numpy as np
import pytest
import tiny_llava

from proglora_jax.adapters import lowrank
from proglora_jax.core import tree as trees
from proglora_jax.methods.pooled import Pooled
from proglora_jax.methods.registry import METHODS, NAMES

POOLED = [name for name in NAMES if issubclass(METHODS[name], Pooled)]
TOTAL = 4  # with chunks of two: no slot, two, two, four


class World(harness.Harness):
    """Four tasks; what trains is moved at random instead of trained."""

    def info(self, index):
        """The similarity falls with the distance of tasks."""
        similarity = np.float32([0.25, 0.5, 0.75])[3 - index :] * (1 if self.method.uses_similarity else np.nan)
        return dataclasses.replace(super().info(min(index, 2)), index=index, name=f"task{index}", similarity=similarity)

    def rows(self, task):
        """There are words for three tasks."""
        return super().rows(task % 3)

    def finished(self):
        """The states at the end of each stage."""
        state = self.initial()
        for index in range(TOTAL):
            state, mask = self.begin(state, index)
            rng = np.random.default_rng(index)
            flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}
            moved = {path: (leaf + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32) if mask[path] else leaf
                     for path, leaf in sorted(flat.items())}  # fmt: skip
            state = dataclasses.replace(state, params=trees.unflatten(moved))
            for phase in self.method.phases(self.info(index)):
                state = self.method.after_phase(state, self.info(index), phase, self.probe)
            state = self.method.end_task(state, self.info(index), self.probe)
            yield state


def slots(run, state) -> int:
    return jax.tree.leaves(state.params["pool"])[0].shape[-1] // run.method.rank


def same(ours: dict, theirs: dict) -> None:
    """Logits to rounding (longer sums of the same terms and zeros), gates of all blocks that there are."""
    count = min(ours["gates"].shape[1], theirs["gates"].shape[1])
    np.testing.assert_allclose(ours["gates"][:, :count], theirs["gates"][:, :count], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=1e-5, atol=1e-5 * np.abs(theirs["logits"]).max())


@pytest.mark.parametrize("name", POOLED)
def test_capacity_past_the_first_chunk_is_exact(name):
    batch = tiny_llava.batch([row for task in range(3) for row in tiny_llava.rows_of(task, 3)])
    whole, grown = (World(harness.small(name, pool_chunk=chunk), total=TOTAL, count=8, backbone="stub") for chunk in (0, 2))
    seen, answers = [], []
    for full, part in zip(whole.finished(), grown.finished(), strict=True):
        seen.append((slots(whole, full), slots(grown, part)))
        answers.append(grown.answer(part, batch))
        same(answers[-1], whole.answer(full, batch))
        if seen[-1][1] == 2:
            wider = dataclasses.replace(part, params=part.params | {"pool": lowrank.grow_pool(part.params["pool"], 4, grown.method.rank)})
            same(grown.answer(wider, batch), answers[-1])
    assert seen == [(3, 0), (3, 2), (3, 2), (3, 4)]
    moved = [np.abs(one["logits"] - other["logits"]).max() for one, other in zip(answers, answers[1:])]
    assert min(moved) > 1e-3, "each stage adds something"
