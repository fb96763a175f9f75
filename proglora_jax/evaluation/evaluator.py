"""From answers to scores of a task: references from questions and auxiliary files, predictions from raw answers, both modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.schema import Question
from proglora_jax.evaluation import boxes, scores
from proglora_jax.evaluation.scores_rules import ScoreOptions

# What reading an auxiliary file of another form than CoIN's raises.
_WRONG_FORM = (KeyError, TypeError, AttributeError)


class _Unknown(ValueError):
    """A question that an auxiliary file does not know."""


def references(scorer: str, questions: Sequence[Question], auxiliary: Mapping[str, Any]) -> list[scores.Reference]:
    """What each question's answer is compared with.

    Args:
        scorer: name of the scorer.
        questions: the questions that were asked.
        auxiliary: the task's auxiliary files, see `data.tasks.load_auxiliary`.

    Raises:
        UserError: "<scorer> references: <n> problem(s): question <id> is not in ..." for questions that the files do not know.
    """
    made, problems = _made(scorer, questions, auxiliary)
    listed = [f"question {questions[index].id}: {reason}" for index, reason in problems]
    raise_collected(listed, f"{scorer} references", "Check that the evaluation file and the auxiliary files belong together.")
    return [reference for reference in made if reference is not None]


def unasked_references(scorer: str, questions: Sequence[Question], auxiliary: Mapping[str, Any]) -> list[scores.Reference]:
    """References of the questions in ScienceQA's test split that were not asked; CoIN's script takes them for wrong. [] for other tasks.

    Args: as for `references`.

    Raises:
        UserError: as `references`; "scienceqa references: pid_splits.json lists no pids of the split 'test'; download it again"
    """
    if scorer != "scienceqa":
        return []
    listed, asked = auxiliary.get("pid_splits", {}).get("test"), {question.id for question in questions}
    if not isinstance(listed, list):
        raise UserError("scienceqa references: pid_splits.json lists no pids of the split 'test'; download it again")
    others = [pid for pid in dict.fromkeys(map(str, listed)) if pid not in asked]
    return references(scorer, [Question(pid, "ScienceQA", None, "", "") for pid in others], auxiliary)


def reference_problems(scorer: str, questions: Sequence[Question], auxiliary: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Questions that could not be scored, as (index, reason): unknown to the auxiliary files, or without what the scorer needs.

    Args: as for `references`.

    Raises:
        UserError: "<scorer> references: the auxiliary files have another form ..."
    """
    made, problems = _made(scorer, questions, auxiliary)
    checked = ((i, scores.reference_problem(scorer, reference)) for i, reference in enumerate(made) if reference is not None)
    return sorted(problems + [(i, reason) for i, reason in checked if reason])


def _made(scorer, questions, auxiliary) -> tuple[list[scores.Reference | None], list[tuple[int, str]]]:
    """The reference of every question, None for those that are listed as (index, reason)."""
    makers = {"scienceqa": _scienceqa, "textvqa": _textvqa, "gqa": _gqa}
    try:
        make = makers.get(scorer, lambda auxiliary: _plain)(auxiliary)
    except _WRONG_FORM as error:
        raise UserError(f"{scorer} references: the auxiliary files have another form than CoIN's; download them again") from error
    made, problems = [], []
    for index, question in enumerate(questions):
        try:
            made.append(make(question))
        except (_Unknown, *_WRONG_FORM) as error:
            made.append(None)
            reason = str(error) if isinstance(error, _Unknown) else "its entry in the auxiliary file lacks fields or has others"
            problems.append((index, reason))
    return made, problems


def score_answers(
    scorer: str, answers: Mapping[int, str], questions: Sequence[Question], auxiliary: Mapping[str, Any], options: ScoreOptions,
    unasked: Sequence[scores.Reference] = (),
) -> dict[str, Any]:
    """Scores a task's answers in both modes.

    Args:
        scorer: name of the scorer.
        answers: index of the question -> decoded text.
        questions: the questions.
        auxiliary: the task's auxiliary files.
        options: what the mode "coin" does.
        unasked: questions that the mode "coin" takes for wrong though nobody asked them.

    Returns:
        {"accuracy": {mode: percent}, "ceiling": {mode: percent}, "count", "unparsable", "empty", "missing", "correct": {mode: [..]}};
        count, empty and missing are those of "coin", "correct" has the questions alone.

    Raises:
        UserError: when a question has no answer: an evaluation must be complete before it is scored.
    """
    missing = [question.id for index, question in enumerate(questions) if index not in answers]
    if missing:
        raise UserError(f"{scorer}: {len(missing)} question(s) have no answer, the first is {missing[0]}: finish the evaluation first")
    known = references(scorer, questions, auxiliary)
    predictions = [scores.Prediction(question.id, answers[index]) for index, question in enumerate(questions)]
    compared = {mode: [*known, *unasked] if mode == "coin" else known for mode in scores.MODES}
    results = {mode: scores.score(scorer, predictions, compared[mode], mode, options) for mode in compared}
    perfect = {mode: scores.ceiling(scorer, known, mode, options, unasked if mode == "coin" else ()) for mode in compared}
    headline = results["coin"]
    return {
        "accuracy": {mode: result.accuracy for mode, result in results.items()},
        "ceiling": {mode: result.accuracy for mode, result in perfect.items()},
        "count": headline.total,
        "unparsable": {mode: result.unparsable for mode, result in results.items()},
        "empty": headline.empty,
        "missing": headline.missing,
        "correct": {mode: list(result.correct[: len(questions)]) for mode, result in results.items()},
    }


def _plain(question: Question) -> scores.Reference:
    origin = boxes.read_reference(question.extra.get("origin_answer_bbox"))
    return scores.Reference(question.id, question.answer, bbox=question.bbox, origin_bbox=origin, size=question.size)


def _scienceqa(auxiliary: Mapping[str, Any]):
    problems = auxiliary.get("problems", {})

    def make(question: Question) -> scores.Reference:
        if question.id not in problems:
            raise _Unknown("its id is not in problems.json")
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
            raise _Unknown("neither its id nor its image and text are in TextVQA_0.5.1_val.json")
        return scores.Reference(question.id, question.answer, answers=tuple(str(answer) for answer in entry["answers"]))

    return make


def _gqa(auxiliary: Mapping[str, Any]):
    known = auxiliary.get("questions", {})

    def make(question: Question) -> scores.Reference:
        if question.id not in known:
            raise _Unknown("its id is not in testdev_balanced_questions.json")
        entry = known[question.id]
        return scores.Reference(question.id, str(entry["answer"]), balanced=bool(entry.get("isBalanced", True)))

    return make
