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
from proglora_jax.methods import pclr, rank_compression
from proglora_jax.methods.pclr import PCLR

SMALL = dict(rank=4, alpha=6.0, top_ranks=4, capacity=8, narrow_ranks=2, narrow_from=3, near_from=0, shared_ranks=3, align_weight=0.3,
             top_words=9, integrate_epochs=2)  # fmt: skip
# Five tasks of six: compression after the second and all that follow; from the fourth on a task adds fewer ranks than a sample takes.
LONG = SMALL | dict(rank=8, top_ranks=6, capacity=16, narrow_ranks=4, narrow_from=4)
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


def copies(ranks: list[Rank]) -> list[Rank]:
    """The ranks as they are now."""
    return [dataclasses.replace(rank) for rank in ranks]


@dataclasses.dataclass(frozen=True)
class Integration:
    """What a stage's second phase compares: the pool before compression with its shared ranks, and the student's at some moment."""

    moment: literal.Moment
    old: list[Rank]
    newest: list[Rank]
    taught: list[Rank]
    student: list[Rank]
    shared: list[Rank]
    queries: list[tuple[np.ndarray, np.ndarray]]

    def teacher(self, pool: int, task: int, count: int) -> list[Rank]:
        """The teacher's ranks for a task's query: old ones, or for the newest task its own, filled up with the best old ones."""
        query = self.queries[task]
        if task < self.moment.stage:
            return best(self.old, pool, query, count)
        own = best(self.newest, pool, query, count)
        return own + best(self.old, pool, query, count - len(own))


class Story:
    """The pool of a game, stage by stage, from what was learned; values of an integration are read where it ended."""

    def __init__(self, game):
        self.game, self.ranks, self.queries, self.shared = game, [], [], []
        self.learned, self.integrations = {}, {}
        self.turns = game.method.turns(game.run.total)
        for moment in game.moments:
            if moment.phase.kind == "integrate":
                self.shared = shared_of(moment.state.params)
                for place, rank in enumerate(self.ranks):
                    now = rank_of(moment.state.params, place, "pool", "keys", rank.task)
                    rank.a, rank.b = now.a, now.b
                student = copies(self.ranks), self.shared, list(self.queries)
                self.integrations[moment.stage] = Integration(moment, *self.before, *student)
            else:
                self.learn(moment)

    def learn(self, moment):
        """Takes a stage's new ranks in, and compresses."""
        turn, params = self.turns[moment.stage], moment.state.params
        self.learned[moment.stage] = (copies(self.ranks), list(self.shared))
        new = [rank_of(params, index, "block", "new_keys", moment.stage) for index in range(turn.new)]
        mean = lambda kind: unit(np.mean([vector for rank in new for vector in getattr(rank, kind)], axis=0))
        self.queries.append((mean("text"), mean("image")))
        self.before = copies(self.ranks), copies(new), list(self.shared)
        parts = [self.ranks, new]
        if turn.every:
            parts = [[rank for i, rank in enumerate(part) if (i + 1) % turn.every] for part in parts]
        self.ranks = parts[0] + parts[1]
        if not turn.every:
            return
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


def play(seed: int, fields: dict, stages: int) -> literal.Game:
    """Some stages of three tasks, of six with the fields of LONG."""
    return literal.play(PCLR(**(SMALL | fields)), seed, stages, total=6 if fields is LONG else 3)


@pytest.mark.parametrize("seed, fields, stages", [(0, {}, 1), (1, {}, 2), (2, {}, 3), (3, {}, 3), (4, LONG, 5)])
def test_forward_at_test(seed, fields, stages):
    game = play(seed, fields, stages)
    story, last, top = Story(game), game.ends[-1], game.method.top_ranks
    for row in range(4):
        query = query_of(game, game.batch, row)
        assert len(best(story.ranks, 0, query, top)) == top
    choose = lambda row, pool: best(story.ranks, pool, query_of(game, game.batch, row), game.method.top_ranks)
    expected = at_labels(game, last.params["mm_projector"], choose, story.shared)
    oracle.close(game.at_test(), expected, "scores at test")
    bare = at_labels(game, last.params["mm_projector"], lambda row, pool: [], [])
    assert np.abs(bare - expected).max() > 0.02
    shown = np.asarray(game.run.answer(last, game.batch)["gates"])
    for row in range(4):
        tasks = [rank.task for pool in range(len(story.ranks[0].text)) for rank in choose(row, pool)]
        np.testing.assert_allclose(shown[row], np.bincount(tasks, minlength=game.run.total) / len(tasks), rtol=1e-5)


