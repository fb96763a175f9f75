"""The TextVQA answer processor and soft score against CoIN's golden examples."""

from __future__ import annotations

import pytest

from proglora_jax.evaluation.textvqa import CONTRACTIONS, process, soft_score


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("The Two-Cats.", "2 cats"),
        ("it's 3.5, ok?", "it 's 3.5 ok"),
        ("St. John's", "st john 's"),
        ("1,000", "1000"),
        ("a/b c", "b c"),
        ("dont!", "don't"),
        ("Hello - world", "hello world"),
        ("10:30 am", "10:30 am"),
        ("coca-cola", "coca cola"),
        ("$5.00.", "$5.00"),
        ("none", "0"),
        ("www.x.com", "wwwxcom"),
        ("a. b. c.", "b c"),
        ("let's go", "let 's go"),
        ("", ""),
        ("  the \n red\tbus ", "red bus"),
    ],
)
def test_processor_golden(text, processed):
    assert process(text) == processed


def test_mark_beside_a_blank_is_deleted_everywhere():
    # "a-b" alone would become "b" and "a"; the second hyphen stands beside a blank, so both are deleted.
    assert process("x-y z -w") == "xy z w"


def test_at_most_32_periods_are_deleted():
    assert process("x." * 40).count(".") == 40 - 32


def test_contractions():
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert "lets" not in CONTRACTIONS and "shes" not in CONTRACTIONS
    assert process("couldntve been") == "couldntve been"


@pytest.mark.parametrize(("equal", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_score_steps(equal, score):
    answers = ["The Cat."] * equal + [f"other {index}" for index in range(10 - equal)]
    assert soft_score("cat", answers) == score


def test_soft_score_is_the_leave_one_out_average():
    for equal in range(11):
        answers = ["cat"] * equal + ["dog"] * (10 - equal)
        rounds = [min(1.0, (equal - (answer == "cat")) / 3) for answer in answers]
        assert soft_score("cat", answers) == pytest.approx(sum(rounds) / 10)


def test_soft_score_needs_ten_references():
    with pytest.raises(ValueError, match="exactly 10 reference answers, got 9"):
        soft_score("cat", ["cat"] * 9)
