"""What a stage trains on: own rows, replayed rows and their weights, the layout of batches, and how alike tasks are."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
import torch
import transformers
from PIL import Image
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax.continual import similarity
from proglora_jax.continual import stage_data as data_module
from proglora_jax.continual.answering import image_mode
from proglora_jax.continual.similarity_encoders import open_encoders
from proglora_jax.continual.probes import open_probe
from proglora_jax.continual.session import open_session, unasked
from proglora_jax.continual.stage_data import chosen_batches, numbered_batches, own_rows, stage_data
from proglora_jax.continual.stages import plan_stages
from proglora_jax.data import batch as codes
from proglora_jax.data.errors import UserError
from proglora_jax.data.replay import replay_indices
from proglora_jax.data.tasks import TASKS
from proglora_jax.methods.base import Replay, TaskInfo
from proglora_jax.training.settings import from_config


@pytest.fixture(scope="module")
def session(here):
    """An open session of the static method over three tasks."""
    fields = {"data__tasks": "TextVQA,ScienceQA,ImageNet", "data__tokenizer_legacy": False, "similarity__max_samples": 100}
    fields |= {"train__max_steps": 0, "train__epochs": 2}
    opened = open_session(from_config(here.config("proglora_static", **fields)), here.folder / "session", resumed=False)
    yield opened
    opened.logger.close()


@pytest.fixture(scope="module")
def last(session):
    """The last stage: two tasks before it."""
    return plan_stages(session.tasks, session.method, "sequential")[2]


def change(session, **fields):
    """The session with other training settings."""
    train = dataclasses.replace(session.settings.train, **fields)
    return dataclasses.replace(session, settings=dataclasses.replace(session.settings, train=train))


def test_the_static_method_replays_what_is_unlike_with_its_weight(session, last):
    method = dataclasses.replace(session.method, recall_per_task=10, recall_weight=3.0)
    info = TaskInfo(2, "ImageNet", 3, 20, np.float32([0.35, 0.9]), 0)
    data = stage_data(session, last, own_rows(session, last), method.replay(info))
    assert (data.own, len(data.rows), data.separate) == (20, 20 + 7 + 1, False)
    for task, count in ((0, 7), (1, 1)):
        rows = [row for row in data.rows.rows if row.task_id == task]
        assert [row.index for row in rows] == replay_indices(20, count, 0, session.tasks[task]).tolist()
        assert {row.weight for row in rows} == {3.0} and {row.example.task for row in rows} == {session.tasks[task]}
    assert {(row.task_id, row.weight) for row in data.rows.rows[:20]} == {(2, 1.0)}
    assert data.plan.rows.shape == (14, 4)  # two epochs of 28 rows in batches of 4
    for epoch in (0, 1):
        assert sorted(data.plan.rows[data.plan.epoch == epoch].reshape(-1)) == list(range(28))


def test_a_separate_batch_gives_replay_its_own_rows_in_every_batch(session, last):
    wide = change(session, batch_size=8)
    data = stage_data(wide, last, own_rows(session, last), Replay((5, 3), 2.0, "separate_batch", 0.25))
    assert data.separate and data.plan.rows.shape == (6, 8)  # 20 rows, six of them in each batch, twice
    assert data.plan.rows[:, :6].max() < 20 <= data.plan.rows[:, 6:].min()
    assert set(data.plan.rows[:, 6:].reshape(-1)) == set(range(20, 28))


def test_a_separate_batch_repeats_what_is_fewer_than_its_share(session, last):
    data = stage_data(change(session, batch_size=8), last, own_rows(session, last), Replay((1, 0), 2.0, "separate_batch", 0.5))
    assert data.plan.rows[:, 4:].tolist() == [[20] * 4] * 10


def test_without_replayed_rows_nothing_is_apart(session, last):
    own = own_rows(session, last)
    for replay in (None, Replay((0, 0), 2.0, "separate_batch")):
        data = stage_data(session, last, own, replay)
        assert len(data.rows) == 20 and not data.separate


def test_every_stage_shuffles_its_rows_in_its_own_way(session, last):
    own = own_rows(session, last)
    orders = [stage_data(session, dataclasses.replace(last, number=number), own, None).plan.rows.tolist() for number in (1, 2)]
    assert orders[0] != orders[1]


def test_batch_sizes_by_task(session, last):
    own = own_rows(session, last)
    assert stage_data(change(session, batch_sizes={"ImageNet": 10}), last, own, None).plan.batch_size == 10
    with pytest.raises(UserError, match=r"config.train.batch_size=21: only 20 rows; lower it or set config.data.remainder=wrap"):
        stage_data(change(session, batch_size=21), last, own, None)


def test_loss_groups_of_multi_turn_records_hold_about_as_many_labels(session, last):
    """Records of about 12 turns, as GQA's: sorted by length and cut, the first group would hold ten times the labels of the last."""
    rng = np.random.default_rng(0)
    turns = rng.geometric(1 / 12, 2000).clip(1, 60)
    own = own_rows(session, last)
    rows = dataclasses.replace(
        own, rows=own.rows * 100, lengths=600 + 14 * turns, labels=2 * turns + rng.integers(0, 3, 2000), has_image=np.ones(2000, bool))
    data = dataclasses.replace(session.settings.data, buckets=((2048, 256),), grouping="modality_length")
    opened = dataclasses.replace(session, settings=dataclasses.replace(session.settings, data=data))

    def ratio(groups: int, **fields) -> float:
        plan = stage_data(change(opened, batch_size=56, epochs=1, **fields), last, rows, None).plan
        sums = rows.labels[plan.rows].reshape(len(plan), groups, -1).sum(axis=2)
        return (sums.max(axis=1) / sums.min(axis=1)).mean()

    assert ratio(7, loss_norm="micro_batch_mean", loss_groups=7) < 1.25
    assert ratio(14, loss_norm="micro_batch_mean", loss_group_size=4) < 1.7
    assert ratio(7, loss_norm="global_token_mean") > 5