@pytest.mark.parametrize("seed, fields", [(0, {}), (1, {}), (2, {"top_ranks": 6}), (3, {"top_ranks": 2}), (4, LONG)])
def test_learning(seed, fields):
    """Cross-entropy and the keys' loss of each stage: all new ranks are on (four, the third time two), the best old ones fill up."""
    game = play(seed, fields, 5 if fields is LONG else 3)
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
        assert apart > 0.01 and bool(old) == (moment.stage > 0) and bool(shared) == (moment.stage >= 2)
        oracle.close(found["ce"], ce, f"cross-entropy in stage {moment.stage}")
        oracle.close(found["loss"], ce + 0.3 * apart / 4, f"loss in stage {moment.stage}")


@pytest.mark.parametrize("seed, fields, stages", [(0, {}, 2), (1, {}, 2), (2, LONG, 5)])
def test_integration(seed, fields, stages):
    """The divergence for the newest task, the one before and the first; later teachers have shared ranks, and few newest ones."""
    game = play(seed, fields, stages)
    story, method = Story(game), game.method
    seen = {stage: (len(one.newest), bool(one.taught)) for stage, one in story.integrations.items()}
    assert seen == ({1: (8, False), 2: (8, True), 3: (4, True), 4: (4, True)} if fields is LONG else {1: (4, False)})
    for stage, one in story.integrations.items():
        running = one.moment.state.carry["running"]
        drawn = {int(method.task_drawn(running, jax.random.key(key), np.int32(stage))): key for key in range(60)}
        assert set(drawn) == set(range(stage + 1))
        for task in {stage, stage - 1, 0}:
            expected = divergence(game, one, task)
            found = game.in_training(one.moment, drawn[task])
            oracle.close(found["loss"], expected, f"task {task} in stage {stage}")
            oracle.close(found["distillation"], expected)
            assert "ce" not in found and expected > 1e-3
            weights = method.update_running(running, found, jax.random.key(drawn[task]), np.int32(stage))["weights"]
            root = np.where(np.arange(game.run.total) == task, math.sqrt(found["loss"] + 1e-4), 1.0)
            np.testing.assert_allclose(weights, root, rtol=1e-5)


def divergence(game, one: Integration, task: int) -> float:
    """Mean over positions of the KL between the teacher's best words, under one task's query."""
    pools, top, own = range(len(one.student[0].text)), game.method.top_ranks, one.moment.state.params["mm_projector"]
    sides = [([one.teacher(pool, task, top) for pool in pools], one.taught),
             ([best(one.student, pool, one.queries[task], top) for pool in pools], one.shared)]  # fmt: skip
    assert {len(chosen) for side, _ in sides for chosen in side} == {top}
    total, count, table = 0.0, 0, np.float64(game.llava.table).T
    for row in range(4):
        z = [hidden(game, own, game.batch, row, lambda pool, on=on: on[pool], shared) @ table for on, shared in sides]
        for t in np.flatnonzero(game.batch["segments"][row] != codes.PAD):
            words = np.argsort(-z[0][t], kind="stable")[:9]
            p, q = (np.sqrt(softmax(scores[t][words])) for scores in z)
            p, q = p / p.sum(), q / q.sum()
            total += (p * (np.log(p) - np.log(q))).sum()
            count += 1
    return total / count


def test_tasks_are_drawn_by_their_weights():
    draw = jax.jit(jax.vmap(lambda key: PCLR().task_drawn({"weights": np.float32([0.2, 0.6, 0.2, 9.0])}, key, np.int32(2))))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(1), 4000))), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.2, 0.6, 0.2, 0], atol=0.03)


def test_the_student_is_the_teacher_where_no_rank_is_dropped():
    """With keys at their own task's query each task finds its ranks again, and new shared ranks add nothing."""
    game = literal.play(PCLR(**(SMALL | {"capacity": 16})), 3, 2)
    method, state, info = game.method, game.ends[-1], literal.TaskInfo(1, "task1", 3, literal.COUNT, np.zeros(1), 3)
    owner = state.memory["origin"][:8]
    at_query = {kind: np.array(leaf) for kind, leaf in state.params["keys"].items()}
    for kind, leaf in at_query.items():
        leaf[:, :8] = state.memory["queries"][kind][owner]
    state = dataclasses.replace(state, params=state.params | {"keys": at_query})
    state = rank_compression.compress(method, state, info, rank_pool.Turn(4, 4, 99), pclr.POOL)
    phase = PCLR(**SMALL).phases(info)[1]
    assert phase.kind == "integrate" and int(state.memory["count"]) == 8 and float(state.memory["sharing"]) == 1
    running = state.carry["running"]
    keys = {int(method.task_drawn(running, jax.random.key(key), np.int32(1))): key for key in range(20)}
    moved = dataclasses.replace(state, params=state.params | {"pool": jax.tree.map(lambda leaf: leaf * 0.9, state.params["pool"])})
    for key in (keys[0], keys[1]):
        assert abs(game.in_training(literal.Moment(1, phase, state), key)["loss"]) < 1e-6
        assert game.in_training(literal.Moment(1, phase, moved), key)["loss"] > 1e-4


def test_equal_scores_have_no_divergence(rng):
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
