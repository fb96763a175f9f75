"""The eight scorers in both modes, the joining of predictions and references, and the messages for bad input."""

from __future__ import annotations

import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import TASKS
from proglora_jax.evaluation.scores import (
    SCORERS,
    Prediction,
    Reference,
    ScoreOptions,
    ceiling,
    option_letter,
    score,
    score_modes,
)


def one(task, text, mode="coin", options=None, **reference):
    """Score of a single prediction."""
    return score(task, [Prediction("q", text)], [Reference("q", **reference)], mode, options).correct[0]


def both(task, text, **reference):
    return one(task, text, "coin", **reference), one(task, text, "clean", **reference)


def test_every_task_has_a_scorer():
    assert {task.scorer for task in TASKS.values()} == set(SCORERS)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("B. text", "B"),
        ("The answer is C.", "C"),
        ("a cat", "A"),
        ("A.", "A"),
        ("It's B", "S"),
        ("2 dogs", "2"),
        ("F", "F"),
        ("", None),
        ("none here", None),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


def test_scienceqa():
    assert one("scienceqa", "B. text", answer="B", choices=3) == 1.0
    assert one("scienceqa", "B", answer="1", choices=3) == 1.0, "an option index"
    assert one("scienceqa", "E", answer="E", choices=3) == 0.0, "outside the choices"
    assert one("scienceqa", "E", answer="E") == 1.0
    assert one("scienceqa", "a cat", answer="A", choices=2) == 1.0
    assert one("scienceqa", "It's B", answer="B", choices=4) == 0.0
    result = score("scienceqa", [Prediction("q", "")], [Reference("q", "A")])
    assert (result.accuracy, result.unparsable, result.empty) == (0.0, 1, 1)


def test_textvqa():
    answers = ("two cats",) * 3 + ("cats",) * 7
    assert one("textvqa", "The Two-Cats.", answers=answers) == 0.9
    assert score("textvqa", [Prediction("q", "2 cats")], [Reference("q", answers=answers)]).accuracy == pytest.approx(90.0)


@pytest.mark.parametrize(
    ("text", "answer", "coin", "clean"),
    [
        ("Toaster.", "Toaster", 1, 1),
        ("Toaster", "Toaster", 1, 1),
        ("toaster", "Toaster", 0, 1),
        ("", "Toaster", 1, 0),
        ("T", "Toaster", 1, 0),
        ("It is a Hog in a pen", "Hog", 1, 0),
        ("Hen", "Hog", 0, 0),
    ],
)
def test_imagenet(text, answer, coin, clean):
    assert both("imagenet", text, answer=answer) == (coin, clean)


def test_imagenet_empty_flag():
    strict = ScoreOptions(imagenet_empty_ok=False)
    assert one("imagenet", "", options=strict, answer="Toaster") == 0.0
    assert one("imagenet", "Toaster.", options=strict, answer="Toaster") == 1.0


def test_gqa():
    assert both("gqa", "Yes.", answer="yes") == (1, 1)
    assert both("gqa", "yes...", answer="yes") == (1, 0), "coin drops every trailing period, clean one"
    assert both("gqa", " yes", answer="yes") == (0, 1)
    assert both("gqa", "no", answer="yes") == (0, 0)


def test_gqa_counts_balanced_questions_only():
    references = [Reference("1", "yes"), Reference("2", "no", balanced=False)]
    result = score("gqa", [Prediction("1", "yes"), Prediction("2", "yes")], references)
    assert (result.accuracy, result.total, result.question_ids, result.unknown) == (100.0, 1, ("1",), 1)


@pytest.mark.parametrize("task", ["vizwiz", "vqav2"])
def test_upper_case_tasks(task):
    assert both(task, "Unanswerable", answer="unanswerable") == (1, 1)
    assert both(task, "red.", answer="Red") == (0, 1)
    assert both(task, "light  red", answer="light red") == (0, 1)
    assert both(task, "the red", answer="red") == (0, 0)


def test_ocrvqa():
    assert both("ocrvqa", "Unanswerable", answer="Unanswerable") == (0, 0)
    assert both("ocrvqa", "unanswerable", answer="Unanswerable") == (1, 1)
    assert both("ocrvqa", "the title", answer="The Title") == (1, 1)
    assert both("ocrvqa", "The Title.", answer="The Title") == (0, 1)


