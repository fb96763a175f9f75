"""What an extra loss sees of a batch's forward passes, and what another pass with other parameters gives."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.views import Phase
from proglora_jax.models.layers import gather_positions
from proglora_jax.training import losses, loop
from proglora_jax.core import tree as trees

TRAIN = dataclasses.replace(harness.TRAIN, epsilon=1e-2)


@dataclasses.dataclass(frozen=True)
class Watcher(LoRA):
    """LoRA that logs what its extra loss is given; its memory holds other parameters, `gate` is the gate of the other pass."""

    gate: float = 1.0

    name: ClassVar[str] = "watcher"

    def init(self, targets, projector, total, seed):
        """A memory with parameters of its own."""
        state, rng = super().init(targets, projector, total, seed), np.random.default_rng(5)
        moved = lambda leaf: jnp.asarray(leaf + 0.2 * rng.standard_normal(np.shape(leaf)), jnp.float32)
        return dataclasses.replace(state, memory=jax.tree.map(moved, state.params))

    def phases(self, info):
        """One, in which the states of all positions are there."""
        return (Phase(states=True),)

    def extra_loss(self, params, memory, inputs, key, passes=None):
        """Half of the cross-entropy again, and what both passes gave."""
        nll = losses.token_nll(passes.student.logits, passes.labels, passes.label_mask)
        gates = None if self.gate == 1.0 else self.gates(params, memory, inputs) | {"new": jnp.full((1, 1, self.rank), self.gate)}
        other = passes.again(memory, gates)
        theirs = losses.token_nll(passes.head(other.hidden), passes.labels, passes.label_mask)
        at = gather_positions(other.states, jnp.zeros_like(passes.labels))
        logged = {"own": passes.token_mean(nll), "theirs": passes.token_mean(theirs), "first": jnp.abs(at).sum(), "dry": passes.token_mean(
            losses.token_nll(passes.again(params).logits, passes.labels, passes.label_mask))}
        return 0.5 * logged["own"], logged


def metrics_of(method: Watcher, **train) -> dict[str, float]:
    """One step's metrics on eight rows with unequal numbers of labels and weights of their own."""
    run = harness.Harness(method, backbone="stub", train=dataclasses.replace(TRAIN, **train))
    state, mask = run.begin(run.initial(), 0)
    trainable, frozen = trees.partition(state.params, mask)
    phase = loop.start_phase(trainable, run.train, run.mesh)
    frozen, memory = meshes.put_replicated((frozen, state.memory), run.mesh)
    rows = tiny_llava.batch(run.rows(0)[:8]) | {"weight": np.float32([1, 2, 1, 1, 0.5, 1, 1, 3])}
    *_, metrics = run.step(False, Phase(states=True))(
        phase.trainable, phase.optimizer, frozen, memory, run.llava, meshes.put_batch(rows, run.mesh), run.control(0, 0, 2))
    return {name: float(value) for name, value in metrics.items()} | {"run": run, "state": state, "rows": rows}


def weighted(run, params, state, rows) -> float:
    """Mean over supervised tokens with row weights, from the forward pass at test."""
    out = run.forward(params, state.memory, run.llava, rows, state.stage)["logits"]
    nll = losses.token_nll(out, rows["labels"], rows["label_mask"])
    return float((nll.sum(1) * rows["weight"]).sum() / rows["label_mask"].sum())


@pytest.mark.parametrize("parts", [1, 4])
def test_both_passes_of_a_batch(parts):
    """Means are the whole batch's however it is split; the other pass has its own block and its own projector, and no dropout."""
    seen = metrics_of(Watcher(rank=4, alpha=8.0, dropout=0.2), micro_batches=parts)
    run, state, rows = seen["run"], seen["state"], seen["rows"]
    np.testing.assert_allclose(seen["own"], seen["ce"], rtol=1e-5)
    np.testing.assert_allclose(seen["loss"], 1.5 * seen["ce"], rtol=1e-5)
    np.testing.assert_allclose(seen["theirs"], weighted(run, state.memory, state, rows), rtol=1e-5)
    np.testing.assert_allclose(seen["dry"], weighted(run, state.params, state, rows), rtol=1e-5)
    blind = state.memory | {"mm_projector": state.params["mm_projector"]}
    assert abs(seen["theirs"] - weighted(run, blind, state, rows)) > 1e-3, "the projector is part of the other pass"
    assert np.isfinite(seen["first"]) and seen["first"] > 0


def test_the_other_pass_takes_other_gates():
    closed = metrics_of(Watcher(rank=4, alpha=8.0, dropout=0.0, gate=0.0))
    run, state, rows = closed["run"], closed["state"], closed["rows"]
    bare = jax.tree.map(np.zeros_like, state.memory["block"])
    np.testing.assert_allclose(closed["theirs"], weighted(run, state.memory | {"block": bare}, state, rows), rtol=1e-5)


def test_what_is_not_used_is_not_computed():
    """A method that looks at no pass compiles to the program of plain LoRA."""

    @dataclasses.dataclass(frozen=True)
    class Blind(LoRA):
        name: ClassVar[str] = "blind"

        def extra_loss(self, params, memory, inputs, key, passes=None):
            passes.again(params)
            return jnp.float32(0), {}

    texts = []
    for method in (LoRA(rank=4, alpha=8.0), Blind(rank=4, alpha=8.0)):
        run = harness.Harness(method, backbone="stub", train=TRAIN)
        state, mask = run.begin(run.initial(), 0)
        trainable, frozen = trees.partition(state.params, mask)
        phase = loop.start_phase(trainable, run.train, run.mesh)
        rows = tiny_llava.batch(run.rows(0)[:8])
        lowered = run.step(False).lower(phase.trainable, phase.optimizer, frozen, {}, run.llava, rows, run.control(0, 0, 2))
        texts.append(lowered.compile().cost_analysis()["flops"])
    assert texts[0] == texts[1] > 0
