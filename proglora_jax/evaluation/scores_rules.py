"""Which script's rules the scoring mode "coin" follows, and how each reads the option that a ScienceQA answer names."""

from __future__ import annotations

import dataclasses
import re

SCIENCEQA_RULES = ("coin", "llava", "proglora")
GROUNDING_RULES = ("coin", "minigpt")

LETTERS = "ABCDE"
_LONE_CHARACTER = re.compile(r"\b(\w)\b")
# Any character may follow, but one must: the scripts' full stop stands for each.
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What the "coin" mode does (fields of the same names under config.evaluate); by default as CoIN's scripts for LLaVA do.

    Attributes:
        imagenet_empty_ok: an empty ImageNet prediction is correct.
        grounding_truncate: the box parser drops the first and the last character.
        scienceqa_rule: where a ScienceQA prediction is neither a letter nor begins with "C. ", its option is: "coin", the first character
            that stands alone; "llava", the X of "The answer is X." if that is said exactly once; "proglora", as "llava", and the
            denominator is the number of predictions.
        grounding_rule: "coin", or "minigpt" (CoIN's script for MiniGPT-v2): the first four decimals of the prediction against the box in
            the frame of the image as it is (origin_answer_bbox).
    """

    imagenet_empty_ok: bool = True
    grounding_truncate: bool = True
    scienceqa_rule: str = "coin"
    grounding_rule: str = "coin"


def option_letter(text: str, rule: str = "coin") -> str | None:
    """The option that a ScienceQA answer names.

    Args:
        text: "C", "C. some text", or any text.
        rule: of any other text "coin" takes the first character standing alone, "llava" and "proglora" what "The answer is X." names if
            it is there exactly once.

    Returns:
        The character in upper case, an option letter or not ("a cat" gives "A", "It's B" gives "S"); None if there is none.
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    if rule != "coin":
        named = _ANSWER_IS.findall(text)
        return named[0] if len(named) == 1 else None
    found = _LONE_CHARACTER.search(text)
    return found.group(1).upper() if found else None
