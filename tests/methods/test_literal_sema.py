"""SEMA against its equations: gates of a layer, where modules are added, descriptors and their statistics; and what it does over stages."""

from __future__ import annotations

import dataclasses

import jax
import literal
import numpy as np
import oracle
import pytest
import tiny_llava
from literal import softmax

from proglora_jax.adapters import descriptors
from proglora_jax.core import tree as trees
from proglora_jax.methods.sema import SEMA

SMALL = dict(rank=2, alpha=3.0, dropout=0.0, descriptor_width=3, detect_batch=5, detect_samples=11)


def modules(game, layer: int, upto: int) -> list[int]:
    """Tasks whose modules a layer has."""
    return [task for task in range(upto + 1) if game.ends[upto].memory["modules"][layer][task]]


def delta_of(game, newest, upto: int, batch, has=None):
    """The literal delta with the modules of the tasks up to `upto`, the last one's parameters from `newest`."""
    has = has or (lambda layer: modules(game, layer, upto))
    own = lambda task: newest if task == upto else game.ends[task].params

    def delta(row, layer, name, x, h):
        xbar = h[literal.prompt(batch, row)].mean(0)
        tasks = has(layer)
        logits = np.array([xbar @ np.float64(own(task)["row"][layer]) + own(task)["row_bias"][layer] for task in tasks])
        gates = softmax(logits)
        return game.method.scale * sum(gate * oracle.pair(own(task)["block"], layer, name, x) for gate, task in zip(gates, tasks))

    return delta


@pytest.mark.parametrize("seed, fields", [
    (0, {"threshold": 0.0}), (1, {"threshold": 0.0, "layer_share": 0.7}), (2, {"threshold": 1.5}),
    (3, {"threshold": 1.0, "layer_share": 1.0, "expansion": "sequential", "most_turns": 2})])  # fmt: skip
def test_forward_and_both_losses(seed, fields):
    game = literal.play(SEMA(**(SMALL | fields)), seed, stages=2 + seed % 2)
    assert {moment.phase.kind for moment in game.moments} == {"func", "rd"}
    last = game.ends[-1]
    tested = literal.scores(game, last.params["mm_projector"], delta_of(game, last.params, len(game.ends) - 1, game.batch))
    oracle.close(game.at_test(), tested, "scores at test")
    for moment in [moment for moment in game.moments if not moment.phase.features and moment.stage == len(game.ends) - 1][-1:]:
        has = lambda layer, seen=moment.state.memory["modules"]: [task for task in range(len(game.ends)) if seen[layer][task]]
        delta = delta_of(game, moment.state.params, len(game.ends) - 1, game.batch, has)
        ce = oracle.cross_entropy(game.batch, literal.scores(game, moment.state.params["mm_projector"], delta))
        oracle.close(game.in_training(moment)["loss"], ce, "loss")
    for moment in [moment for moment in game.moments if moment.phase.features]:
        grow = game.method.growing(len(game.llava.layers["down"]))
        x = np.random.default_rng(seed).standard_normal((7, grow, game.llava.table.shape[1])).astype(np.float32)
        found, _, seen = game.method.feature_loss(moment.state.params, moment.state.memory, x, np.int32(moment.stage))
        expected = np.array([[reconstruction(moment.state.params["descriptor"], e, x[b, e]) for e in range(grow)] for b in range(7)])
        oracle.close(seen["errors"], expected)
        oracle.close(found, sum(expected[:, e].mean() for e in range(grow) if moment.state.memory["training"][-grow + e]))


def reconstruction(descriptor, layer: int, x: np.ndarray) -> float:
    """Mean squared error of one auto-encoder."""
    part = lambda name, leaf: np.float64(descriptor[name][leaf][layer])
    back = (np.float64(x) @ part("encoder", "kernel") + part("encoder", "bias")) @ part("decoder", "kernel") + part("decoder", "bias")
    return float(((back - x) ** 2).mean())


@pytest.mark.parametrize("seed, threshold", [(0, 0.8), (1, 1.2), (2, 2.5), (4, 0.5), (5, 1.6)])
def test_a_layer_grows_where_every_module_finds_a_batch_new(seed, threshold):
    """From the task's rows to the marks, by the errors that were on record when each module's descriptor ended its training."""
    game = literal.play(SEMA(**SMALL, threshold=threshold, layer_share=1.0), seed, stages=2)
    layers, ended = len(game.llava.layers["down"]), game.ends[0]
    record = game.moments[1].state.carry["running"]  # of the first task's descriptors
    count = min(int(record["count"]), len(record["errors"]))
    errors = np.float64(record["errors"])[len(record["errors"]) - count :]
    batch = tiny_llava.batch([game.run.rows(1)[i] for i in first_rows(game)])
    expected = np.zeros(layers)
    z = np.zeros((len(batch["tokens"]), layers))
    for row in range(len(z)):
        _, entered = literal.states(game, ended.params["mm_projector"], batch, delta_of(game, ended.params, 0, batch), row)
        for layer in range(layers):
            error = reconstruction(ended.params["descriptor"], layer, entered[layer][literal.prompt(batch, row)].mean(0))
            z[row, layer] = abs(error - errors[:, layer].mean()) / errors[:, layer].std(ddof=1) if count >= 3 else 0.0
    for start in range(0, len(z), 5):
        expected = np.maximum(expected, z[start : start + 5].mean(0) > threshold)
    np.testing.assert_array_equal(game.starts[1].memory["modules"][:, 1], expected)
    np.testing.assert_array_equal(game.starts[1].memory["training"], expected)


