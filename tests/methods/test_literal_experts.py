"""MoELoRA and BranchLoRA against their equations, token by token: gates, trunk and branches, the task selector, which branches freeze."""

from __future__ import annotations

import literal
import numpy as np
import oracle
import pytest
import tiny_llava
from literal import cosine, softmax

from proglora_jax.data import batch as codes
from proglora_jax.methods.branchlora import BranchLoRA
from proglora_jax.methods.moelora import MoELoRA

INPUTS = ("token", "first_token", "mean_prompt")


def read(x: np.ndarray, batch: dict, row: int, t: int, router_input: str) -> np.ndarray:
    """What the router of a linear reads at position t."""
    return {"token": x[t], "first_token": x[0], "mean_prompt": x[literal.prompt(batch, row)].mean(0)}[router_input]


def verify(game, delta_at_test, delta_in_training, moment, extra: float) -> None:
    """Scores at test and the loss of a training step, and that the adapter matters."""
    tested = literal.scores(game, game.ends[-1].params["mm_projector"], delta_at_test)
    oracle.close(game.at_test(), tested, "scores at test")
    trained = literal.scores(game, moment.state.params["mm_projector"], delta_in_training)
    found = game.in_training(moment)
    oracle.close(found["ce"], oracle.cross_entropy(game.batch, trained), "cross-entropy")
    oracle.close(found["loss"], oracle.cross_entropy(game.batch, trained) + extra, "loss")
    bare = literal.scores(game, game.ends[-1].params["mm_projector"], lambda row, layer, name, x, h: 0.0)
    assert np.abs(bare - tested).max() > 0.02


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_moelora(seed, router_input):
    count = 2 + seed
    game = literal.play(MoELoRA(rank=2 * count, alpha=3.0, dropout=0.0, experts=count, router_input=router_input), seed, stages=1 + seed)
    params = game.ends[-1].params

    def delta(row, layer, name, x, h):
        block, router = params["block"][name], np.float64(params["router"][name][layer])
        out = []
        for t in range(len(x)):
            gates = softmax(read(x, game.batch, row, t, router_input) @ router)
            y = 0.0
            for k in range(count):
                a, b = np.float64(block["a"][layer][:, 2 * k : 2 * k + 2]), np.float64(block["b"][layer][2 * k : 2 * k + 2])
                y = y + gates[k] * ((x[t] @ a) @ b)
            out.append(3.0 / (2 * count) * y)
        return np.stack(out)

    verify(game, delta, delta, game.moments[-1], 0.0)


def branch_delta(method, params, task_of):
    """The literal delta; `task_of` (row) -> (router of each linear, batch)."""

    def delta(row, layer, name, x, h):
        routers, batch = task_of(row)
        out = []
        for t in range(len(x)):
            logits = read(x, batch, row, t, method.router_input) @ np.float64(routers[name][layer])
            best = np.argsort(-logits, kind="stable")[: method.topk]
            gates = softmax(logits) if method.renorm == "softmax_then_mask" else dict(zip(best, softmax(logits[best])))
            u = x[t] @ np.float64(params["trunk"][name][layer])
            out.append(method.scale * sum(gates[k] * (u @ np.float64(params["branches"][name][layer][k])) for k in best))
        return np.stack(out)

    return delta


def selected(game, row: int) -> int:
    """The task whose keys are nearest."""
    batch, found = game.batch, []
    text = literal.words(game, batch, row)[batch["segments"][row] == codes.INSTRUCTION].mean(0)
    for end in game.ends:
        score = cosine(text, end.params["text_key"])
        if batch["image_mask"][row]:
            score += cosine(literal.features(game, batch["image"][row]).mean(0), end.params["image_key"])
        found.append(score)
    return int(np.argmax(found))


@pytest.mark.parametrize("seed, fields", [
    (0, {}), (1, {"renorm": "softmax_then_mask", "align_weight": 0.3}), (2, {"router_input": "first_token", "topk": 1}),
    (3, {"router_input": "mean_prompt"})])  # fmt: skip
def test_branchlora(seed, fields):
    game = literal.play(BranchLoRA(**({"rank": 6, "alpha": 4.0, "dropout": 0.0, "experts": 3} | fields)), seed, stages=2 + seed % 2)
    method, moment, params = game.method, game.moments[-1], game.ends[-1].params
    chosen = [selected(game, row) for row in range(4)]
    at_test = branch_delta(method, params, lambda row: (game.ends[chosen[row]].params["router"], game.batch))
    in_training = branch_delta(method, moment.state.params, lambda row: (moment.state.params["router"], game.batch))
    extra = 0.0
    for row in range(4):
        text = literal.words(game, game.batch, row)[game.batch["segments"][row] == codes.INSTRUCTION].mean(0)
        extra += 1 - cosine(text, moment.state.params["text_key"])
        if game.batch["image_mask"][row]:
            extra += 1 - cosine(literal.features(game, game.batch["image"][row]).mean(0), moment.state.params["image_key"])
    verify(game, at_test, in_training, moment, method.align_weight * extra / 4)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_branches_that_a_task_used_most_freeze(seed):
    game = literal.play(BranchLoRA(rank=4, alpha=4.0, dropout=0.0, experts=4, topk=1, mass_samples=5), seed, stages=2)
    frozen = {name: np.zeros((len(game.llava.layers["down"]), 4)) for name in ("q_proj", "up_proj")}
    for stage, end in enumerate(game.ends):
        rows = game.run.rows(stage)
        batch = tiny_llava.batch([rows[i] for i in game.asked[stage]])
        mass = {name: np.zeros_like(value) for name, value in frozen.items()}
        plain = branch_delta(game.method, end.params, lambda row, end=end, batch=batch: (end.params["router"], batch))

        def delta(row, layer, name, x, h, end=end, batch=batch, mass=mass, plain=plain):
            for t in literal.prompt(batch, row):
                mass[name][layer][np.argmax(x[t] @ np.float64(end.params["router"][name][layer]))] += 1 / len(literal.prompt(batch, row))
            return plain(row, layer, name, x, h)

        for row in range(5):
            literal.states(game, end.params["mm_projector"], batch, delta, row)
        for name, value in frozen.items():
            value[np.arange(len(value)), mass[name].argmax(1)] = 1
            np.testing.assert_array_equal(end.memory["frozen"][name], value)
    assert frozen["q_proj"].sum() > 0
