"""The scorers of CoIN's eight tasks, each compatible with CoIN's scripts ("coin") and in a sane form ("clean").

Predictions are joined to references by question id; a reference without a prediction counts as wrong, so the denominator is
the number of references (of the balanced ones for GQA; of the answered ones under ProgLoRA's rule for ScienceQA).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.evaluation import boxes, textvqa
from proglora_jax.evaluation.scores_rules import LETTERS, ScoreOptions, option_letter

MODES = ("coin", "clean")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One generated answer: the question's id and the decoded text."""

    question_id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the answer to one question is compared with.

    Attributes:
        question_id: id, compared as a string.
        answer: the reference answer; ScienceQA: the option letter or the option's index; Grounding: the text of the box.
        answers: the ten answers of TextVQA.
        bbox: Grounding: the box as four numbers; read from `answer` where absent.
        origin_bbox: Grounding: the box in the frame of the image as it is, not padded to a square.
        size: (width, height) of the image in pixels, for boxes in pixels.
        choices: ScienceQA: number of options.
        balanced: GQA: whether the question is in the balanced set, the only one that is scored.
    """

    question_id: str
    answer: str = ""
    answers: tuple[str, ...] | None = None
    bbox: tuple[float, ...] | None = None
    origin_bbox: tuple[float, ...] | None = None
    size: tuple[float, float] | None = None
    choices: int | None = None
    balanced: bool = True


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """Scores of one task in one mode.

    Attributes:
        task: name of the scorer.
        mode: "coin" or "clean".
        question_ids: the scored questions, in the order of the references.
        correct: score of each in [0, 1], 0 where the prediction is missing.
        accuracy: mean of `correct` in percent, not rounded.
        unparsable: predictions without a letter (ScienceQA) or a box (Grounding).
        empty: predictions that are empty or blank.
        missing: references without a prediction.
        unknown: predictions without a reference, ignored.
    """

    task: str
    mode: str
    question_ids: tuple[str, ...]
    correct: tuple[float, ...]
    accuracy: float
    unparsable: int = 0
    empty: int = 0
    missing: int = 0
    unknown: int = 0

    @property
    def total(self) -> int:
        """Number of scored questions: the denominator."""
        return len(self.correct)


# A scorer takes a prediction, its reference, the mode and the options; None means that the prediction could not be parsed.
Scorer = Callable[[str, Reference, str, ScoreOptions], "float | None"]


def tidy(text: str) -> str:
    """Clean mode's normal form: white space collapsed, one trailing period dropped."""
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith(".") else text


