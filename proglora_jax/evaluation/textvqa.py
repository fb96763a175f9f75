"""The answer processor of TextVQA (EvalAI's) and its soft score against ten reference answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

REFERENCES_PER_QUESTION = 10

_PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes a regular expression flag (re.UNICODE = 32) where the substitution count belongs.
_PERIODS_AT_MOST = int(re.UNICODE)
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))

_CONTRACTED = """
    'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _contraction_table() -> dict[str, str]:
    """Every spelling with exactly one apostrophe missing -> the proper form; two forms and one odd entry as in the original."""
    table = {}
    for form in _CONTRACTED.split():
        for position, letter in enumerate(form):
            if letter == "'":
                table[form[:position] + form[position + 1 :]] = form
    del table["lets"], table["shes"]
    table["somebody'd"] = "somebodyd"
    return table


CONTRACTIONS = _contraction_table()


def _replace_punctuation(text: str) -> str:
    """Deletes a mark that stands beside a blank anywhere in `text`, else puts a blank in its place; drops periods.

    The decision looks at the text as it came in, not at the text with earlier marks already replaced.
    """
    out = text
    for mark in _PUNCTUATION:
        beside_a_blank = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_a_blank else " ")
    return _PERIOD.sub("", out, count=_PERIODS_AT_MOST)


def process(text: str) -> str:
    """Brings an answer to the form in which TextVQA compares answers.

    Args:
        text: a predicted or a reference answer.

    Returns:
        The text in lower case, without punctuation and articles, with number words as digits and contractions mended.

    Source: the EvalAI answer processor of TextVQA, quirks included.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in _replace_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of one answer: 0, 0.3, 0.6, 0.9 or 1.0 for 0, 1, 2, 3 or at least 4 equal references.

    It is the average of min(1, equal / 3) over the ten ways to leave one reference out.

    Args:
        prediction: the answer, unprocessed.
        answers: exactly ten reference answers, unprocessed.

    Returns:
        The score in [0, 1].

    Raises:
        ValueError: "TextVQA needs exactly 10 reference answers, got <n>"
    """
    if len(answers) != REFERENCES_PER_QUESTION:
        raise ValueError(f"TextVQA needs exactly {REFERENCES_PER_QUESTION} reference answers, got {len(answers)}")
    processed = process(prediction)
    equal = sum(process(answer) == processed for answer in answers)
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(equal, 4)]
