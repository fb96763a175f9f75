"""The eight scorers in both modes, the joining of predictions and references, and the messages for bad input."""

from __future__ import annotations

import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Question
from proglora_jax.data.tasks import TASKS
from proglora_jax.evaluation.evaluator import score_answers, unasked_references
from proglora_jax.evaluation.scores import (
    SCORERS,
    Prediction,
    Reference,
    ceiling,
    score,
    score_modes,
)
from proglora_jax.evaluation.scores_rules import ScoreOptions, option_letter


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


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("B. text", "B"),
        ("The answer is C.", "C"),
        ("Look at the map. The answer is D. BECAUSE: it is farthest north", "D"),
        ("The answer is C", None),  # a character must follow
        ("The answer is C, of course", "C"),  # any
        ("The answer is C\n", None),  # but a line's end
        ("The answer is A. The answer is B.", None),
        ("the answer is C.", None),
        ("The answer is F.", "F"),
        ("a cat", None),
        ("A.", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("rule", ["llava", "proglora"])
def test_option_letter_as_llavas_script_reads_it(text, letter, rule):
    assert option_letter(text, rule) == letter


def test_scienceqa_rules():
    llava, proglora = ScoreOptions(scienceqa_rule="llava"), ScoreOptions(scienceqa_rule="proglora")
    texts = {"1": "The answer is B.", "2": "b", "3": "B. text", "4": "It is a map. The answer is B."}
    references = [Reference(name, "B", choices=2) for name in (*texts, "5")]
    predictions = [Prediction(name, text) for name, text in texts.items()]
    found = {options: score("scienceqa", predictions, references, options=options) for options in (ScoreOptions(), llava, proglora)}
    assert found[ScoreOptions()].correct == (1, 1, 1, 0, 0), "the article of the fourth counts as A"
    assert found[llava].correct == (1, 0, 1, 1, 0) and found[llava].accuracy == 60.0
    assert found[proglora].correct == (1, 0, 1, 1) and found[proglora].accuracy == 75.0
    assert found[proglora].question_ids == ("1", "2", "3", "4") and found[proglora].total == 4
    assert {result.missing for result in found.values()} == {1} and found[llava].unparsable == found[proglora].unparsable == 1
    clean = [score("scienceqa", predictions, references, "clean", options) for options in (None, llava, proglora)]
    assert clean[0] == clean[1] == clean[2], "the clean mode has one rule"
    assert score("scienceqa", [], references, options=proglora).accuracy == 0.0
    assert score("vqav2", predictions[:1], references, options=proglora).total == 5, "the other tasks divide as ever"
    assert ceiling("scienceqa", references, "coin", llava).accuracy == 100.0


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


def test_grounding_as_for_minigpt():
    """A wide image: its box has other numbers than in the padded square."""
    reference = {"answer": "[0.2, 0.4, 0.4, 0.6]", "bbox": (0.2, 0.4, 0.4, 0.6), "origin_bbox": (0.2, 0.3, 0.4, 0.7)}
    minigpt = ScoreOptions(grounding_rule="minigpt")
    assert one("grounding", "the box is [0.2, 0.3, 0.4, 0.7].", options=minigpt, **reference) == 1.0
    assert one("grounding", "[0.2, 0.44, 0.4, 0.56]", options=minigpt, **reference) == 0.0
    assert one("grounding", "[0.2, 0.44, 0.4, 0.56]", "clean", minigpt, **reference) == 1.0, "the clean mode has one rule"
    assert score("grounding", [Prediction("q", "[0.2, 0, 0.4, 0.7]")], [Reference("q", **reference)], options=minigpt).unparsable == 1
    edge = Reference("2", "[0.0, 0.4, 0.4, 0.6]", bbox=(0.0, 0.4, 0.4, 0.6), origin_bbox=(0.0, 0.3, 0.4, 0.7))
    assert ceiling("grounding", [Reference("1", **reference), edge], "coin", minigpt).correct == (1.0, 0.0), "a zero is passed over"
    assert ceiling("grounding", [Reference("1", **reference), edge], "clean", minigpt).correct == (1.0, 1.0)
    with pytest.raises(UserError, match="question_id 3: has no 'origin_answer_bbox' of four numbers, which config.evaluate.grounding_rule"):
        score("grounding", [], [Reference("3", "[0.2, 0.4, 0.4, 0.6]")], options=minigpt)


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


def test_scienceqas_denominator_is_the_whole_test_split():
    """CoIN's script takes a question of the split without an answer for wrong; ProgLoRA's divides by the answers."""
    problems = {str(pid): {"answer": pid % 2, "choices": ["x", "y"]} for pid in range(6)}
    auxiliary = {"problems": problems, "pid_splits": {"test": ["1", "2", "3", 4], "val": ["5"]}}
    questions = [Question(pid, "ScienceQA", None, "Which?", "") for pid in ("3", "2")]
    unasked = unasked_references("scienceqa", questions, auxiliary)
    assert [(reference.question_id, reference.answer) for reference in unasked] == [("1", "1"), ("4", "0")]
    result = lambda unasked, **rules: score_answers("scienceqa", {0: "B", 1: "B"}, questions, auxiliary, ScoreOptions(**rules), unasked)
    for rule, percent in (("coin", 25.0), ("llava", 25.0), ("proglora", 50.0)):
        made = result(unasked, scienceqa_rule=rule)
        assert made["accuracy"] == {"coin": percent, "clean": 50.0}
        assert made["correct"] == {"coin": [1.0, 0.0], "clean": [1.0, 0.0]}
        assert made["ceiling"] == {"coin": 100.0 if rule == "proglora" else 50.0, "clean": 100.0}
        assert (made["count"], made["missing"]) == ((2, 2) if rule == "proglora" else (4, 2))
    assert result(())["accuracy"]["coin"] == 50.0 and result(())["missing"] == 0
    assert unasked_references("imagenet", questions, {}) == []
    with pytest.raises(UserError, match="question 9: its id is not in problems.json"):
        unasked_references("scienceqa", questions, auxiliary | {"pid_splits": {"test": ["2", "9"]}})
    for splits in ({}, {"test": "1"}, {"test": 3}):
        with pytest.raises(UserError, match="scienceqa references: pid_splits.json lists no pids of the split 'test'; download it again"):
            unasked_references("scienceqa", questions, auxiliary | {"pid_splits": splits})


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
    for task in ("imagenet", "vizwiz", "vqav2", "ocrvqa"):
        with pytest.raises(UserError, match=f"references of {task}: 1 problem.s.: question_id 2: has no 'answer'"):
            score(task, [], [*reference, Reference("2", " ")])