def score_scienceqa(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float | None:
    """1 if the option named is the reference's and within the question's choices."""
    letter = option_letter(tidy(text)) if mode == "clean" else option_letter(text, options.scienceqa_rule)
    if letter is None:
        return None
    gold = reference.answer.strip()
    gold = LETTERS[int(gold)] if gold.isdecimal() else gold
    within = letter in LETTERS[: reference.choices or len(LETTERS)]
    return float(within and letter == gold)


def score_textvqa(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float:
    """Soft score against the ten answers."""
    return textvqa.soft_score(tidy(text) if mode == "clean" else text, reference.answers or ())


def score_imagenet(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float:
    """coin: one string contains the other, case-sensitive; clean: equal but for case, blanks and a trailing period."""
    if mode == "clean":
        return float(tidy(text).lower() == tidy(reference.answer).lower() != "")
    if not options.imagenet_empty_ok and not text.strip():
        return 0.0
    return float(reference.answer in text or text in reference.answer)


def score_gqa(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float:
    """Equal after dropping trailing periods and lower-casing the prediction."""
    if mode == "clean":
        return float(tidy(text).lower() == tidy(reference.answer).lower())
    return float(text.rstrip(".").lower() == reference.answer)


def score_upper_case(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float:
    """VizWiz and VQAv2: equal but for case."""
    if mode == "clean":
        return float(tidy(text).upper() == tidy(reference.answer).upper())
    return float(text.upper() == reference.answer.upper())


def score_ocrvqa(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float:
    """Equal but for case; a prediction that contains "Unanswerable" is wrong whatever the reference."""
    if "Unanswerable" in text:
        return 0.0
    if mode == "clean":
        return float(tidy(text).lower() == tidy(reference.answer).lower())
    return float(text.lower() == reference.answer.lower())


def score_grounding(text: str, reference: Reference, mode: str, options: ScoreOptions) -> float | None:
    """1 if the intersection over union with the reference is above (not at) one half."""
    target = reference.bbox if reference.bbox is not None else boxes.parse_coin(reference.answer, truncate=False)
    if mode == "clean":
        box, target = boxes.parse_clean(text, reference.size), boxes.to_unit(target, reference.size)
    elif options.grounding_rule == "minigpt":
        box, target = boxes.parse_minigpt(text), reference.origin_bbox
    else:
        box = boxes.parse_coin(text, options.grounding_truncate)
    return None if box is None else float(boxes.iou(box, target) > 0.5)


# Scorers that compare with the answer of the question itself, as it is.
_BY_ANSWER = ("imagenet", "vizwiz", "vqav2", "ocrvqa")

# Name of a scorer (the task's name in lower case) -> function; the table of tasks names them.
SCORERS: Mapping[str, Scorer] = {
    "scienceqa": score_scienceqa,
    "textvqa": score_textvqa,
    "imagenet": score_imagenet,
    "gqa": score_gqa,
    "vizwiz": score_upper_case,
    "grounding": score_grounding,
    "vqav2": score_upper_case,
    "ocrvqa": score_ocrvqa,
}


def score(
    task: str, predictions: Sequence[Prediction], references: Sequence[Reference], mode: str = "coin", options: ScoreOptions | None = None
) -> ScoreResult:
    """Scores the predictions of one task.

    Args:
        task: name of the scorer, a key of SCORERS.
        predictions: in any order; ids that occur several times pair with references of that id in order.
        references: the questions to score; their number is the denominator.
        mode: "coin" or "clean".
        options: what the coin mode does; default: as CoIN's scripts.

    Returns:
        Per-question scores and the accuracy.

    Raises:
        UserError: "scorer '<task>': unknown; use one of scienceqa, ..."
        UserError: "mode '<mode>': unknown; use one of coin, clean"
        UserError: "references of <task>: <n> problem(s): ..." for references that lack what the scorer needs
        UserError: "predictions of <task>: ..." for more predictions than references of an id, or no common id at all
    """
    scorer = _checked_scorer(task, mode)
    options = options or ScoreOptions()
    references = [reference for reference in references if task != "gqa" or reference.balanced]
    check_references(task, references, options)
    texts, unknown = _joined(task, predictions, references)
    missing = sum(text is None for text in texts)
    if mode == "coin" and task == "scienceqa" and options.scienceqa_rule == "proglora" and missing < len(texts):
        references = [reference for text, reference in zip(texts, references) if text is not None]
        texts = [text for text in texts if text is not None]
    verdicts = [
        0.0 if text is None else scorer(text, reference, mode, options) for text, reference in zip(texts, references)
    ]
    correct = tuple(verdict or 0.0 for verdict in verdicts)
    return ScoreResult(
        task=task,
        mode=mode,
        question_ids=tuple(str(reference.question_id) for reference in references),
        correct=correct,
        accuracy=100.0 * sum(correct) / len(correct),
        unparsable=sum(verdict is None for verdict in verdicts),
        empty=sum(text is not None and not text.strip() for text in texts),
        missing=missing,
        unknown=unknown,
    )


def score_modes(
    task: str, predictions: Sequence[Prediction], references: Sequence[Reference], options: ScoreOptions | None = None
) -> dict[str, ScoreResult]:
    """`score` in both modes: mode -> result; raises as `score` does."""
    return {mode: score(task, predictions, references, mode, options) for mode in MODES}


def ceiling(
    task: str, references: Sequence[Reference], mode: str = "coin", options: ScoreOptions | None = None, unasked: Sequence[Reference] = ()
) -> ScoreResult:
    """The score of the reference answers themselves: what a perfect model would get.

    Below 100 where a scorer spoils right answers (CoIN's box parser, OCR-VQA's "Unanswerable") or annotators disagree (TextVQA).

    Args:
        task: name of the scorer.
        references: the questions; for TextVQA the most frequent processed answer is taken as the prediction.
        mode: "coin" or "clean".
        options: what the coin mode does.
        unasked: further questions that nobody answers.

    Returns:
        As `score`; raises as it does.
    """
    origin = mode == "coin" and options is not None and options.grounding_rule == "minigpt"
    answers = [Prediction(str(r.question_id), _perfect_answer(task, r, origin)) for r in references]
    return score(task, answers, [*references, *unasked], mode, options)


def _perfect_answer(task: str, reference: Reference, origin: bool) -> str:
    if task == "grounding" and origin and reference.origin_bbox is not None:
        return boxes.as_text(reference.origin_bbox)
    if task == "textvqa" and reference.answers:
        common = collections.Counter(map(textvqa.process, reference.answers)).most_common(1)[0][0]
        return next(answer for answer in reference.answers if textvqa.process(answer) == common)
    if task == "grounding" and not reference.answer and reference.bbox is not None:
        return boxes.as_text(reference.bbox)
    if task == "scienceqa" and reference.answer.strip().isdecimal() and int(reference.answer) < len(LETTERS):
        return LETTERS[int(reference.answer)]
    return reference.answer


def _checked_scorer(task: str, mode: str) -> Scorer:
    if task not in SCORERS:
        raise UserError(f"scorer {task!r}: unknown; use one of {', '.join(SCORERS)}")
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: unknown; use one of {', '.join(MODES)}")
    return SCORERS[task]


def check_references(task: str, references: Sequence[Reference], options: ScoreOptions | None = None) -> None:
    """Raises for references that lack what the task's scorer compares with.

    Args: as for `score`.

    Raises:
        UserError: "references of <task>: there are none; ...", "references of <task>: <n> problem(s): question_id 7: ..."
    """
    if not references:
        raise UserError(f"references of {task}: there are none; check the evaluation file and config.evaluate.subset_size")
    problems = [f"question_id {r.question_id}: {why}" for r in references if (why := reference_problem(task, r, options))]
    raise_collected(problems, f"references of {task}", "Check the evaluation file and the auxiliary files of the task.")


def reference_problem(task: str, reference: Reference, options: ScoreOptions | None = None) -> str | None:
    """Why a task's scorer cannot use a reference; None if it can."""
    if task in _BY_ANSWER and not reference.answer.strip():
        return "has no 'answer'"  # as text it would be found in any prediction, or only equal an empty one
    if task == "textvqa" and len(reference.answers or ()) != textvqa.REFERENCES_PER_QUESTION:
        return f"{len(reference.answers or ())} answers, 10 are needed"
    if task == "grounding":
        box = reference.bbox if reference.bbox is not None else boxes.parse_coin(reference.answer, truncate=False)
        if box is None or len(box) != 4:
            return f"answer {reference.answer!r} and bbox {reference.bbox!r} hold no box of four numbers"
        if options is not None and options.grounding_rule == "minigpt" and reference.origin_bbox is None:
            return "has no 'origin_answer_bbox' of four numbers, which config.evaluate.grounding_rule=minigpt compares with"
    if task == "scienceqa":
        gold = reference.answer.strip()
        if gold not in tuple(LETTERS) and not (gold.isdecimal() and int(gold) < len(LETTERS)):
            return f"answer {reference.answer!r} is neither an option letter A-E nor an option index 0-4"
    return None


def _joined(task: str, predictions: Sequence[Prediction], references: Sequence[Reference]) -> tuple[list[str | None], int]:
    """The predicted text of every reference (None where missing), and the number of predictions that fit no reference."""
    waiting: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
    for prediction in predictions:
        waiting[str(prediction.question_id)].append(prediction.text)
    wanted = collections.Counter(str(reference.question_id) for reference in references)
    if predictions and not any(name in wanted for name in waiting):
        raise UserError(
            f"predictions of {task}: none of the {len(predictions)} question ids (first: {predictions[0].question_id!r}) is among the "
            f"references (first: {references[0].question_id!r}); check that the answers belong to this evaluation file"
        )
    raise_collected(
        [f"question_id {name}: {len(waiting[name])} predictions" for name in wanted if len(waiting.get(name, ())) > wanted[name]],
        f"predictions of {task}",
        "Keep one line per question in the answer file.",
    )
    texts = [waiting[str(r.question_id)].popleft() if waiting.get(str(r.question_id)) else None for r in references]
    return texts, sum(len(texts_left) for name, texts_left in waiting.items() if name not in wanted)