def test_chosen_rows_come_in_full_batches_with_their_places(session, last):
    own = own_rows(session, last)
    numbers = np.array([11, 3, 19, 0, 7])
    seen = {}
    for positions, batch in chosen_batches(session, own, numbers, 2):
        assert batch["tokens"].shape[0] == 2
        seen |= {int(position): int(example) for position, example in zip(positions, batch["example"])}
    assert seen == dict(enumerate(numbers))


def test_the_rest_of_a_test_split_counts_only_where_all_of_it_should_be_there(session):
    data = session.data["ScienceQA"]
    fewer = SimpleNamespace(task=data.task, questions=data.questions[:2], auxiliary=data.auxiliary, made_from={})
    coin = dataclasses.replace(session.settings, data=dataclasses.replace(session.settings.data, benchmark="coin"))
    count = lambda settings, part=fewer: len(unasked(part, settings, part.questions))
    assert count(coin) == 4 and count(coin, data) == 0
    assert count(session.settings) == 0, "the embedded benchmark"
    for section, field, value in (("evaluate", "subset_size", 2), ("data", "instruction_set", "slim_0.3"),
                                  ("evaluate", "scienceqa_rule", "proglora")):
        changed = dataclasses.replace(getattr(coin, section), **{field: value})
        assert count(dataclasses.replace(coin, **{section: changed})) == 0, field
    fewer.made_from = {"from": "slim"}
    assert count(coin) == 0


def test_probes_load_their_images_ahead_in_threads(session, last, monkeypatch):
    """Two batches at a time, in order; an error comes where its batch would."""
    own, load = own_rows(session, last), data_module.load_row
    two = dataclasses.replace(session, settings=dataclasses.replace(
        session.settings, data=dataclasses.replace(session.settings.data, threads=2)))
    together = threading.Barrier(2)

    def waits(rows, loader, number):
        together.wait(10)  # for another thread that loads a row
        return load(rows, loader, number)

    numbers, examples = np.array([11, 3, 19, 0]), lambda batches: [batch["example"].tolist() for batch in batches]
    monkeypatch.setattr(data_module, "load_row", waits)
    assert examples(numbered_batches(two, own, numbers, 2)) == [[11, 3], [19, 0]]
    assert sorted(sum(examples(batch for _, batch in chosen_batches(two, own, numbers, 2)), [])) == sorted(numbers)

    def breaks(rows, loader, number):
        if number == 19:
            raise UserError("ImageNet record 19: no such image")
        return load(rows, loader, number)

    monkeypatch.setattr(data_module, "load_row", breaks)
    batches = numbered_batches(two, own, numbers, 2)
    assert next(batches)["example"].tolist() == [11, 3]
    with pytest.raises(UserError, match="record 19"):
        next(batches)


def test_questions_are_seen_as_in_coin_or_as_in_training(session):
    padded = dataclasses.replace(session.settings, evaluate=dataclasses.replace(session.settings.evaluate, image_mode="pad"))
    for name in TASKS:
        cropped = name in ("ScienceQA", "ImageNet", "Grounding", "VQAv2")
        assert image_mode(session.settings, name) == ("crop" if cropped else "pad")
        assert image_mode(padded, name) == "pad"
    assert session.eval_loader("pad") is session.train_loader and session.eval_loader("crop").mode == "crop"
    assert session.train_loader.mode == "pad" and not session.encoder.tokenizer.legacy


@pytest.fixture(scope="module")
def embeddings(session):
    """Our embedding of each task."""
    stages = plan_stages(session.tasks, session.method, "sequential")
    encoders = open_encoders(session)
    return {stage.name: similarity.task_embedding(session, encoders, stage.name, own_rows(session, stage)) for stage in stages}


