"""What is counted as padding, against the batches themselves, and the bucket that plans are made for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_image_groups import plain
from test_image_groups import world as asked  # noqa: F401 (a fixture)
from test_pipeline import make, prepared, world  # noqa: F401 (a fixture)

from proglora_jax.data.image_groups import GroupedBatches, group_by_image
from proglora_jax.data.padding import Padding, padding_by_length
from proglora_jax.data.plan import BUCKETS, PROMPT_LENGTHS, check_buckets, main_bucket, plan_batches


@pytest.mark.parametrize("grouping", ["modality_length", "bucket", "none"])
def test_padding_of_a_plan_is_that_of_its_batches(world, grouping):  # noqa: F811
    encoded, plan = prepared(world, grouping=grouping)
    found = plan.padding()
    bucket = [plan.buckets[place][0] for place in plan.bucket]
    assert found.positions == sum(len(encoded.row(int(number), None).tokens) for number in plan.rows.ravel())
    assert found.padded_positions == 8 * sum(bucket) and found.batches == {top: bucket.count(top) for top in sorted(set(bucket))}
    assert 0 < found.share == 1 - found.positions / found.padded_positions


def test_padding_is_what_the_batches_hold(world):  # noqa: F811
    _, plan = prepared(world)
    batches = list(make(world))
    assert plan.padding().positions == sum(int(batch["length"].sum()) for batch in batches)
    assert plan.padding().padded_positions == sum(batch["tokens"].size for batch in batches)


@pytest.mark.parametrize("lengths", [(), (64, 128)])
def test_padding_of_prompts_counts_fillers_and_not_what_they_repeat(asked, lengths):  # noqa: F811
    batches = plain(asked, lengths=lengths)
    got, found = list(batches.batches()), batches.padding()
    assert found.positions == sum(int(batch["length"][batch["valid"]].sum()) for batch in got)
    assert found.padded_positions == sum(batch["tokens"].size for batch in got) and sum(found.batches.values()) == len(got) == 3
    sizes = np.asarray([len(item.tokens) for item in batches._encoded])
    assert padding_by_length(sizes, batches._lengths, 8) == found


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_padding_of_questions_that_share_images_counts_each_beginning_once(asked, ways):  # noqa: F811
    batches = group_by_image(plain(asked, lengths=(64, 128)), ways, 0.0)
    assert isinstance(batches, GroupedBatches)
    positions = padded = 0
    for batch in batches.batches():
        padded += batch["tokens"].size + batch.get("prefix_tokens", np.zeros(0)).size
        positions += int(batch["length"][batch["valid"]].sum())
        if "slot" in batch:
            device = np.arange(8) // (8 // ways)
            places = set(zip(device[batch["valid"]].tolist(), batch["slot"][batch["valid"]].tolist()))
            positions += len(places) * batch["prefix_tokens"].shape[1]
    found = batches.padding()
    assert (found.positions, found.padded_positions) == (positions, padded) and sum(found.batches.values()) == len(batches)


def test_paddings_add_up_and_survive_a_record():
    one, two = Padding.of(90, [10, 10, 30], 2), Padding.of(10, [30], 2)
    assert (one.padded_positions, one.batches, one.share) == (100, {10: 2, 30: 1}, pytest.approx(0.1))
    both = one + two
    assert both == Padding(100, 160, {10: 2, 30: 2}) and Padding() + one == one
    assert str(one) == "10.0 % padding; batches by padded length: 10: 2, 30: 1"
    assert Padding.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert Padding.from_json({"rows": 3}) is None is Padding.from_json(Padding().to_json()) and Padding().share == 0


def test_the_main_bucket_holds_an_image_and_text():
    assert main_bucket(BUCKETS, 576) == (672, 64) and main_bucket(((80, 8), (92, 24)), 36) == (80, 8)
    assert main_bucket(((64, 8), (576, 64), (600, 64)), 576) == (600, 64) and main_bucket(((64, 8), (128, 8)), 576) == (128, 8)


def test_the_default_buckets():
    tops = [top for top, _ in check_buckets(BUCKETS)]
    assert tops[0] < 576 < tops[1] and tops[-1] == PROMPT_LENGTHS[-1] == 2048
    assert not any(top % 32 for top in (*tops, *PROMPT_LENGTHS)) and 704 in tops and 704 in PROMPT_LENGTHS


@pytest.mark.parametrize("grouping", ["modality_length", "bucket", "none"])
def test_batches_with_images_are_never_shorter_than_an_image(grouping):
    """Whatever the labels; and text alone has the short bucket."""
    rng = np.random.default_rng(0)
    has_image = rng.random(2000) < 0.5
    labels = rng.integers(1, 60, 2000)
    lengths = np.where(has_image, 618, 40) + labels + rng.integers(3, 150, 2000)
    plan = plan_batches(lengths, labels, has_image, batch_size=16, buckets=BUCKETS, seed=0, grouping=grouping, image_positions=576)
    tops = np.asarray([plan.buckets[place][0] for place in plan.bucket])
    pictured = has_image[plan.rows].any(axis=1)
    assert (tops[pictured] > 576).all() and (tops >= lengths[plan.rows].max(axis=1)).all()
    assert grouping == "none" or (tops[~pictured] == 320).all() and np.count_nonzero(~pictured) > 50
