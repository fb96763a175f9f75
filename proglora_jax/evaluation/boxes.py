"""Bounding boxes as text: CoIN's parser with its defects, a sane parser, and the intersection over union."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]

# A sign counts only where it does not follow a digit, so that "0.1-0.2" reads as two positive numbers. What is not finite is found, too, so
# that it is not passed over.
_NUMBER = re.compile(
    r"(?:(?<![\d.])[-+])?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|(?<![A-Za-z])(?:nan|NaN|NAN|[iI]nf(?:inity)?|INF)(?![A-Za-z])")
# A decimal as CoIN's script for MiniGPT-v2 knows it: with a point, without a sign, and not zero ("0.0", "0" and "1" are none).
_DECIMAL = re.compile(r"[1-9]\d*\.\d*|0\.0*[1-9]\d*")
# Coordinates above this are pixels: relative ones end at 1, and a model overshoots by little.
_PIXELS_ABOVE = 1.5


def parse_coin(text: str, truncate: bool = True) -> Box | None:
    """Reads a box as CoIN's evaluator does.

    Brackets are deleted, then the first and the last character are dropped (the original expects brackets there), so that
    the last digit of y2 is lost, and a y2 with one decimal becomes 0.

    Args:
        text: the predicted text.
        truncate: False leaves the first and last character in place.

    Returns:
        (x1, y1, x2, y2) as they stand, in no checked order or range; None if the text is not four numbers.
    """
    text = text.replace("[", "").replace("]", "")
    if truncate:
        text = text[1:-1]
    parts = text.split(",")
    if len(parts) != 4:
        return None
    try:
        x1, y1, x2, y2 = (float(part) for part in parts)
    except ValueError:
        return None
    return x1, y1, x2, y2


def parse_minigpt(text: str) -> Box | None:
    """Reads the first four decimals of a text as CoIN's evaluator for MiniGPT-v2 does.

    Zeros and whole numbers are passed over, so that a box with a corner at the image's edge is lost, or read from other numbers.

    Args:
        text: the predicted text.

    Returns:
        (x1, y1, x2, y2) as they stand, in no checked order or range; None if there are fewer than four.
    """
    numbers = tuple(float(match) for match in _DECIMAL.findall(text)[:4])
    return numbers if len(numbers) == 4 else None


def read_reference(value: object) -> Box | None:
    """A reference box of any frame from "[x1, y1, x2, y2]" or a list; None if it is not four finite numbers."""
    text = value if isinstance(value, str) else ",".join(map(str, value)) if isinstance(value, (list, tuple)) else ""
    box = parse_coin(text, truncate=False)
    return box if box is not None and all(map(math.isfinite, box)) else None


def parse_clean(text: str, size: Sequence[float] | None = None) -> Box | None:
    """Reads the first four numbers of a text as a box in the unit square.

    Args:
        text: the predicted text.
        size: (width, height) of the image in pixels; needed only for boxes given in pixels.

    Returns:
        (x1, y1, x2, y2) with ordered corners, clipped to [0, 1]; None if there are fewer than four, or one of them is nan or infinite.
    """
    numbers = [float(match) for match in _NUMBER.findall(text)[:4]]
    if len(numbers) < 4 or not all(math.isfinite(number) for number in numbers):
        return None
    return to_unit(numbers, size)


def to_unit(box: Sequence[float], size: Sequence[float] | None = None) -> Box:
    """Orders the corners of a box and brings it into the unit square.

    Args:
        box: four numbers, relative to the square that padding makes, or pixels of it (all above 1.5).
        size: (width, height) of the image in pixels, the longer side being the side of the square.

    Returns:
        (x1, y1, x2, y2) in [0, 1] with x1 <= x2 and y1 <= y2.
    """
    if size is not None and all(number > _PIXELS_ABOVE for number in box):
        box = [number / max(size) for number in box]
    left, top, right, bottom = (min(max(number, 0.0), 1.0) for number in box)
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes given by corners; 0 where the union is not positive.

    Corners are not put in order: a box with swapped corners overlaps nothing, as in CoIN.

    Args:
        one: (x1, y1, x2, y2).
        other: the same, in the same unit.

    Returns:
        The ratio; 0 too where a coordinate is nan or infinite.
    """
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    overlap = width * height
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - overlap
    return overlap / union if union > 0 else 0.0


def as_text(box: Sequence[float]) -> str:
    """A box in the form of the references, "[x1, y1, x2, y2]", without reformatting its numbers."""
    return "[" + ", ".join(str(number) for number in box) + "]"