def test_task_embeddings_are_means_over_images_and_words(here, session, embeddings):
    """Against transformers' CLIP and plain numpy over the same files."""
    oracle = transformers.LlavaForConditionalGeneration.from_pretrained(here.model).eval()
    table = oracle.get_input_embeddings().weight.detach().numpy()
    background = session.images.background
    for stage in plan_stages(session.tasks, session.method, "sequential"):
        rows = own_rows(session, stage)
        features, words = [], {codes.INSTRUCTION: [], codes.ANSWER: []}
        for number, row in enumerate(rows.rows):
            if row.example.image:
                picture = Image.open(row.example.image).convert("RGB")
                square = Image.new("RGB", (max(picture.size),) * 2, background)
                square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
                pixels = session.images.normalise(np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC)))
                with torch.no_grad():
                    seen = oracle.model.vision_tower(torch.tensor(pixels.transpose(2, 0, 1)[None]), output_hidden_states=True)
                features.append(seen.hidden_states[-2][0, 1:].mean(0).numpy())
            encoded = rows.row(number, None)
            for code, found in words.items():
                found.append(table[encoded.tokens[encoded.segments == code]].mean(0))
        ours = embeddings[stage.name]
        np.testing.assert_allclose(ours["image"], np.mean(features, axis=0), atol=2e-5)
        np.testing.assert_allclose(ours["instruction"], np.mean(words[codes.INSTRUCTION], axis=0), atol=1e-6)
        np.testing.assert_allclose(ours["answer"], np.mean(words[codes.ANSWER], axis=0), atol=1e-6)


def test_similarity_is_the_product_of_three_cosines(session, embeddings):
    names = session.tasks
    got = similarity.similarities([embeddings[names[0]], embeddings[names[1]]], embeddings[names[2]], clamp=True)
    for value, name in zip(got, names):
        first, second = embeddings[name], embeddings[names[2]]
        cosines = [first[part] @ second[part] / np.linalg.norm(first[part]) / np.linalg.norm(second[part]) for part in first]
        np.testing.assert_allclose(value, np.clip(np.prod(cosines), 0, 1), rtol=1e-5)
    assert np.allclose(similarity.similarities([embeddings[names[0]]], embeddings[names[0]], clamp=False), 1)


def test_similarity_without_images_and_below_zero():
    text = {"image": np.zeros(3), "instruction": np.array([1.0, 0.0]), "answer": np.array([0.0, 2.0])}
    turned = {**text, "answer": np.array([0.0, -1.0])}
    pictured = {**text, "image": np.ones(3)}
    assert similarity.similarities([text, turned, pictured], text, clamp=False).tolist() == [1.0, -1.0, 0.0]
    assert similarity.similarities([text, turned, pictured], text, clamp=True).tolist() == [1.0, 0.0, 0.0]


def test_numbered_batches_keep_their_order_and_fill_up_without_labels(session, last):
    rows, numbers = own_rows(session, last), np.array([7, 3, 19, 0, 11])
    batches = list(numbered_batches(session, rows, numbers, 2))
    assert [batch["example"].tolist() for batch in batches] == [[7, 3], [19, 0], [11, 11]]
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, True], [True, False]]
    counts = [batch["label_mask"].sum(1) for batch in batches]
    assert counts[2][1] == 0 and all(counts[i][j] == rows.labels[number] for number, i, j in zip(numbers, (0, 0, 1, 1, 2), (0, 1, 0, 1, 0)))


def test_squared_gradients_of_a_run_are_means_over_batches_and_over_samples(session, last):
    rows, numbers = own_rows(session, last), np.array([7, 3, 19, 0])
    initial = session.method.init(session.targets, jax.tree.map(np.asarray, session.llava.projector_params()), 3, 0)
    state = session.method.start_task(initial, TaskInfo(2, "ImageNet", 3, 20, np.float32([0.5, 0.5]), 0), None)
    probe = open_probe(session, rows)
    ask = lambda *asked: np.asarray(probe.squared_gradients(state, *asked, ("block",))["block"]["v_proj"]["b"])
    halves = [ask(numbers[:2], 2, "batch"), ask(numbers[2:], 2, "batch")]
    np.testing.assert_allclose(ask(numbers, 2, "batch"), np.mean(halves, axis=0), rtol=1e-5, atol=1e-12)
    alone = [ask(numbers[i : i + 1], 2, "batch") for i in range(4)]
    np.testing.assert_allclose(ask(numbers, 2, "per_sample"), np.mean(alone, axis=0), rtol=1e-4, atol=1e-12)
    assert halves[0].max() > 0 and np.abs(halves[0] - halves[1]).max() > 0
