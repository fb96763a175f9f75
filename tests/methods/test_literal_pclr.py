"""PCLR against its equations: ranks that are on, learning, compression, integration; a list of ranks stands in for the product's arrays."""

from __future__ import annotations

import dataclasses
import math

import jax
import literal
import numpy as np
import oracle
import pytest
import tiny_llava
from literal import cosine, softmax

from proglora_jax.adapters import distill, rank_pool
from proglora_jax.data import batch as codes
from proglora_jax.data.errors import UserError
from proglora_jax.methods.pclr import PCLR

SMALL = dict(rank=4, alpha=6.0, top_ranks=4, capacity=8, narrow_ranks=2, narrow_from=3, near_from=0, shared_ranks=3, align_weight=0.3,
             top_words=9, integrate_epochs=2)  # fmt: skip
LINEARS = ("q_proj", "up_proj", "linear_1", "linear_2")


@dataclasses.dataclass
class Rank:
    """One rank: its factors in each linear (of each layer), and its keys in each pool."""

    a: dict
    b: dict
    text: list
    image: list
    task: int


def rank_of(params: dict, index: int, where: str, key: str, task: int) -> Rank:
    """A rank of one of the product's sets."""
    a, b = {}, {}
    for name in LINEARS:
        leaf = params[("projector_" if name.startswith("linear") else "") + where][name]
        a[name], b[name] = np.float64(leaf["a"][..., index]), np.float64(leaf["b"][..., index, :])
    keys = {kind: [np.float64(pool[index]) for pool in params[key][kind]] if key else [] for kind in ("text", "image")}
    return Rank(a, b, keys["text"], keys["image"], task)


def unit(x) -> np.ndarray:
    x = np.float64(x)
    return x / max(np.linalg.norm(x), 1e-6)


