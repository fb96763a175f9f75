"""Properties of the batch plan: every row once, one modality per batch, buckets that fit, the same plan for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.data.plan import BatchPlan, check_buckets, plan_batches, suggest_buckets

BUCKETS = ((40, 8), (80, 16), (200, 32))


def sizes(seed: int, count: int, image_share: float):
    rng = np.random.default_rng(seed)
    has_image = rng.random(count) < image_share
    return rng.integers(5, 120, count) + 60 * has_image, rng.integers(1, 32, count), has_image


def make(count=203, image_share=0.6, seed=0, **options) -> tuple[BatchPlan, tuple]:
    data = sizes(seed, count, image_share)
    return plan_batches(*data, **{"batch_size": 16, "buckets": BUCKETS, "seed": seed, **options}), data


@pytest.mark.parametrize("grouping", ["modality_length", "bucket", "none"])
@pytest.mark.parametrize("image_share", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("count", [16, 17, 203])
@pytest.mark.parametrize("remainder", ["drop", "wrap"])
def test_every_row_once_per_epoch(grouping, image_share, count, remainder):
    plan, _ = make(count, image_share, seed=3, epochs=3, grouping=grouping, remainder=remainder, chunks=4)
    for epoch in range(3):
        rows = plan.rows[plan.epoch == epoch].ravel()
        if remainder == "drop":
            assert len(np.unique(rows)) == len(rows) == count // 16 * 16
        else:
            assert len(np.unique(rows)) == count and len(rows) == -(-count // 16) * 16
    assert plan.dropped == (0 if remainder == "wrap" else 3 * (count % 16))


@pytest.mark.parametrize("grouping", ["modality_length", "bucket", "none"])
def test_buckets_are_the_smallest_that_fit(grouping):
    plan, (lengths, labels, _) = make(500, grouping=grouping)
    for bucket, rows in zip(plan.bucket, plan.rows):
        fits = [lengths[rows].max() <= t and labels[rows].max() <= k for t, k in BUCKETS]
        assert fits.index(True) == bucket


def test_bucket_grouping_is_homogeneous():
    plan, (lengths, labels, _) = make(500, grouping="bucket")
    mixed = 0
    for rows in plan.rows:
        own = [next(i for i, (t, k) in enumerate(BUCKETS) if lengths[r] <= t and labels[r] <= k) for r in rows]
        mixed += len(set(own)) > 1
    assert mixed <= len(BUCKETS)


@pytest.mark.parametrize("count", [203, 208, 96])
def test_modalities_mix_only_at_the_end(count):
    plan, (_, _, has_image) = make(count, remainder="wrap")
    kinds = [set(has_image[rows].tolist()) for rows in plan.rows]
    assert all(len(kind) == 1 for kind in kinds[:-2]) and {True} in kinds and {False} in kinds
    # What is set aside, the last batch of each kind even if full, is sorted by row number.
    aside = sum(int(np.count_nonzero(has_image == kind)) % 16 or 16 for kind in (True, False))
    tail = plan.rows.ravel()[count - aside : count]
    assert (np.diff(tail) > 0).all() and set(has_image[tail]) == {True, False}


def test_chunks_have_similar_total_lengths():
    plan, (lengths, _, _) = make(320, 1.0, chunks=4)
    plain, _ = make(320, 1.0, grouping="none")

    def spread(rows):
        totals = lengths[rows].reshape(len(rows), 4, 4).sum(axis=-1)
        return (totals.max(axis=1) - totals.min(axis=1)).mean()

    assert spread(plan.rows) < 0.3 * spread(plain.rows)


def test_chunks_are_dealt_by_words_without_the_image():
    """By hand: 100 | 30 30 30 30 fills the second chunk, though with 576 positions an image the third 30 would go to the first."""
    words = np.array([100, 30, 30, 30, 30, 30, 5, 5])
    plan = plan_batches(words + 576, words, np.ones(8, bool), batch_size=8, buckets=((700, 100),), seed=0, chunks=2, image_positions=576)
    assert words[plan.rows[0]].tolist() == [100, 30, 5, 5, 30, 30, 30, 30]


def test_same_seed_same_plan():
    first, _ = make(epochs=2)
    again, _ = make(epochs=2)
    assert first.digest() == again.digest() and np.array_equal(first.rows, again.rows)
    data = sizes(0, 203, 0.6)
    other = plan_batches(*data, batch_size=16, buckets=BUCKETS, seed=1, epochs=2)
    assert other.digest() != first.digest()
    assert not np.array_equal(first.rows[first.epoch == 0], first.rows[first.epoch == 1])


def test_a_longer_plan_starts_like_a_shorter_one():
    short, _ = make(max_steps=5)
    long, _ = make(max_steps=40)
    assert len(short) == 5 and len(long) == 40 and np.array_equal(long.rows[:5], short.rows) and long.epoch[-1] > 0


def test_few_rows_wrap_around():
    plan, _ = make(5, 1.0, remainder="wrap", max_steps=3)
    assert plan.rows.shape == (3, 16) and all(set(rows) == set(range(5)) for rows in plan.rows.tolist())


def test_suggested_buckets_fit():
    lengths, labels, _ = sizes(0, 300, 0.5)
    for count in (1, 3):
        buckets = suggest_buckets(lengths, labels, count)
        assert len(buckets) <= count and check_buckets(buckets) == buckets
        plan_batches(lengths, labels, np.ones(300, bool), batch_size=8, buckets=buckets, seed=0)
    assert suggest_buckets([10, 60, 65], [1, 2, 17]) == ((128, 24),)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 15}, "config.train.batch_size=16: only 15 rows"),
        ({"count": 0}, "no training rows are left"),
        ({"batch_size": 0}, "config.train.batch_size=0"),
        ({"chunks": 3}, "divisible by its 3 chunks"),
        ({"epochs": 0}, "config.train.epochs=0"),
        ({"grouping": "x"}, "config.data.grouping=x"),
        ({"remainder": "x"}, "config.data.remainder=x"),
        ({"buckets": ()}, "data.buckets"),
        ({"buckets": ((80, 8), (40, 8))}, "must grow"),
        ({"buckets": ((80, 8), (90, 4))}, "must grow"),
        ({"buckets": ((50, 32),)}, "do not fit the largest bucket"),
    ],
)
def test_bad_settings(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make(**options)
