"""Evaluation batches grouped by image: every question once with its own image and prompt, static shapes, shares, fillers, resuming."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import save_pattern, save_tokenizer

from proglora_jax.data.batch import PAD
from proglora_jax.data.errors import UserError
from proglora_jax.data.image_groups import GroupedBatches, fill_lanes, group_by_image
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.pipeline import eval_batches
from proglora_jax.data.schema import Question
from proglora_jax.data.templates import TEMPLATES
from proglora_jax.data.tokens import Encoder, encode_prompt, load_tokenizer

P, SIDE = 40, 16
# Questions by image, in the order in which they are asked; -1 has none. Images 4 and 6 are alone.
ASKED = [0, 1, 0, -1, 2, 0, 1, 3, 4, 3, 5, 2, 2, 2, 2, -1, 2, 2, 6, 5]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    tokenizer = load_tokenizer(save_tokenizer(str(folder / "tok")))
    images = [save_pattern(str(folder / f"{i}.png"), 20 + 3 * i, 30) for i in range(7)]
    return Encoder(tokenizer, TEMPLATES["vicuna_v1_bare"], P, 160), images


def questions(images, asked=ASKED, words=lambda i: i * 7 % 20):
    return [Question(str(100 + i), "GQA", images[image] if image >= 0 else None, f"Q{i} " + "x " * words(i), "a")
            for i, image in enumerate(asked)]  # fmt: skip


def plain(world, asked=ASKED, batch_size=8, words=lambda i: i * 7 % 20, **options):
    encoder, images = world
    return eval_batches(questions(images, asked, words), encoder, ImageLoader(ImageSpec(SIDE)), batch_size=batch_size, task_id=3, **options)


def test_groups_go_into_lanes_in_order_and_on_in_the_next_where_they_do_not_fit():
    lanes = fill_lanes([[0, 1, 2], [3], [4, 5, 6, 7, 8], [9]], rows=4, images=2)
    assert [lane.images for lane in lanes] == [(0, 3), (4,), (8, 9)]
    assert [lane.rows for lane in lanes] == [((0, 0), (1, 0), (2, 0), (3, 1)), ((4, 0), (5, 0), (6, 0), (7, 0)), ((8, 0), (9, 1))]
    assert fill_lanes([], 4, 2) == []


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(), (64, 128)])
def test_every_question_is_asked_once_with_its_own_image_and_prompt(world, ways, lengths):
    encoder, images = world
    asked, loader = questions(images), ImageLoader(ImageSpec(SIDE))
    batches = group_by_image(plain(world, lengths=lengths), ways, 0.0)
    assert isinstance(batches, GroupedBatches)
    got = list(batches.batches())
    assert len(got) == len(batches)
    found = []
    for n, batch in enumerate(got):
        members = batch["example"][batch["valid"]].tolist()
        assert members == batches.members(n)
        found += members
        for row in np.flatnonzero(batch["valid"]):
            question, length = asked[batch["example"][row]], batch["length"][row]
            expected = encode_prompt(question, encoder.tokenizer, encoder.template, P, 160)
            tokens, segments = batch["tokens"][row, :length], batch["segments"][row, :length]
            if "slot" in batch:
                place = row // (8 // ways) * batches.images + batch["slot"][row]
                tokens = np.concatenate([batch["prefix_tokens"][place], tokens])
                segments = np.concatenate([batch["prefix_segments"][place], segments])
                np.testing.assert_array_equal(batch["image"][place], loader(question.image))
                assert batch["slot"][row] < batches.images
            np.testing.assert_array_equal(tokens, expected.tokens)
            np.testing.assert_array_equal(segments, expected.segments)
            assert (batch["segments"][row, length:] == PAD).all() and batch["task_id"][row] == 3
            assert ("slot" in batch) == (question.image is not None)
    assert sorted(found) == list(range(len(ASKED)))
    for start in (0, 1, len(got)):
        for again, before in zip(batches.batches(start, threads=0), got[start:], strict=True):
            assert all(np.array_equal(again[name], before[name]) for name in before)


def test_shapes_are_static_and_suffixes_no_longer_than_needed(world):
    batches = group_by_image(plain(world, lengths=(64, 128)), 2, 0.0)
    with_images = [batch for batch in batches.batches() if "slot" in batch]
    assert {batch["image"].shape for batch in with_images} == {(2 * batches.images, SIDE, SIDE, 3)}
    widths = [batch["tokens"].shape for batch in with_images]
    assert {rows for rows, _ in widths} == {8} and len(set(widths)) <= 2 and widths == sorted(widths)
    encoder, images = world
    longest = max(len(item.tokens) for item in encoder.encode_questions(questions(images)))
    start = with_images[0]["prefix_tokens"].shape[1]
    assert longest - start <= widths[-1][1] < 128 - start
    for n in range(len(batches)):
        blank, batch = batches.blank(n), batches.batch(n)
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in blank.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()}
        assert not blank["valid"].any()


def test_shares_of_two_processes_are_the_whole(world):
    whole = group_by_image(plain(world), 4, 0.0)
    parts = [group_by_image(plain(world, process_index=p, process_count=2), 4, 0.0) for p in range(2)]
    for n in range(len(whole)):
        expected = whole.batch(n)
        for name, leaf in expected.items():
            np.testing.assert_array_equal(np.concatenate([part.batch(n)[name] for part in parts]), leaf)
        assert parts[0].members(n) == parts[1].members(n) == whole.members(n)


def test_batches_hold_alike_however_unequal_the_groups_are(world):
    asked = [image for image in range(7) for _ in range([9, 1, 1, 1, 9, 1, 9][image])]
    batches = group_by_image(plain(world, asked), 1, 0.0)
    full = [int(batch["valid"].sum()) for batch in batches.batches()]
    assert full[:-1] == [8] * (len(full) - 1) and sum(full) == len(asked)


def test_what_is_saved_by_hand(world):
    """Four images with three questions each of 42 + 3 positions, padded to 64, in batches of 6 with places for two images."""
    asked = [image for image in range(4) for _ in range(3)]
    batches = group_by_image(plain(world, asked, 6, words=lambda i: 0), 1)
    start, rest = batches.batch(0)["prefix_tokens"].shape[1], batches.batch(0)["tokens"].shape[1]
    assert batches.images == 2 and len(batches) == 2
    assert batches.gain == 12 * 64 / (2 * (2 * start + 6 * rest))


def test_plain_batches_stay_where_nothing_is_won(world):
    alone = plain(world, [0, 1, 2, 3, 4, 5])
    assert group_by_image(alone, 1, 0.0) is alone, "no two questions share an image"
    text = plain(world, [-1, -1, -1])
    assert group_by_image(text, 1, 0.0) is text
    single = plain(world)
    assert group_by_image(single, 8, 0.0) is single, "a device has one row"
    encoder, images = world
    fits = len(encode_prompt(questions(images, words=lambda i: 12)[0], encoder.tokenizer, encoder.template, P, 160).tokens)
    few = plain(world, [0, 0, 1, 2, 3, 4, 5, 6], words=lambda i: 12, lengths=(fits,))
    assert group_by_image(few, 1) is few and group_by_image(few, 1, 0.0) is not few


def test_an_image_that_cannot_be_read_is_named_with_its_question(world):
    encoder, images = world
    asked = [Question("9", "GQA", "/nowhere.jpg", "Q", "")] * 2
    batches = group_by_image(eval_batches(asked, encoder, ImageLoader(ImageSpec(SIDE)), batch_size=4), 1, 0.0)
    with pytest.raises(UserError, match="GQA question 9: /nowhere.jpg"):
        batches.batch(0)


def test_a_task_that_fills_no_batch_has_places_for_its_images_alone(world):
    batches = group_by_image(plain(world, [0, 0, 0, 1, 1, 1], 16), 1, 0.0)
    assert len(batches) == 1 and batches.images == 2 and batches.gain > 1