def query_of(game, batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(text, image) of a row; BOS counts as text, no image gives zeros."""
    at = [0, *np.flatnonzero(batch["segments"][row] == codes.INSTRUCTION)]
    text = unit(literal.words(game, batch, row)[at].mean(0))
    shown = literal.features(game, batch["image"][row]).mean(0)
    return text, unit(shown) if batch["image_mask"][row] else np.zeros_like(shown)


def score(rank: Rank, pool: int, query) -> float:
    text, image = query
    kappa = len(image) / len(text)
    return text @ unit(rank.text[pool]) + kappa * (image @ unit(rank.image[pool]))


def best(ranks: list[Rank], pool: int, query, count: int) -> list[Rank]:
    """The ranks with the highest scores; of equal ones the first."""
    order = sorted(range(len(ranks)), key=lambda i: (-round(score(ranks[i], pool, query), 5), i))
    return [ranks[i] for i in order[:count]]


def output(game, chosen: list[Rank], shared: list[Rank], name: str, layer: int | None, x: np.ndarray) -> np.ndarray:
    """Sum over chosen ranks times alpha / top, and over shared ones times alpha / shared."""
    total, method = 0.0, game.method
    for factor, ranks in ((method.alpha / method.top_ranks, chosen), (method.alpha / method.shared_ranks, shared)):
        for rank in ranks:
            a, b = (rank.a[name], rank.b[name]) if layer is None else (rank.a[name][layer], rank.b[name][layer])
            total = total + factor * np.outer(x @ a, b)
    return total


def hidden(game, mm_projector, batch, row: int, choose, shared: list[Rank]) -> np.ndarray:
    """Final states of a row; `choose` (pool) -> the ranks that are on in it; the last pool is the projector's."""
    layers = len(game.llava.layers["down"])
    delta = lambda row, layer, name, x, h: output(game, choose(layer), shared, name, layer, x)
    project = lambda name, x: output(game, choose(layers), shared, name, None, x)
    return literal.states(game, mm_projector, batch, delta, row, project)[0]


def at_labels(game, mm_projector, choose, shared) -> np.ndarray:
    """[B, K, V]; `choose` (row, pool)."""
    states = [hidden(game, mm_projector, game.batch, row, lambda pool, row=row: choose(row, pool), shared) for row in range(4)]
    return np.stack([h[game.batch["label_index"][row]] @ np.float64(game.llava.table).T for row, h in enumerate(states)])


def shared_of(params) -> list[Rank]:
    return [rank_of(params, index, "shared", "", -1) for index in range(SMALL["shared_ranks"])]


class Story:
    """The pool of a game, stage by stage, from what was learned; values of an integration are read where it ended."""

    def __init__(self, game):
        self.game, self.ranks, self.queries, self.shared = game, [], [], []
        self.learned, self.taught = {}, {}
        self.turns = game.method.turns(3)
        for moment in game.moments:
            if moment.phase.kind == "integrate":
                self.taught[moment.stage] = moment
                self.shared = shared_of(moment.state.params)
                for place, rank in enumerate(self.ranks):
                    now = rank_of(moment.state.params, place, "pool", "keys", rank.task)
                    rank.a, rank.b = now.a, now.b
            else:
                self.learn(moment)

    def learn(self, moment):
        """Takes a stage's new ranks in, and compresses."""
        turn, params = self.turns[moment.stage], moment.state.params
        self.learned[moment.stage] = ([dataclasses.replace(rank) for rank in self.ranks], list(self.shared))
        new = [rank_of(params, index, "block", "new_keys", moment.stage) for index in range(turn.new)]
        mean = lambda kind: unit(np.mean([vector for rank in new for vector in getattr(rank, kind)], axis=0))
        self.queries.append((mean("text"), mean("image")))
        self.before = [dataclasses.replace(rank) for rank in self.ranks], [dataclasses.replace(rank) for rank in new], list(self.shared)
        parts = [self.ranks, new]
        if turn.every:
            parts = [[rank for i, rank in enumerate(part) if (i + 1) % turn.every] for part in parts]
        self.ranks = parts[0] + parts[1]
        if not turn.every:
            return
        self.teachers = getattr(self, "teachers", {}) | {moment.stage: self.before}
        for rank in self.ranks:
            rank.text, rank.image = [unit(k) for k in rank.text], [unit(k) for k in rank.image]
        for pool in range(len(self.ranks[0].text)):
            added = [([], []) for _ in self.ranks]
            for query in self.queries:
                for rank in best(self.ranks, pool, query, self.game.method.top_ranks):
                    place = next(i for i, other in enumerate(self.ranks) if other is rank)
                    added[place][0].append(query[0])
                    added[place][1].append(query[1])
            for rank, (texts, images) in zip(self.ranks, added):
                rank.text[pool], rank.image[pool] = unit(rank.text[pool] + sum(texts)), unit(rank.image[pool] + sum(images))


@pytest.mark.parametrize("seed, stages", [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_forward_at_test(seed, stages):
    game = literal.play(PCLR(**SMALL), seed, stages)
    story, last = Story(game), game.ends[-1]
    for row in range(4):
        query = query_of(game, game.batch, row)
        assert len(best(story.ranks, 0, query, 4)) == 4
    choose = lambda row, pool: best(story.ranks, pool, query_of(game, game.batch, row), game.method.top_ranks)
    expected = at_labels(game, last.params["mm_projector"], choose, story.shared)
    oracle.close(game.at_test(), expected, "scores at test")
    bare = at_labels(game, last.params["mm_projector"], lambda row, pool: [], [])
    assert np.abs(bare - expected).max() > 0.02
    shown = np.asarray(game.run.answer(last, game.batch)["gates"])
    for row in range(4):
        tasks = [rank.task for pool in range(len(story.ranks[0].text)) for rank in choose(row, pool)]
        np.testing.assert_allclose(shown[row], np.bincount(tasks, minlength=3) / len(tasks), rtol=1e-5)


@pytest.mark.parametrize("seed, fields", [(0, {}), (1, {}), (2, {"top_ranks": 6}), (3, {"top_ranks": 2})])
def test_learning(seed, fields):
    """Cross-entropy and the keys' loss of each stage: all new ranks are on (four, the third time two), the best old ones fill up."""
    game = literal.play(PCLR(**(SMALL | fields)), seed, 3)
    story = Story(game)
    for moment in [moment for moment in game.moments if moment.phase.cross_entropy]:
        params, turn = moment.state.params, story.turns[moment.stage]
        new = [rank_of(params, index, "block", "new_keys", moment.stage) for index in range(turn.new)]
        old, shared = story.learned[moment.stage]
        queries = [query_of(game, game.batch, row) for row in range(4)]

        def choose(row, pool, new=new, old=old, queries=queries):
            means = [np.mean([score(rank, pool, query) for query in queries]) for rank in old]
            order = sorted(range(len(old)), key=lambda i: (-round(means[i], 5), i))
            return new + [old[i] for i in order[: max(0, game.method.top_ranks - len(new))]]

        ce = oracle.cross_entropy(game.batch, at_labels(game, params["mm_projector"], choose, shared))
        apart = 0.0
        for row, (text, image) in enumerate(queries):
            apart += np.mean([1 - cosine(text, key) for rank in new for key in rank.text])
            if game.batch["image_mask"][row]:
                apart += np.mean([1 - cosine(image, key) for rank in new for key in rank.image])
        found = game.in_training(moment)
        assert apart > 0.01 and bool(old) == (moment.stage > 0) and bool(shared) == (moment.stage == 2)
        oracle.close(found["ce"], ce, f"cross-entropy in stage {moment.stage}")
        oracle.close(found["loss"], ce + 0.3 * apart / 4, f"loss in stage {moment.stage}")


@pytest.mark.parametrize("seed", [0, 1])
def test_integration(seed):
    game = literal.play(PCLR(**SMALL), seed, 2)
    story = Story(game)
    moment = story.taught[1]
    old, newest, taught = story.teachers[1]
    drawn, params = set(), moment.state.params
    for key in range(6):
        task = int(game.method.task_drawn(moment.state.carry["running"], jax.random.key(key), np.int32(1)))
        if task in drawn:
            continue
        drawn.add(task)
        query, pools = story.queries[task], range(len(story.ranks[0].text))
        student = [best(story.ranks, pool, query, 4) for pool in pools]
        allowed = newest if task == 1 else old
        teacher = [best(allowed, pool, query, 4) for pool in pools]
        total, count = 0.0, 0
        for row in range(4):
            real = np.flatnonzero(game.batch["segments"][row] != codes.PAD)
            table, own = np.float64(game.llava.table).T, params["mm_projector"]
            z = [hidden(game, own, game.batch, row, lambda pool, on=on: on[pool], shared) @ table
                 for on, shared in ((teacher, taught), (student, story.shared))]  # fmt: skip
            for t in real:
                words = np.argsort(-z[0][t], kind="stable")[:9]
                p, q = (np.sqrt(softmax(scores[t][words])) for scores in z)
                p, q = p / p.sum(), q / q.sum()
                total += (p * (np.log(p) - np.log(q))).sum()
            count += len(real)
        found = game.in_training(moment, key)
        oracle.close(found["loss"], total / count, f"task {task}")
        oracle.close(found["distillation"], total / count)
        assert "ce" not in found and total / count > 1e-3
        running = game.method.update_running(moment.state.carry["running"], found, jax.random.key(key), np.int32(1))
        expected = np.ones(3)
        expected[task] = math.sqrt(found["loss"] + 1e-4)
        np.testing.assert_allclose(running["weights"], expected, rtol=1e-5)
    assert drawn == {0, 1}


def test_tasks_are_drawn_by_their_weights():
    draw = jax.jit(jax.vmap(lambda key: PCLR().task_drawn({"weights": np.float32([0.2, 0.6, 0.2, 9.0])}, key, np.int32(2))))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(1), 4000))), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.2, 0.6, 0.2, 0], atol=0.03)


