"""Reference boxes as the files give them: text or lists of four numbers, in evaluation records and in the answers of training records."""

from __future__ import annotations

import math
import re

_BRACKETS = re.compile(r"\[[^\[\]]*\]")


class BoxError(ValueError):
    """A reference box that is not four numbers between 0 and 1."""


def parse_box(value: object) -> tuple[float, float, float, float]:
    """Reference box from `"[x1, y1, x2, y2]"` or a list of four numbers.

    Raises:
        BoxError: "box '[0.1, nan, 0.2, 0.3]' must be four numbers between 0 and 1"; the reader adds file and record.
    """
    parts = value.strip().strip("[]()").split(",") if isinstance(value, str) else value
    message = f"box {value!r} must be four numbers between 0 and 1"
    if not isinstance(parts, (list, tuple)) or len(parts) != 4:
        raise BoxError(message)
    try:
        box = tuple(float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise BoxError(message) from error
    # Two-decimal rounding in the source may put a corner a hair outside the square.
    if not all(math.isfinite(corner) and -1e-3 <= corner <= 1 + 1e-3 for corner in box):
        raise BoxError(message)
    return box


def check_boxes(answers: list[str]) -> None:
    """Checks every box: training learns a box as text, so that nothing else would ever notice a bad one.

    Args:
        answers: each is read at its brackets, or as a whole where it has none and is a list of numbers; other words pass.

    Raises:
        BoxError: "answer of turn 0: box '[0.1, nan, 0.2, 0.3]' must be ..."
    """
    for number, answer in enumerate(answers):
        for box in _BRACKETS.findall(answer) or ([answer] if _are_numbers(answer) else []):
            try:
                parse_box(box)
            except BoxError as error:
                raise BoxError(f"answer of turn {number}: {error}") from error


def _are_numbers(text: str) -> bool:
    """Whether a text is numbers between commas, nan and infinity among them."""
    try:
        return len([float(part) for part in text.strip().strip("()").split(",")]) > 1
    except ValueError:
        return False
