"""Each method's forward pass and extra loss against a literal numpy version of its equations, over random shapes and stages."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from oracle import close, play

from proglora_jax.methods.ewc import EWC
from proglora_jax.methods.lwf import LwF
from proglora_jax.methods.mocl import MoCL
from proglora_jax.methods.olora import OLoRA
from proglora_jax.methods.proglora_light import ProgLoRALight


def cases(*variations: dict):
    """The paper's values over two seeds, each variation on a third."""
    return pytest.mark.parametrize("seed, fields", [(0, {}), (1, {}), *((2 + i % 2, fields) for i, fields in enumerate(variations))])


def compare(game, test_delta, train_delta, extra: float) -> None:
    """Scores at test, cross-entropy and loss of a training step; the adapter and the extra loss matter."""
    projector = game.trained[-1]["mm_projector"]
    tested, trained = (oracle.at_labels(game, oracle.states(game, projector, game.batch, delta), game.batch)[1]
                       for delta in (test_delta, train_delta))  # fmt: skip
    close(game.answer["logits"], tested, "scores at test")
    ce = oracle.cross_entropy(game.batch, trained)
    close(game.answer["ce"], ce, "cross-entropy")
    close(game.answer["loss"], ce + extra, "loss")
    bare = oracle.states(game, projector, game.batch, lambda row, layer, name, x: 0.0)
    assert np.abs(oracle.at_labels(game, bare, game.batch)[1] - tested).max() > 0.05


def lora_delta(params, scale: float):
    return lambda row, layer, name, x: scale * oracle.pair(params["block"], layer, name, x)


# ------------------------------------------------------------------------------------------------------------------ LwF, EWC


@cases({"temperature": 0.7, "distill_weight": 0.3}, {"mode": "hidden", "distill_weight": 2.5})
def test_lwf(seed, fields):
    game = play(LwF, seed, **fields)
    method, (teacher, student) = game.method, game.trained[-2:]
    seen = [oracle.at_labels(game, oracle.states(game, params["mm_projector"], game.batch, lora_delta(params, method.scale)), game.batch)
            for params in (teacher, student)]  # fmt: skip
    loss = np.zeros(game.batch["labels"].shape)
    for row in range(loss.shape[0]):
        for slot in range(loss.shape[1]):
            if method.mode == "hidden":
                loss[row, slot] = np.mean((seen[1][0][row, slot] - seen[0][0][row, slot]) ** 2)
                continue
            p, q = (oracle.log_softmax(scores[row, slot] / method.temperature) for _, scores in seen)
            loss[row, slot] = method.temperature**2 * sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(len(p)))
    extra = method.distill_weight * oracle.token_mean(game.batch, loss)
    assert extra > 0.01
    delta = lora_delta(student, method.scale)
    compare(game, delta, delta, extra)


@cases({"accumulate": "online", "gamma": 0.6}, {"scope": "lora"}, {"train_mm_projector": False})
def test_ewc(seed, fields):
    """The penalty is the sum over all old tasks, though the product keeps one quadratic."""
    rng, given = np.random.default_rng(seed), []

    def squares(state, names):
        tree = {name: state.params[name] for name in names}
        given.append({path: (rng.random(np.shape(leaf)) ** 8).astype(np.float32) * (rng.random(np.shape(leaf)) > 0.2)
                      for path, leaf in oracle.trees.flatten(tree).items()})  # fmt: skip
        return oracle.trees.unflatten(given[-1])

    game = play(EWC, seed, squares, stages=3 if seed else 2, penalty_weight=3.0, fisher_batches=3, fisher_batch_size=4, **fields)
    ends, now = ([oracle.trees.flatten(params) for params in game.trained[:-1]], oracle.trees.flatten(game.trained[-1]))
    held = {"block", "mm_projector"} if "scope" not in fields and "train_mm_projector" not in fields else {"block"}
    assert {path.split("/")[0] for path in given[0]} == held
    penalty, count = 0.0, len(given)
    for task in range(count):
        for path, fisher in given[task].items():
            if "gamma" in fields:  # one anchor, older information fades
                penalty += np.sum(0.6 ** (count - 1 - task) * np.float64(fisher) * (np.float64(now[path]) - ends[-1][path]) ** 2)
            else:
                penalty += np.sum(np.float64(fisher) * (np.float64(now[path]) - ends[task][path]) ** 2)
    delta = lora_delta(game.trained[-1], game.method.scale)
    compare(game, delta, delta, 0.5 * 3.0 * penalty)
    assert [(len(numbers), size, kind) for numbers, size, kind in game.asked] == [(12, 4, "batch")] * count


# ---------------------------------------------------------------------------------------------------------------- O-LoRA, MoCL