def test_the_student_is_the_teacher_where_nothing_is_dropped(rng):
    """The divergence of equal scores is 0, and so is its gradient."""
    states = rng.standard_normal((2, 7, 5)).astype(np.float32)
    head = lambda h: h @ np.float32(rng.permutation(np.eye(5, 11)))
    table = np.float32(rng.standard_normal((5, 11)))
    loss = lambda student: distill.mean_top_divergence(lambda h: h @ table, student, states, np.ones((2, 7), bool), 6, 2.0, chunk=3)
    value, gradient = jax.value_and_grad(loss)(states)
    assert abs(value) < 1e-6 and np.abs(gradient).max() < 1e-6 and loss(states + head(states)[..., :5]) > 1e-3


def test_the_published_schedule():
    """Section 14.5 of the method: ranks before and after each task, and what is dropped."""
    turns = PCLR().turns(8)
    assert [turn.new for turn in turns] == [64] * 6 + [32] * 2
    assert [turn.merged for turn in turns] == [64, 128, 192, 256, 256, 256, 256, 256]
    assert [turn.every for turn in turns] == [0, 0, 0, 4, 4, 8, 8, 0]
    assert [len(turn.kept()) for turn in turns] == [64, 128, 192, 192, 192, 224, 224, 256]
    kept = turns[3].kept()
    assert set(range(256)) - set(kept) == set(range(3, 256, 4)) and list(kept) == sorted(kept)
    alone = PCLR(progressive=False).turns(8)
    assert [turn.every for turn in alone] == [0] * 7 + [2] and len(alone[-1].kept()) == 224
    assert [turn.every for turn in PCLR().turns(1)] == [0]