def first_rows(game) -> np.ndarray:
    """The rows that the second task's first pass asked for."""
    return game.asked[1][:11]


def test_the_rule_grows_some_layers_and_not_others():
    seen = [np.asarray(literal.play(SEMA(**SMALL, threshold=1.2, layer_share=1.0), seed, stages=2).starts[1].memory["training"])
            for seed in range(4)]
    flat = np.concatenate(seen)
    assert 0 < flat.sum() < len(flat)


def test_what_rests_rests():
    """Lower layers keep the first task's module; old modules, rows and descriptors stay bit by bit while later tasks train."""
    game = literal.play(SEMA(**SMALL, threshold=0.0), 0, stages=3, layers=3)
    assert [modules(game, layer, 2) for layer in range(3)] == [[0], [0], [0, 1, 2]]
    for name in ("q_proj", "up_proj"):
        for task, end in enumerate(game.ends[:2]):
            kept = game.method.block(game.ends[2], task)[name]
            np.testing.assert_array_equal(kept["a"], end.params["block"][name]["a"])
            np.testing.assert_array_equal(kept["b"], end.params["block"][name]["b"])
    first = game.moments[0].state.params
    for task, end in enumerate(game.ends[:2]):
        np.testing.assert_array_equal(game.ends[2].params["rows"][:, task], end.params["row"])
        stored = trees.flatten(game.ends[2].params["descriptors"])
        for path, leaf in trees.flatten(end.params["descriptor"]).items():
            np.testing.assert_array_equal(stored[path][:, task], leaf)
    assert not np.any(game.ends[1].params["block"]["q_proj"]["b"][:2]) and np.any(first["block"]["q_proj"]["b"][:2])


@pytest.mark.parametrize("threshold, layers", [(0.0, [[0, 1, 2], [2], [2]]), (1e9, [[0, 1, 2], [], []])])
def test_checkpoints_hold_the_modules_that_there_are(threshold, layers):
    """A task's block is saved in the layers that grew; files of earlier versions, with all layers, are read too."""
    game, tree, earlier = literal.play(SEMA(**SMALL, threshold=threshold), 0, stages=3, layers=3), {}, {}
    for task, end in enumerate(game.ends):
        saved = game.method.to_disk(end)
        block = saved["pool"].get(f"block_{task:02d}", {"q_proj": {"a": ()}})
        assert len(block["q_proj"]["a"]) == len(layers[task])
        tree = trees.merge(tree, saved)
        whole = [moment.state.params["block"] for moment in game.moments if moment.stage == task][-1]
        earlier = trees.merge(earlier, saved | {"pool": {f"block_{task:02d}": whole}})
    restored = game.method.from_disk(tree, game.run.initial(), 2)
    assert trees.digest(jax.tree.map(np.asarray, restored.params)) == trees.digest(jax.tree.map(np.asarray, game.ends[2].params))
    old = game.method.from_disk(earlier, game.run.initial(), 2)
    assert trees.digest(jax.tree.map(np.asarray, old.params)) == trees.digest(jax.tree.map(np.asarray, restored.params))


def test_nothing_new_leaves_the_projector_alone_to_train():
    method = SEMA(**SMALL, threshold=1e9)
    game = literal.play(method, 0, stages=2)
    assert [(moment.stage, moment.phase.name) for moment in game.moments] == [(0, "func"), (0, "rd"), (1, "func")]
    one, two = game.ends
    changed = [path for path, leaf in trees.flatten(two.params).items() if path.split("/")[0] in ("mm_projector",)
               and not np.array_equal(leaf, trees.flatten(one.params)[path])]  # fmt: skip
    assert changed
    # One module per layer has gate 1: the method is a plain block then, and can be folded.
    folded = method.fold(two, 0)
    np.testing.assert_allclose(folded["q_proj"]["b"][:, :2], method.scale * one.params["block"]["q_proj"]["b"], rtol=1e-6)
    held = dataclasses.replace(method, train_mm_projector=False)
    assert held.skips(game.starts[1], game.run.info(1), held.phases(game.run.info(1))[0])


def test_layers_grow_one_after_the_other_where_asked():
    game = literal.play(SEMA(**SMALL, threshold=0.0, expansion="sequential", layer_share=1.0, most_turns=3), 0, stages=2, layers=2)
    func = [moment for moment in game.moments if moment.stage == 1 and not moment.phase.features]
    assert [moment.phase.name for moment in func] == ["func", "func1"]
    np.testing.assert_array_equal([moment.state.memory["training"] for moment in func], np.eye(2))
    np.testing.assert_array_equal(game.ends[1].memory["modules"][:, 1], [1, 1])
    before, after = func[0].state.params["block"]["q_proj"]["a"], func[1].state.params["block"]["q_proj"]["a"]
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def test_statistics_are_those_of_the_newest_errors(rng):
    buffer = np.zeros((6, 2), np.float32)
    values = rng.uniform(0, 1, (9, 2)).astype(np.float32)
    for start in range(0, 9, 3):
        buffer = descriptors.push(buffer, values[start : start + 3])
        mean, deviation = descriptors.statistics(buffer, np.int32(start + 3))
        newest = values[: start + 3][-6:]
        np.testing.assert_allclose(mean, newest.mean(0), rtol=1e-5)
        np.testing.assert_allclose(deviation, newest.std(0, ddof=1), rtol=1e-5)
    assert not np.any(descriptors.deviations(np.ones(2), np.zeros(2), np.ones(2), np.full(2, 2.0)))  # fewer than three on record