def test_grounding():
    reference = {"answer": "[0.41, 0.28, 0.60, 0.93]"}
    assert both("grounding", "[0.41, 0.28, 0.60, 0.93]", **reference) == (1, 1)
    assert both("grounding", "[0.41, 0.28, 0.6, 0.9]", **reference) == (0, 1)
    assert both("grounding", "The box is [0.41, 0.28, 0.60, 0.93].", **reference) == (0, 1)
    untruncated = ScoreOptions(grounding_truncate=False)
    assert one("grounding", "[0.41, 0.28, 0.6, 0.9]", options=untruncated, **reference) == 1
    result = score_modes("grounding", [Prediction("q", "nothing")], [Reference("q", **reference)])
    assert (result["coin"].unparsable, result["clean"].unparsable) == (1, 1)


def test_grounding_overlap_of_exactly_one_half_is_wrong():
    reference = {"bbox": (0.0, 0.0, 1.0, 1.0)}
    assert both("grounding", "[0.0, 0.0, 1.00, 0.50]", **reference)[1] == 0
    assert one("grounding", "[0.0, 0.0, 1.00, 0.50]", options=ScoreOptions(grounding_truncate=False), **reference) == 0
    assert one("grounding", "[0.0, 0.0, 1.00, 0.51]", "clean", **reference) == 1


def test_grounding_pixel_prediction_uses_the_image_size_in_clean_mode():
    reference = {"bbox": (0.125, 0.25, 0.375, 0.5), "size": (400, 200)}
    assert both("grounding", "[50, 100, 150, 200]", **reference) == (0, 1)


def test_missing_predictions_are_wrong_and_stay_in_the_denominator():
    references = [Reference(str(index), "Toaster") for index in range(4)]
    result = score("imagenet", [Prediction("2", "Toaster"), Prediction("9", "Toaster")], references)
    assert result.correct == (0.0, 0.0, 1.0, 0.0)
    assert (result.accuracy, result.missing, result.empty, result.unknown, result.unparsable) == (25.0, 3, 0, 1, 0)
    assert score("imagenet", [], references).accuracy == 0.0


def test_repeated_ids_pair_in_order():
    references = [Reference("1", "red"), Reference("1", "blue")]
    assert score("vqav2", [Prediction("1", "red"), Prediction("1", "blue")], references).accuracy == 100.0


def test_ids_are_compared_as_text():
    assert score("vqav2", [Prediction(7, "red")], [Reference("7", "red")]).accuracy == 100.0


def test_ceiling():
    boxes = [
        Reference("1", "[0.41, 0.28, 0.60, 0.93]"),
        Reference("2", "[0.41, 0.28, 0.6, 0.9]"),
        Reference("3", bbox=(0.0, 0.0, 0.5, 0.55)),
    ]
    assert ceiling("grounding", boxes).correct == (1.0, 0.0, 1.0)
    assert ceiling("grounding", boxes, "clean").accuracy == 100.0
    assert ceiling("ocrvqa", [Reference("1", "Unanswerable"), Reference("2", "x")]).accuracy == 50.0
    spread = ("a",) + ("cat", "dog", "cow") * 3
    assert ceiling("textvqa", [Reference("1", answers=spread)]).accuracy == pytest.approx(90.0)
    assert ceiling("scienceqa", [Reference("1", "2", choices=3), Reference("2", "B", choices=3)]).accuracy == 100.0


def test_errors():
    reference = [Reference("1", "red")]
    with pytest.raises(UserError, match="scorer 'vqa': unknown; use one of scienceqa"):
        score("vqa", [], reference)
    with pytest.raises(UserError, match="mode 'both': unknown; use one of coin, clean"):
        score("vqav2", [], reference, "both")
    with pytest.raises(UserError, match="references of vqav2: there are none"):
        score("vqav2", [], [])
    with pytest.raises(UserError, match="question_id 1: 2 predictions"):
        score("vqav2", [Prediction("1", "a"), Prediction("1", "b")], reference)
    with pytest.raises(UserError, match="none of the 1 question ids .first: 'x'. is among the references"):
        score("vqav2", [Prediction("x", "a")], reference)
    with pytest.raises(UserError, match="question_id 1: 0 answers, 10 are needed"):
        score("textvqa", [], reference)
    with pytest.raises(UserError, match="question_id 1: answer 'red' is neither an option letter"):
        score("scienceqa", [], reference)
    with pytest.raises(UserError, match="question_id 1: answer 'red' and bbox None hold no box"):
        score("grounding", [], reference)