def test_a_capacity_that_does_not_fit_has_a_sentence():
    with pytest.raises(UserError, match="config.method.capacity=4: task 3 adds 1 ranks to a pool of 4, more than the capacity of 4"):
        PCLR(rank=2, capacity=4, narrow_ranks=1, narrow_from=3, top_ranks=2).turns(3)
    with pytest.raises(UserError, match="config.method.capacity=4: task 2 adds 4 ranks, so none of the earlier tasks' would stay; the"):
        PCLR(rank=4, capacity=4, narrow_ranks=2, top_ranks=4).turns(2)
    assert len(PCLR(rank=4, capacity=4, narrow_ranks=2, top_ranks=4).turns(1)[0].kept()) == 4, "nothing comes after it"
    with pytest.raises(UserError, match="config.method.capacity=6: must be a multiple of config.method.rank=4"):
        PCLR(rank=4, capacity=6, narrow_ranks=2)


def test_phases_by_flag():
    names = lambda method: [[phase.kind for phase in method.phases(info)] for info in infos]
    infos = [literal.TaskInfo(index, "task", 8, 1, np.zeros(index), 0) for index in range(8)]
    with_integration = [["learn"]] * 3 + [["learn", "integrate"]] * 3 + [["learn_narrow", "integrate"], ["learn_narrow"]]
    assert names(PCLR()) == with_integration
    assert names(PCLR(integrate=False)) == [kinds[:1] for kinds in with_integration]
    assert names(PCLR(progressive=False)) == [["learn"]] * 6 + [["learn_narrow"], ["learn_narrow", "integrate"]]
    again = PCLR(integrate_batch_size=28).phases(infos[4])[1]
    assert (again.cross_entropy, again.learning_rate, again.epochs, again.batch_size) == (False, 5e-5, 1, 28)


@pytest.mark.parametrize("fields", [{}, {"integrate": False}])
def test_new_ranks_begin_as_copies_of_the_nearest(fields):
    game = literal.play(PCLR(**(SMALL | {"near_from": 3} | fields)), 5, 3)
    story, start = Story(game), game.starts[2]
    rows = tiny_llava.batch([game.run.rows(2)[i] for i in game.asked[2]])
    queries = [query_of(game, rows, row) for row in range(len(rows["tokens"]))]
    text = np.mean([query[0] for query in queries], axis=0)
    image = np.sum([query[1] for query in queries], axis=0) / rows["image_mask"].sum()
    oracle.close(start.params["new_keys"]["text"][1, 2], text)
    oracle.close(start.params["new_keys"]["image"][0, 3], image)
    old, _ = story.learned[2]
    layers = len(game.llava.layers["down"])
    for pool in range(layers + 1):
        for place, rank in enumerate(best(old, pool, (unit(text), unit(image)), 4)):
            name, at = ("linear_1", None) if pool == layers else ("q_proj", pool)
            ours = start.params["projector_block" if at is None else "block"][name]["a"]
            np.testing.assert_array_equal(np.float64(ours[..., place] if at is None else ours[at][..., place]),
                                          rank.a[name] if at is None else rank.a[name][at])  # fmt: skip
    assert float(start.memory["sharing"]) == float(game.method.integrate)


def test_ranks_of_one_task_keep_their_order():
    pool = {"q": {"a": np.arange(6.0)[None, None], "b": np.arange(6.0)[None, :, None]}}
    kept = rank_pool.keep(pool, rank_pool.Turn(4, 2, 2).kept())
    np.testing.assert_array_equal(kept["q"]["a"][0, 0], [0, 2, 4, 0, 0, 0])
    np.testing.assert_array_equal(kept["q"]["b"][0, :, 0], [0, 2, 4, 0, 0, 0])
