"""From answers to scores of a task: references from questions and auxiliary files, predictions from raw answers, both modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.schema import Question
from proglora_jax.evaluation import scores


def references(scorer: str, questions: Sequence[Question], auxiliary: Mapping[str, Any]) -> list[scores.Reference]:
    """What each question's answer is compared with.

    Args:
        scorer: name of the scorer.
        questions: the questions that were asked.
        auxiliary: the task's auxiliary files, see `data.tasks.load_auxiliary`.

    Raises:
        UserError: "<scorer> references: <n> problem(s): question <id> is not in ..." for questions that the files do not know.
    """
    makers = {"scienceqa": _scienceqa, "textvqa": _textvqa, "gqa": _gqa}
    make = makers.get(scorer, lambda auxiliary: _plain)(auxiliary)
    made, problems = [], []
    for question in questions:
        try:
            made.append(make(question))
        except KeyError as missing:
            problems.append(f"question {question.id}: {missing.args[0]}")
    raise_collected(problems, f"{scorer} references", "Check that the evaluation file and the auxiliary files belong together.")
    return made


def score_answers(
    scorer: str, answers: Mapping[int, str], questions: Sequence[Question], auxiliary: Mapping[str, Any], options: scores.ScoreOptions
) -> dict[str, Any]:
    """Scores a task's answers in both modes.

    Args:
        scorer: name of the scorer.
        answers: index of the question -> decoded text.
        questions: the questions.
        auxiliary: the task's auxiliary files.
        options: which quirks the mode "coin" keeps.

    Returns:
        {"accuracy": {mode: percent}, "ceiling": {mode: percent}, "count", "unparsable", "empty", "missing", "correct": {mode: [..]}}.

    Raises:
        UserError: when a question has no answer: an evaluation must be complete before it is scored.
    """
    missing = [question.id for index, question in enumerate(questions) if index not in answers]
    if missing:
        raise UserError(f"{scorer}: {len(missing)} question(s) have no answer, the first is {missing[0]}: finish the evaluation first")
    known = references(scorer, questions, auxiliary)
    predictions = [scores.Prediction(question.id, answers[index]) for index, question in enumerate(questions)]
    results = scores.score_modes(scorer, predictions, known, options)
    headline = results["coin"]
    return {
        "accuracy": {mode: result.accuracy for mode, result in results.items()},
        "ceiling": {mode: scores.ceiling(scorer, known, mode, options).accuracy for mode in results},
        "count": headline.total,
        "unparsable": {mode: result.unparsable for mode, result in results.items()},
        "empty": headline.empty,
        "correct": {mode: list(result.correct) for mode, result in results.items()},
    }


def _plain(question: Question) -> scores.Reference:
    return scores.Reference(question.id, question.answer, bbox=question.bbox, size=question.size)


def _scienceqa(auxiliary: Mapping[str, Any]):
    problems = auxiliary.get("problems", {})

    def make(question: Question) -> scores.Reference:
        if question.id not in problems:
            raise KeyError("its id is not in problems.json")
        problem = problems[question.id]
        return scores.Reference(question.id, str(problem["answer"]), choices=len(problem["choices"]))

    return make


def _textvqa(auxiliary: Mapping[str, Any]):
    entries = auxiliary.get("annotations", {}).get("data", ())
    by_id = {str(entry.get("question_id", "")): entry for entry in entries}
    # CoIN's questions carry the image's id; the text of the question tells apart several questions on one image.
    by_text = {(str(entry.get("image_id", "")), str(entry.get("question", "")).lower()): entry for entry in entries}

    def make(question: Question) -> scores.Reference:
        entry = by_text.get((question.id, question.text.split("\n")[0].strip().lower())) or by_id.get(question.id)
        if entry is None:
            raise KeyError("neither its id nor its image and text are in TextVQA_0.5.1_val.json")
        return scores.Reference(question.id, question.answer, answers=tuple(str(answer) for answer in entry["answers"]))

    return make


def _gqa(auxiliary: Mapping[str, Any]):
    known = auxiliary.get("questions", {})

    def make(question: Question) -> scores.Reference:
        if question.id not in known:
            raise KeyError("its id is not in testdev_balanced_questions.json")
        entry = known[question.id]
        return scores.Reference(question.id, str(entry["answer"]), balanced=bool(entry.get("isBalanced", True)))

    return make
