"""Both box parsers on the same strings, and the strict half of the intersection over union."""

from __future__ import annotations

import math

import pytest

from proglora_jax.evaluation.boxes import as_text, iou, parse_clean, parse_coin, parse_minigpt, read_reference, to_unit

EXACT = (0.41, 0.28, 0.60, 0.93)


@pytest.mark.parametrize(
    ("text", "coin", "clean"),
    [
        ("[0.41, 0.28, 0.60, 0.93]", (0.41, 0.28, 0.60, 0.9), EXACT),
        ("[0.41, 0.28, 0.6, 0.9]", (0.41, 0.28, 0.6, 0.0), (0.41, 0.28, 0.6, 0.9)),
        ("[0.41, 0.28, 0.60, 0.93].", (0.41, 0.28, 0.60, 0.93), EXACT),
        ("(0.41, 0.28, 0.60, 0.93)", EXACT, EXACT),
        ("[1.0, 0.0, 1.0, 1.0]", (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0)),
        ("[0.41, 0.28, 0.60]", None, None),
        ("", None, None),
        ("The box is [0.41, 0.28, 0.60, 0.93].", None, EXACT),
        ("[0.41, 0.28, 0.60, 0.93]</s>", None, EXACT),
        ("[nan, 0.2, 0.3, 0.44]", None, None),
        ("[0.60, 0.93, 0.41, 0.28]", (0.60, 0.93, 0.41, 0.2), EXACT),
        ("[-0.1, 0.28, 1.2, 0.93]", (0.1, 0.28, 1.2, 0.9), (0.0, 0.28, 1.0, 0.93)),
    ],
)
def test_parsers(text, coin, clean):
    assert parse_coin(text) == coin
    assert parse_clean(text) == clean


def test_untruncated_coin_parser():
    assert parse_coin("[0.41, 0.28, 0.6, 0.9]", truncate=False) == (0.41, 0.28, 0.6, 0.9)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.41, 0.28, 0.60, 0.93]", EXACT),
        ("[0.41, 0.28, 0.6, 0.9]", (0.41, 0.28, 0.6, 0.9)),
        ("The box is (0.41, 0.28, 0.60, 0.93) or [0.1, 0.1, 0.2, 0.2].</s>", EXACT),
        ("[1.0, 0.05, 12.5, 1.]", (1.0, 0.05, 12.5, 1.0)),
        ("[0.0, 0.28, 0.60, 0.93]", None),  # zeros and whole numbers are no decimals
        ("[0.0, 0.28, 0.60, 0.93] 0.7", (0.28, 0.60, 0.93, 0.7)),
        ("[41, 28, 60, 93]", None),
        ("[-0.41, 0.28, 0.60, 0.93]", EXACT),  # nor has a decimal a sign
        ("[0.41, 0.28, 0.60]", None),
        ("", None),
    ],
)
def test_the_parser_for_minigpt(text, box):
    assert parse_minigpt(text) == box


def test_reference_boxes_of_any_frame():
    assert read_reference("[0.41, 0.28, 0.60, 0.93]") == read_reference([0.41, 0.28, 0.6, 0.93]) == EXACT
    assert read_reference("[10, 20, 30.5, 40]") == (10, 20, 30.5, 40)
    for bad in (None, "", 7, "[0.1, 0.2, 0.3]", "[0.1, nan, 0.2, 0.3]", [0.1, None, 0.2, 0.3], {"x": 1}):
        assert read_reference(bad) is None


def test_pixels_are_scaled_by_the_longer_side():
    assert parse_clean("50 100 150 200", size=(400, 200)) == (0.125, 0.25, 0.375, 0.5)
    assert parse_clean("50 100 150 200") == (1.0, 1.0, 1.0, 1.0)
    assert to_unit((0.1, 0.2, 0.3, 1.6), size=(400, 200)) == (0.1, 0.2, 0.3, 1.0)


def test_hyphen_between_numbers_is_no_sign():
    assert parse_clean("0.1-0.2-0.3-0.4") == (0.1, 0.2, 0.3, 0.4)


def test_endless_digits_are_no_number():
    assert parse_clean("9" * 400 + " 0.1 0.2 0.3") is None


def test_numbers_with_exponents_and_numbers_that_are_none():
    assert parse_clean("[1e-2, 0.28, 6.0E-1, .93]") == (0.01, 0.28, 0.6, 0.93)
    for none in ("nan", "NaN", "inf", "-inf", "Infinity", "1e999"):
        assert parse_clean(f"[{none}, 0.1, 0.2, 0.3, 0.4]") is parse_clean(f"[0.1, 0.2, 0.3, {none}]") is None
        assert parse_clean(f"[0.1, 0.2, 0.3, 0.4] {none}") == (0.1, 0.2, 0.3, 0.4)
    assert parse_clean("The banana, info 3.end: [0.1, 0.2, 0.3]") == (0.2, 0.1, 1.0, 0.3)


def test_iou():
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1.0
    assert iou((0, 0, 1, 0.5), (0, 0, 1, 1)) == 0.5
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert iou((1, 1, 0, 0), (0, 0, 1, 1)) == 0.0, "swapped corners overlap nothing"
    assert iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0, "no area"
    for bad in (math.nan, math.inf):
        assert iou((bad, 0, 1, 1), (0, 0, 1, 1)) == 0.0


def test_as_text():
    assert as_text((0.41, 0.9, 1.0, 1.0)) == "[0.41, 0.9, 1.0, 1.0]"
