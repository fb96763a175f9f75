"""Batches end to end: content, shards, resuming at every step, fingerprints, errors that name the record, evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from data_fixtures import save_pattern, save_tokenizer

from proglora_jax.data.batch import ANSWER, IMAGE, PAD, BatchRow, collate
from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data import pipeline
from proglora_jax.data.pipeline import eval_batches, reader_threads, train_iterator
from proglora_jax.data.plan import plan_batches, suggest_buckets
from proglora_jax.data.rows import encode_rows
from proglora_jax.data.schema import Example, Question, TrainRow
from proglora_jax.data.templates import TEMPLATES
from proglora_jax.data.tokens import Encoder, encode_example, encode_prompt, load_tokenizer

P = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(save_tokenizer(str(folder / "tok")))
    images = [save_pattern(str(folder / "images" / f"{i}.png"), 20 + i, 30) for i in range(7)]
    encoder = Encoder(tokenizer, TEMPLATES["vicuna_v1_bare"], P, 128)
    rows = [
        TrainRow(
            Example(str(i), "GQA", images[i % 7] if i % 3 else None, tuple((f"Q{i} {'x ' * (i % 5)}", f"A{i}") for _ in range(1 + i % 2))),
            task_id=i % 2, index=i, weight=1.0 + i % 2,
        )
        for i in range(41)
    ]  # fmt: skip
    return encoder, rows, images


def prepared(world, seed=0, batch_size=8, **options):
    encoder, rows, _ = world
    encoded = encode_rows(rows, encoder)
    buckets = suggest_buckets(encoded.lengths, encoded.labels, 2, multiple=16)
    plan = plan_batches(
        encoded.lengths, encoded.labels, encoded.has_image, batch_size=batch_size, buckets=buckets, seed=seed, epochs=2, **options
    )
    return encoded, plan


def make(world, threads=2, shard=(0, 1), seed=0, settings=None, loader=None):
    encoded, plan = prepared(world, seed)
    loader = loader or ImageLoader(ImageSpec(16))
    return train_iterator(encoded, plan, loader, process_index=shard[0], process_count=shard[1], threads=threads, settings=settings)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def test_collate():
    row = BatchRow(np.asarray([1, 5, 9, 6, 2]), np.asarray([1, 3, 1, 4, 4]), np.ones((2, 2, 3), np.float32), 3, 7, 2.0)
    text = BatchRow(np.asarray([1, 2]), np.asarray([1, 4]), None, 1, 8, valid=False)
    batch = collate([row, text], (6, 3), 99, (2, 2))
    assert batch["tokens"].tolist() == [[1, 5, 9, 6, 2, 99], [1, 2, 99, 99, 99, 99]]
    assert batch["segments"].tolist() == [[1, 3, 1, 4, 4, PAD], [1, 4, PAD, PAD, PAD, PAD]]
    assert batch["label_index"].tolist() == [[2, 3, 0], [0, 0, 0]] and batch["labels"].tolist() == [[6, 2, 0], [2, 0, 0]]
    assert batch["label_mask"].tolist() == [[True, True, False], [True, False, False]]
    assert batch["image_mask"].tolist() == [True, False] and not batch["image"][1].any()
    assert batch["weight"].tolist() == [2.0, 1.0] and batch["valid"].tolist() == [True, False]
    dtypes = {key: str(value.dtype) for key, value in batch.items()}
    assert dtypes == {
        "tokens": "int32", "segments": "int8", "length": "int32", "label_index": "int32", "labels": "int32", "label_mask": "bool",
        "image": "float32", "image_mask": "bool", "task_id": "int32", "weight": "float32", "example": "int32", "valid": "bool",
    }  # fmt: skip
    for bucket in ((4, 3), (6, 1)):
        with pytest.raises(ValueError, match="is too small"):
            collate([row], bucket, 0, (2, 2))


def test_encoded_rows_restore_each_record(world):
    encoder, rows, _ = world
    encoded = encode_rows(rows, encoder)
    for i, row in enumerate(rows):
        direct = encode_example(row.example, encoder.tokenizer, encoder.template, P, 128)
        restored = encoded.row(i, None)
        assert np.array_equal(restored.tokens, direct.tokens) and np.array_equal(restored.segments, direct.segments)
        assert encoded.lengths[i] == len(direct.tokens) and encoded.labels[i] == direct.supervised


def test_rows_without_supervision(world):
    encoder, rows, images = world
    bad = [
        TrainRow(Example("long", "GQA", images[0], (("word " * 500, "A"),)), 0, 0),
        TrainRow(Example("empty", "GQA", None, (("Q", " "),)), 0, 1),
    ]
    encoded = encode_rows([*bad, *rows[:2]], encoder)
    assert [r.example.id for r in encoded.rows] == ["0", "1"]
    assert encoded.counts == {"truncated": 1, "empty_answers": 1, "unsupervised": 2}
    sentence = r"2 problem\(s\): GQA record long: no answer left within 128 positions; GQA record empty: no answer that"
    with pytest.raises(UserError, match=sentence):
        encode_rows([*bad, *rows], encoder, on_unsupervised="raise")
    with pytest.raises(UserError, match="none of the 2 has a supervised token"):
        encode_rows(bad, encoder)
    with pytest.raises(UserError, match="config.data.on_unsupervised=x"):
        encode_rows(rows, encoder, on_unsupervised="x")


def test_batches_hold_what_the_plan_says(world):
    encoder, rows, _ = world
    encoded, plan = prepared(world)
    loader = ImageLoader(ImageSpec(16))
    batches = list(make(world))
    assert len(batches) == len(plan)
    for n, batch in enumerate(batches):
        positions, supervised = plan.buckets[plan.bucket[n]]
        assert batch["tokens"].shape == (8, positions) and batch["labels"].shape == (8, supervised)
        for b, number in enumerate(plan.rows[n]):
            row = rows[number]
            assert (batch["example"][b], batch["task_id"][b], batch["weight"][b]) == (row.index, row.task_id, row.weight)
            assert batch["image_mask"][b] == (row.example.image is not None)
            assert np.count_nonzero(batch["segments"][b] == IMAGE) == P * batch["image_mask"][b]
            image = loader(row.example.image) if row.example.image else np.zeros((16, 16, 3))
            np.testing.assert_array_equal(batch["image"][b], image)
            used = batch["label_mask"][b]
            supervised_at = np.flatnonzero(batch["segments"][b] == ANSWER)
            np.testing.assert_array_equal(batch["label_index"][b][used] + 1, supervised_at)
            np.testing.assert_array_equal(batch["labels"][b][used], batch["tokens"][b][supervised_at])


@pytest.mark.parametrize("count", [2, 4])
def test_process_shards_are_disjoint_and_complete(world, count):
    whole = list(make(world, threads=0))
    shards = [list(make(world, threads=0, shard=(p, count))) for p in range(count)]
    for n, batch in enumerate(whole):
        joined = {key: np.concatenate([shard[n][key] for shard in shards]) for key in batch}
        assert_equal(joined, batch)


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_at_every_step_gives_the_same_batches(world, threads):
    whole = list(make(world, threads=0))
    source = make(world, threads)
    for step in range(len(whole) + 1):
        state = json.loads(json.dumps(source.get_state()))
        resumed = make(world, threads)
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(whole) - step
        for a, b in zip(rest, whole[step:]):
            assert_equal(a, b)
        if step < len(whole):
            assert source.step == step
            next(source)
    with pytest.raises(StopIteration):
        next(source)


def test_state_is_valid_for_another_number_of_processes(world):
    iterator = make(world, threads=0)
    next(iterator)
    halves = [make(world, threads=0, shard=(p, 2)) for p in range(2)]
    for half in halves:
        half.set_state(iterator.get_state())
    np.testing.assert_array_equal(np.concatenate([next(half)["example"] for half in halves]), next(iterator)["example"])


def test_state_of_other_data_is_refused(world):
    state = make(world).get_state()
    encoder, rows, images = world
    others = [
        make(world, seed=1),
        make(world, settings={"lr": 1}),
        make(world, loader=ImageLoader(ImageSpec(8))),
        make(world, loader=ImageLoader(ImageSpec(16), mode="crop")),
        make((encoder, [*rows[:-1], TrainRow(rows[-1].example, 1, 0)], images)),
        make((Encoder(encoder.tokenizer, encoder.template, P + 1, 128), rows, images)),
    ]
    assert len({other.fingerprint() for other in others} | {state["fingerprint"]}) == len(others) + 1
    for other in others:
        with pytest.raises(UserError, match="saved with other data or settings"):
            other.set_state(state)
    with pytest.raises(UserError, match="next_index=99 is outside"):
        make(world).set_state({**state, "next_index": 99})
    with pytest.raises(UserError, match="saved with other data"):
        make(world).set_state({})


def test_a_moved_data_folder_keeps_the_fingerprint(world):
    encoder, rows, images = world
    moved = []
    for row in rows:
        image = row.example.image and "/elsewhere/" + row.example.image.split("/")[-1]
        moved.append(replace(row, example=replace(row.example, image=image)))
    assert make((encoder, moved, images)).fingerprint() == make(world).fingerprint()


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_name_the_record_and_stay(world, threads):
    encoder, rows, images = world
    broken = TrainRow(Example("x17", "VizWiz", "/nowhere/a.jpg", (("Q", "A"),)), 1, 5)
    iterator = make((encoder, [*rows[:23], broken], images), threads)
    seen = 0
    with pytest.raises(UserError, match=r"VizWiz record x17 \(number 5 of its file\): /nowhere/a.jpg: no such image"):
        for _ in iterator:
            seen += 1
    # Grain would go on with the next batch; the failed one must not get lost.
    for _ in range(2):
        with pytest.raises(UserError, match="x17"):
            next(iterator)
    blank = make((encoder, [*rows[:23], broken], images), threads, loader=ImageLoader(ImageSpec(16), on_bad="blank"))
    assert len(list(blank)) > seen


@pytest.mark.parametrize("cores, threads", [(1, 2), (2, 2), (6, 3), (8, 4), (32, 8), (208, 8)])
def test_readers_follow_the_cores_that_the_process_may_use(monkeypatch, cores, threads):
    monkeypatch.setattr(pipeline.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert (reader_threads(0), reader_threads(5)) == (threads, 5)


def test_bad_shards(world):
    for shard in ((0, 3), (2, 2), (0, 0)):
        with pytest.raises(UserError, match="not divisible by|this is process"):
            make(world, shard=shard)
    encoded, plan = prepared(world)
    with pytest.raises(UserError, match="the batch plan names row"):
        train_iterator(encode_rows(world[1][:9], world[0]), plan, ImageLoader(ImageSpec(16)))


def test_text_only_row_is_the_same_in_any_batch(world):
    encoder, rows, images = world
    texts = [r for r in rows if r.example.image is None]
    mixed = encode_rows([texts[0], *[r for r in rows if r.example.image]], encoder)
    alone = encode_rows(texts, encoder)
    a, b = mixed.row(0, None), alone.row(0, None)
    assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.segments, b.segments)
    image = np.ones((4, 4, 3), np.float32)
    bucket = (128, 64)
    one = collate([a, mixed.row(1, image)], bucket, 0, (4, 4))
    two = collate([b, alone.row(1, None)], bucket, 0, (4, 4))
    assert_equal({k: v[:1] for k, v in one.items()}, {k: v[:1] for k, v in two.items()})


def questions(images, count=10):
    return [Question(str(100 + i), "GQA", images[i % 7] if i % 4 else None, f"Q{i} " + "x " * (i * 7 % 20), "a") for i in range(count)]


@pytest.mark.parametrize("lengths", [(), (64, 128)])
def test_eval_batches(world, lengths):
    encoder, _, images = world
    asked = questions(images)
    batches = eval_batches(asked, encoder, ImageLoader(ImageSpec(16)), batch_size=4, task_id=3, lengths=lengths)
    got = list(batches.batches())
    assert len(got) == len(batches) == 3
    valid = np.concatenate([b["valid"] for b in got])
    example = np.concatenate([b["example"] for b in got])
    assert valid.tolist() == [True] * 10 + [False] * 2 and sorted(example[valid]) == list(range(10))
    if not lengths:
        assert example[valid].tolist() == list(range(10))
    for batch in got:
        assert batch["labels"].shape == (4, 0) and (batch["task_id"] == 3).all()
        for b in range(4):
            prompt = encode_prompt(asked[batch["example"][b]], encoder.tokenizer, encoder.template, P, 128)
            n = batch["length"][b]
            np.testing.assert_array_equal(batch["tokens"][b, :n], prompt.tokens)
            assert (batch["segments"][b, n:] == PAD).all() and batch["image_mask"][b] == (asked[batch["example"][b]].image is not None)
    for start in range(4):
        for a, b in zip(batches.batches(start, threads=0), got[start:], strict=True):
            assert_equal(a, b)


def test_eval_shards(world):
    encoder, _, images = world
    asked, loader = questions(images), ImageLoader(ImageSpec(16))
    whole = eval_batches(asked, encoder, loader, batch_size=4)
    parts = [eval_batches(asked, encoder, loader, batch_size=4, process_index=p, process_count=2) for p in range(2)]
    for n in range(3):
        joined = {key: np.concatenate([part.batch(n)[key] for part in parts]) for key in whole.batch(n)}
        assert_equal(joined, whole.batch(n))


def test_bad_evaluation(world):
    encoder, _, images = world
    loader = ImageLoader(ImageSpec(16))
    with pytest.raises(UserError, match="no questions"):
        eval_batches([], encoder, loader, batch_size=4)
    with pytest.raises(UserError, match="config.evaluate.batch_size=0"):
        eval_batches(questions(images), encoder, loader, batch_size=0)
    with pytest.raises(UserError, match="config.evaluate.prompt_lengths=.*must grow"):
        eval_batches(questions(images), encoder, loader, batch_size=4, lengths=(64, 64))
    with pytest.raises(UserError, match="the prompt of GQA question 105 has 43 positions"):
        eval_batches(questions(images), encoder, loader, batch_size=4, lengths=(8,))
    batches = eval_batches([Question("9", "GQA", "/nowhere.jpg", "Q", "")], encoder, loader, batch_size=4)
    with pytest.raises(UserError, match="GQA question 9: /nowhere.jpg"):
        batches.batch(0)
    with pytest.raises(UserError, match="cannot resume at batch 5"):
        batches.batches(5)
