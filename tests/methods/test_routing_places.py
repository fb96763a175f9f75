"""Where and when ProgLoRA (dynamic) routes: a hidden layer, every layer for itself, every new token; and the matching loss."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world
import tiny_llava
from harness import Harness, small

from proglora_jax.adapters import gates as gating
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.training import step as steps_of


@functools.cache
def harness_of(**fields) -> Harness:
    """The method with these fields, whose programs all tests of the file share."""
    return Harness(small("proglora_dynamic", **fields))


def trained(harness: Harness, stages: int):
    """The state after some stages of the harness, and what their checkpoints hold, merged."""
    state, tree = harness.initial(), {}
    for index in range(stages):
        state, _ = harness.stage(state, index, steps=4)
        tree = trees.merge(tree, jax.tree.map(np.asarray, harness.method.to_disk(state)))
    return state, tree


def prompts(task: int, count: int = 4):
    """Evaluation prompts: rows of a task without their answers, of different lengths."""
    rows = [dataclasses.replace(row, tokens=row.tokens[row.segments != codes.ANSWER], segments=row.segments[row.segments != codes.ANSWER])
            for row in tiny_llava.rows_of(task, count, seed=5)]  # fmt: skip
    return codes.collate(rows, (16, 0), tiny_llava.PAD, (tiny_llava.SIDE, tiny_llava.SIDE))


def test_hidden_after_is_the_residual_stream_of_the_bare_model():
    llava = tiny_llava.model()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), jnp.float32)
    both = llava.hidden_after(x, 2)
    np.testing.assert_allclose(llava.language.norm(both), llava.decode(x).hidden, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(llava.hidden_after(x, 1) - both)).max() > 1e-2


def test_routing_layer_pools_that_layers_hidden_states():
    llava, batch = tiny_llava.model(), tiny_llava.batch(tiny_llava.rows_of(0, 4))
    method = small("proglora_dynamic", routing_layer=1)
    params = {"mm_projector": llava.projector_params()}
    x = tiny_llava.embed_batch(llava, params, batch)
    inputs = steps_of.gate_inputs(llava, method, x, batch, jnp.int32(0))
    hidden, mask = np.asarray(llava.hidden_after(x, 1)), batch["segments"] == codes.INSTRUCTION
    expected = np.stack([hidden[row][mask[row]].max(axis=0) for row in range(4)])
    np.testing.assert_allclose(method.route(inputs), expected, rtol=1e-6)
    shallow = steps_of.gate_inputs(llava, dataclasses.replace(method, routing_layer=0), x, batch, jnp.int32(0))
    assert np.abs(np.asarray(method.route(shallow)) - expected).max() > 0.1


def test_every_layer_gates_itself_and_restarts_bit_for_bit():
    harness = harness_of(routing_scope="per_layer")
    state, tree = trained(harness, 2)
    layers = tiny_llava.CONFIG.text_config.num_hidden_layers
    assert state.params["key"].shape == (layers, 32) and state.memory["features"].shape[2] == layers
    seen = harness.probe(state, np.arange(6))
    assert seen["w"].shape == (6, layers, 3)
    np.testing.assert_allclose(seen["w"].sum(-1), 1.0, rtol=1e-6)
    assert np.abs(seen["w"][:, 0] - seen["w"][:, 1]).max() > 1e-4, "the layers' gates are their own"
    # the first layer's feature is the maximum of the input embeddings
    rows = tiny_llava.batch([harness.rows(1)[i] for i in range(6)])
    x = np.asarray(tiny_llava.embed_batch(harness.llava, state.params, rows))
    mask = rows["segments"] == codes.INSTRUCTION
    np.testing.assert_allclose(seen["z"][:, 0], np.stack([x[i][mask[i]].max(0) for i in range(6)]), rtol=1e-6)
    # a restart gives the same weights
    again = harness.method.from_disk(tree, harness.initial(), 1)
    assert trees.digest(again.params) == trees.digest(jax.tree.map(np.asarray, state.params))


@pytest.mark.parametrize("fields", [{"routing_tokens": "multimodal_prompt"}, {"routing_layer": 1}, {"routing_scope": "per_layer"}, {}])
def test_features_that_drift_are_read_again_when_a_stage_begins(fields):
    """The mm_projector moves after the samples of task 0 were stored: image features, and hidden states behind them, are others then."""
    harness = harness_of(**fields)
    state, tree = trained(harness, 1)
    state = harness.method.end_task(state, harness.info(0), harness.probe)
    before = np.asarray(state.memory["features"][0])
    moved = jax.tree.map(lambda leaf: 3 * leaf, state.params["mm_projector"])
    state = dataclasses.replace(state, params=state.params | {"mm_projector": moved})
    started = harness.method.start_task(state, harness.info(1), harness.probe)
    rows = np.asarray(state.carry["recall_rows"]["task_00"])
    assert len(rows) == harness.method.recall_per_task and len(set(rows.tolist())) == len(rows)
    after = np.asarray(started.memory["features"][0])
    np.testing.assert_allclose(after, harness.probe.earlier(0)(started, rows)["z"], rtol=1e-6, atol=1e-6)
    assert bool(np.abs(after - before).max() > 0.05) == bool(fields) == harness.method.features_drift
    np.testing.assert_array_equal(started.memory["targets"], state.memory["targets"])
    # a restart after the stage reads the same rows again
    again = harness.method.from_disk(jax.tree.map(np.asarray, harness.method.to_disk(state)), harness.initial(), 0)
    again = harness.method.start_task(again, harness.info(1), harness.probe)
    np.testing.assert_array_equal(again.memory["features"], started.memory["features"])


def test_gates_of_layers_are_decided_at_prefill_and_recorded():
    harness = harness_of(routing_scope="per_layer")
    state, _ = trained(harness, 2)
    answer = steps_of.make_generator(harness.method, harness.mesh, 3, tiny_llava.EOS, tiny_llava.PAD, tiny_llava.VOCAB)
    params, memory = meshes.put_replicated((state.params, state.memory), harness.mesh)
    batch = prompts(1)
    out = answer(params, memory, harness.llava, meshes.put_batch(batch, harness.mesh), state.stage)
    seen = harness.probe_step(params, memory, harness.llava, meshes.put_batch(batch, harness.mesh), state.stage)
    np.testing.assert_allclose(out["gates"], np.asarray(seen["w"]).mean(axis=1), rtol=1e-5)


def test_per_token_decoding_routes_by_the_newest_token_alone():
    harness = harness_of(routing_decode="per_token")
    state, _ = trained(harness, 2)
    llava, method = harness.llava, harness.method
    # keys far apart, so that the gates, and with them the tokens, depend on what is routed by
    params = state.params | {"key": state.params["key"] * 40, "keys": jnp.asarray(state.params["keys"]) * 40}
    batch = prompts(1)
    answer = steps_of.make_generator(method, harness.mesh, 4, tiny_llava.EOS, tiny_llava.PAD, tiny_llava.VOCAB)
    out = answer(*meshes.put_replicated((params, state.memory), harness.mesh), llava, meshes.put_batch(batch, harness.mesh), state.stage)
    for row in range(4):  # by hand: read the prompt under its gates, then one token at a time under its own
        expected = by_hand(llava, method, params, batch, row, int(state.stage), steps=4)
        got = [int(token) for token in np.asarray(out["tokens"][row])]
        assert got[: len(expected)] == expected


def by_hand(llava, method, params, batch, row, stage, steps):
    """Greedy tokens of one row; each step's gates from max-pooling nothing but the newest token's embedding."""
    n = int(batch["length"][row])
    one = {name: value[row : row + 1] for name, value in batch.items()} | {"tokens": batch["tokens"][row : row + 1, :n]}
    x = tiny_llava.embed_batch(llava, params, one)

    def adapter(z):
        return method.adapter(params, method.split_gates(params, method.weights(params, z, jnp.int32(stage)), jnp.int32(stage)), None)

    mask = jnp.asarray(batch["segments"][row : row + 1, :n] == codes.INSTRUCTION)
    output = llava.decode(x, adapter=adapter(gating.route_feature(x, mask)), cache_size=n + steps)
    tokens = [int(np.argmax(llava.logits(output.hidden[:, n - 1])[0]))]
    while len(tokens) < steps and tokens[-1] != tiny_llava.EOS:
        new = llava.embed(jnp.asarray([[tokens[-1]]]), None)
        position = jnp.asarray([n + len(tokens) - 1])
        output = llava.decode(new, adapter=adapter(new[:, 0].astype(jnp.float32)), cache=output.cache, position=position)
        tokens.append(int(np.argmax(llava.logits(output.hidden[:, 0])[0])))
    return tokens


def test_matching_loss_is_the_newest_blocks_cross_entropy_over_own_rows():
    method = ProgLoRADynamic(rank=2, alpha=4.0, proj_width=5, recall_per_task=8, recall_enabled=False, match_weight=0.5, gate_bonus=3.0)
    state = world.stages(method, 3)
    batch = tiny_llava.batch(tiny_llava.rows_of(2, 3) + tiny_llava.rows_of(0, 2))
    seen = world.inputs(batch, 2, training=True, progress=0.0)
    weights = np.asarray(method.weights(state.params, method.route(seen), jnp.int32(2)))
    loss, logged = method.extra_loss(state.params, state.memory, seen, jax.random.key(0))
    expected = -np.log(weights[:3, 2]).mean()  # without the bonus, and not of replayed rows
    np.testing.assert_allclose(logged["match"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)
    gradient = jax.grad(lambda params: method.extra_loss(params, state.memory, seen, jax.random.key(0))[0])(state.params)
    moved = {path.split("/")[0] for path, leaf in trees.flatten(gradient).items() if np.abs(np.asarray(leaf)).max() > 0}
    assert moved == {"key", "query_projector"}