@cases({"reduction": "mean", "norm_weight": 0.2, "orthogonal_weight": 3.0}, {"train_forward": "current_only"})
def test_olora(seed, fields):
    game = play(OLoRA, seed, **fields)
    method, blocks = game.method, [params["block"] for params in game.trained]

    def fused(row, layer, name, x):
        return method.scale * sum(oracle.pair(block, layer, name, x) for block in blocks)

    def alone(row, layer, name, x):
        return method.scale * oracle.pair(blocks[-1], layer, name, x)

    overlap, entries, norms = 0.0, 0, 0.0
    for name in blocks[-1]:
        for layer in range(len(blocks[-1][name]["a"])):
            newest = np.float64(blocks[-1][name]["a"][layer]).T  # [r, d_in], as the paper writes it
            for old in blocks[:-1]:
                product = newest @ np.float64(old[name]["a"][layer])
                overlap, entries = overlap + np.abs(product).sum(), entries + product.size
            norms += sum(np.linalg.norm(np.float64(blocks[-1][name][factor][layer])) for factor in "ab")
    overlap = overlap / entries if method.reduction == "mean" else overlap
    extra = method.orthogonal_weight * overlap + method.norm_weight * norms
    compare(game, fused, alone if method.train_forward == "current_only" else fused, extra)


@cases({"weights": "cosine", "match_weight": 0.4}, {"batch_mean": True}, {"use_scale": False, "train_old_keys": True, "match_weight": 0.0})
def test_mocl(seed, fields):
    game = play(MoCL, seed, **fields)
    method, last = game.method, game.trained[-1]
    blocks = [params["block"] for params in game.trained]
    keys = [np.float64(params["key"]) for params in game.trained]
    if method.train_old_keys:
        keys = [*np.float64(last["keys"][: game.stage]), keys[-1]]
        assert np.abs(keys[0] - game.trained[0]["key"]).max() > 0.01
    x = oracle.embeddings(game, last["mm_projector"], game.batch)
    cosines = np.zeros((len(x), len(keys)))
    for row in range(len(x)):
        query = x[row][oracle.instruction(game.batch, row)].mean(0)
        for k, key in enumerate(keys):
            cosines[row, k] = query @ key / (np.linalg.norm(query) * np.linalg.norm(key))
    weights = cosines if method.weights == "cosine" else np.exp(oracle.log_softmax(8 * cosines))
    weights = np.broadcast_to(weights.mean(0), weights.shape) if method.batch_mean else weights
    close(game.answer["gates"][:, : len(keys)], weights, "gates")
    scale = method.alpha / method.rank if method.use_scale else 1.0

    def delta(row, layer, name, x):
        return scale * sum(weights[row, k] * oracle.pair(block, layer, name, x) for k, block in enumerate(blocks))

    compare(game, delta, delta, method.match_weight * np.mean(1 - cosines[:, -1]))


# ------------------------------------------------------------------------------------------------------------------- ProgLoRA


def proglora_weights(game, params, keys, z):
    """Eqs. 5 and 6 of ProgLoRA for one pooled feature."""
    first, second, norm = (params["query_projector"][name] for name in ("linear_1", "linear_2", "norm"))
    inner = z @ np.float64(first["kernel"]) + first["bias"]
    h = inner / (1 + np.exp(-inner)) @ np.float64(second["kernel"]) + second["bias"]
    h = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * norm["scale"] + norm["bias"]
    return np.exp(oracle.log_softmax(np.array([h @ key for key in keys]) / np.sqrt(len(z))))


@cases({"bottom": "none"}, {"bottom": "shared_frozen_after_first"}, {"tie_bottom_layers": True, "shared_layers": 2})
def test_proglora_light(seed, fields):
    phi = 4
    game = play(ProgLoRALight, seed, proj_width=6, recall_per_task=phi, **({"shared_layers": 1} | fields))
    low = game.method.shared_layers
    method, last = game.method, game.trained[-1]
    keys = [np.float64(params["key"]) for params in game.trained]

    def pooled(batch, row):
        x = oracle.embeddings(game, last["mm_projector"], batch)  # words do not depend on the projector
        return x[row][oracle.instruction(batch, row)].max(0)

    weights = np.stack([proglora_weights(game, last, keys, pooled(game.batch, row)) for row in range(5)])
    close(game.answer["gates"][:, : len(keys)], weights, "gates")

    def delta(row, layer, name, x):
        if layer < low:
            shared = last.get("shared")
            return 0.0 if shared is None else method.scale * oracle.pair(shared, 0 if method.tie_bottom_layers else layer, name, x)
        deltas = [oracle.pair(params["block"], layer - low, name, x) for params in game.trained]
        return method.scale * sum(weights[row, n] * own for n, own in enumerate(deltas))

    divergences = []
    for task, numbers in enumerate(game.asked):
        rows = oracle.tiny_llava.rows_of(task, 12, seed)
        batch = oracle.tiny_llava.batch([rows[i] for i in numbers])
        assert len(set(numbers)) == phi, "each old task has phi samples, however alike the tasks are"
        for row in range(phi):
            z = pooled(batch, row)
            then, now = proglora_weights(game, game.trained[task], keys[: task + 1], z), proglora_weights(game, last, keys, z)
            divergences.append(sum(then[n] * (np.log(then[n]) - np.log(now[n])) for n in range(task + 1)))
    compare(game, delta, delta, 2.0 * np.mean(divergences))
