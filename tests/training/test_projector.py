"""With which projector a task begins: kept, the backbone's own, or random as CoIN's scripts left it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proglora_jax.training.projector import projector_for_task


def tree(value: float):
    """A projector of one value."""
    part = lambda d_in: {"kernel": np.full((d_in, 40), value, np.float32), "bias": np.full(40, value, np.float32)}
    return {"linear_1": part(30), "linear_2": part(40)}


@pytest.mark.parametrize("how", ["previous", "stage1", "random"])
def test_the_first_task_starts_with_what_there_is(how):
    last = tree(2.0)
    assert projector_for_task(how, last, tree(1.0), 0, 0) is last


def test_later_tasks_start_as_the_flag_says():
    last, own = tree(2.0), tree(1.0)
    assert projector_for_task("previous", last, own, 3, 0) is last and projector_for_task("stage1", last, own, 3, 0) is own


def test_random_ones_are_drawn_as_torch_begins_a_linear():
    torch.manual_seed(0)
    found = projector_for_task("random", tree(2.0), tree(1.0), 1, 0)
    for name, leaf in found.items():
        d_in, d_out = leaf["kernel"].shape
        theirs = torch.nn.Linear(d_in, d_out)
        for ours, expected in ((leaf["kernel"], theirs.weight), (leaf["bias"], theirs.bias)):
            expected = expected.detach().numpy()
            assert ours.dtype == np.float32 and np.abs(ours).max() <= d_in**-0.5 and np.abs(expected).max() <= d_in**-0.5, name
            np.testing.assert_allclose(ours.std(), expected.std(), rtol=0.25)
            assert abs(ours.mean()) < 0.5 * d_in**-0.5
    again, other = (projector_for_task("random", tree(2.0), tree(1.0), index, 0) for index in (1, 2))
    assert all(np.array_equal(again[name]["kernel"], found[name]["kernel"]) for name in found)
    assert not any(np.array_equal(other[name]["kernel"], found[name]["kernel"]) for name in found)
