"""A step in which some process had no rows changes nothing: neither parameters nor optimizer state nor running statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llava

from proglora_jax.methods.base import Method, Phase
from proglora_jax.training import optim
from proglora_jax.training.processes import FAILED, FLAG, GO_ON, STOP
from proglora_jax.training.settings import TrainSettings
from proglora_jax.training.step import make_train_step


class Fit(Method):
    """Fits one vector to features, and counts the steps."""

    def feature_loss(self, params, memory, features, stage):
        """Squared distance to the features' mean."""
        return ((params["block"]["w"] - features.mean(0)) ** 2).sum(), {}, {}

    def update_running(self, running, seen, key, stage):
        """One more."""
        return {"steps": running["steps"] + 1}


@pytest.mark.parametrize("flag", [None, GO_ON, STOP, FAILED])
def test_only_a_failed_step_on_features_is_undone(flag, rng):
    train, method = TrainSettings(), Fit()
    step = make_train_step(method, train, "none", False, tiny_llava.mesh(data=1), Phase(features="z"))
    start = {"block": {"w": jnp.asarray(rng.standard_normal(3), jnp.float32)}}
    optimizer = optim.transform(train).init(start)
    batch = {"features": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
    batch |= {} if flag is None else {FLAG: jnp.asarray([GO_ON, flag, GO_ON, GO_ON], jnp.int32)}
    control = {"stage": jnp.int32(0), "step": jnp.int32(0), "key": jax.random.key(0), "running": {"steps": jnp.int32(5)},
               "rates": {name: jnp.float32(0.1) for name in ("adapter", "gate", "mm_projector")}}
    before, moments = jax.tree.map(np.array, (start, optimizer))
    trained, state, metrics = step(start, optimizer, {}, {}, None, batch, control)
    undone = flag == FAILED
    same = jax.tree.map(np.array_equal, (before, moments), jax.tree.map(np.array, (trained, state)))
    assert all(jax.tree.leaves(same)) == undone
    assert int(metrics["running"]["steps"]) == (5 if undone else 6)
    assert (FLAG not in metrics) if flag is None else int(metrics[FLAG]) == flag
