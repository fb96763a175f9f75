"""The training step as a program: compiled once, its inputs donated, and the same on one device as on a mesh of eight."""

from __future__ import annotations

import dataclasses

import harness
import jax
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.training import loop

TRAIN = dataclasses.replace(harness.TRAIN, epsilon=1e-2)  # smooth where gradients are near zero


@pytest.mark.parametrize("name,fields,compiles", [
    ("proglora_dynamic", {}, [1, 1, 1]), ("proglora_dynamic", {"recall_targets": "recompute"}, [1, 1, 1]),
    ("proglora_static", {"pool_chunk": 1}, [1, 2])])  # fmt: skip
def test_one_program_serves_all_stages_and_donates_what_trains(name, fields, compiles):
    run = harness.Harness(harness.small(name, **fields), backbone="stub", train=TRAIN)
    state, seen = run.initial(), []
    for index in range(len(compiles)):
        state, mask = run.begin(state, index)
        trainable, frozen = trees.partition(state.params, mask)
        phase = loop.start_phase(trainable, TRAIN, run.mesh)
        frozen, memory = meshes.put_replicated((frozen, state.memory), run.mesh)
        rows = meshes.put_batch(tiny_llava.batch(run.rows(index)[:8]), run.mesh)
        for step in range(2):
            old = phase.trainable, phase.optimizer
            phase.trainable, phase.optimizer, _ = run.step(False)(*old, frozen, memory, run.llava, rows, run.control(index, step, 2))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, memory, rows, run.llava)))
        state = run.method.end_task(dataclasses.replace(state, params=trees.merge(frozen, phase.trainable)), run.info(index), run.probe)
        seen.append(run.step(False)._cache_size())
    assert seen == compiles


def second_stage(run: harness.Harness):
    """A state in its second stage with every parameter moved at random and a random memory."""
    state, _ = run.begin(run.begin(run.initial(), 0)[0], 1)
    rng = np.random.default_rng(3)
    moved = lambda leaf: (np.array(leaf) + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
    memory = jax.tree.map(np.array, state.memory)
    memory["features"] = rng.standard_normal(memory["features"].shape).astype(np.float32)
    memory["targets"][0, :, 0] = 1.0
    memory["mask"][0] = 1.0
    return dataclasses.replace(state, params=jax.tree.map(moved, state.params), memory=memory)


def test_a_mesh_of_eight_devices_gives_what_one_gives():
    """On the LLaVA itself, with the backbone spread over the fsdp and model axes, dropout and recall on."""
    results, start = [], None
    for shape in ({}, {"data": 2, "fsdp": 2, "model": 2}):
        run = harness.Harness(harness.small("proglora_dynamic"), shape=shape, train=TRAIN)
        start = start or second_stage(run)
        state, seen = run.fit(start, run.method.trainable_mask(start, run.info(1)), 1, 3)
        assert all(leaf.is_fully_replicated and len(leaf.devices()) == run.mesh.size for leaf in jax.tree.leaves(state.params))
        results.append((seen, trees.flatten(meshes.to_host(state.params))))
    kernel = run.llava.to_tree()["language"]["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 16)  # [L, D / fsdp, D / model]
    (seen, params), (also, spread) = results
    assert len(set(seen)) == 3
    np.testing.assert_allclose(also, seen, rtol=1e-5)
    for path, leaf in params.items():
        np.testing.assert_allclose(spread[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
