"""The pictures that tasks and the base model's generic mixture share: shapes, signs, objects, book covers and diagrams."""

from __future__ import annotations

import dataclasses

import numpy as np

from proglora_jax.data.synthetic import stencils
from proglora_jax.data.synthetic.canvas import SIDE_PX, Canvas, Element, solid
from proglora_jax.data.synthetic.words import (
    AUTHORS, COLOURS, DIRECTIONS, GENRES, OBJECTS, SHAPES, TITLE_FIRST, TITLE_SECOND, pick, pick_several,
)

GRID_PX = 4


@dataclasses.dataclass
class Scene:
    """A finished picture and what is in it.

    Attributes:
        kind: `shapes`, `sign`, `object`, `cover`, `arrow`, `bars`, `thermometers` or `text`.
        canvas: pixels, owners, elements and letters.
        facts: what the picture shows as a whole (title, author, genre, direction, ...).
        quality: as in `canvas.degrade`.
    """

    kind: str
    canvas: Canvas
    facts: dict
    quality: str = "sharp"

    @property
    def elements(self) -> list[Element]:
        """What was painted."""
        return self.canvas.elements


def place(rng: np.random.Generator, sizes: list[int], width: int, height: int, gap: int = 2) -> list[tuple[int, int]]:
    """Places squares on a 4-pixel grid so that none overlap.

    Args:
        rng: generator.
        sizes: side of every square, pixels.
        width: picture width, pixels.
        height: picture height, pixels.
        gap: least distance between two squares, pixels.

    Returns:
        The top left corners (x, y).
    """
    while True:
        corners: list[tuple[int, int]] = []
        for i, size in enumerate(sizes):
            for _ in range(20):
                x = GRID_PX * int(rng.integers((width - size) // GRID_PX + 1))
                y = GRID_PX * int(rng.integers((height - size) // GRID_PX + 1))
                others = zip(corners, sizes, strict=False)
                if all(max(x - (a + s), a - (x + size), y - (b + s), b - (y + size)) >= gap for (a, b), s in others):
                    corners.append((x, y))
                    break
            else:
                break
            if i + 1 == len(sizes):
                return corners


def shapes_scene(rng: np.random.Generator, things: list[tuple[str, str]], *, width: int = SIDE_PX, height: int = SIDE_PX) -> Scene:
    """Coloured shapes on a plain ground.

    Args:
        rng: generator.
        things: (colour, shape) of each.
        width: picture width, pixels.
        height: picture height, pixels.

    Returns:
        The scene; element i is thing i.
    """
    choices = {1: (16, 20, 24), 2: (12, 16, 20), 3: (12, 16)}.get(len(things), (12,))
    if min(width, height) < SIDE_PX:
        choices = (12, 16)[: 4 - len(things)]
    sizes = [int(pick(rng, choices)) for _ in things]
    canvas = Canvas(rng, width, height)
    for (colour, name), size, (x, y) in zip(things, sizes, place(rng, sizes, width, height), strict=True):
        canvas.paint(stencils.shape(name, size), x, y, kind="shape", name=name, colour=colour)
    return Scene("shapes", canvas, {})


def random_things(rng: np.random.Generator, count: int, *, distinct: bool) -> list[tuple[str, str]]:
    """(colour, shape) pairs; with `distinct` no colour and no shape occurs twice."""
    if distinct:
        return list(zip(pick_several(rng, list(COLOURS), count), pick_several(rng, SHAPES, count), strict=True))
    return [(pick(rng, list(COLOURS)), pick(rng, SHAPES)) for _ in range(count)]


def _board(canvas: Canvas, word: str, row: int, colour: str) -> None:
    """A coloured board with a word, the letters on the patch grid."""
    column = int(canvas.rng.integers(7 - len(word)))
    x1, x2 = max(0, column * 8 - 3), min(SIDE_PX, (column + len(word)) * 8 + 2)
    canvas.paint(solid(x2 - x1, 13), x1, row * 8 - 2, kind="sign", name=word, colour=colour)
    ink = "black" if colour in ("yellow", "white", "orange") else "white"
    canvas.write(word, row, column, ink, colour)


def sign_scene(rng: np.random.Generator, words: list[str]) -> Scene:
    """One or two signs (top, bottom), and a shape as a distraction where there is one sign.

    Args:
        rng: generator.
        words: one or two words of at most six letters.

    Returns:
        The scene; `facts` holds `words` and `colours` from top to bottom.
    """
    canvas = Canvas(rng)
    colours = pick_several(rng, list(COLOURS), len(words) + 1)
    if len(words) == 2:
        _board(canvas, words[0], int(rng.integers(1, 3)), colours[0])
        _board(canvas, words[1], 4, colours[1])
    else:
        row = int(rng.integers(1, 5))
        y = pick(rng, [v for v in range(0, SIDE_PX - 11, 4) if v + 12 <= row * 8 - 3 or v >= row * 8 + 12])
        name, x = pick(rng, SHAPES), 4 * int(rng.integers(10))
        canvas.paint(stencils.shape(name, 12), x, y, kind="shape", name=name, colour=colours[1])
        _board(canvas, words[0], row, colours[0])
    return Scene("sign", canvas, {"words": words, "colours": colours[: len(words)]})


def object_scene(rng: np.random.Generator, name: str) -> Scene:
    """One drawn object of random colour, size and place."""
    canvas = Canvas(rng)
    size = int(pick(rng, (24, 28, 32, 36, 40)))
    x, y = (int(v) for v in rng.integers(0, SIDE_PX - size + 1, 2))
    canvas.paint(stencils.drawn_object(name, size), x, y, kind="object", name=name, colour=pick(rng, list(COLOURS)))
    return Scene("object", canvas, {"name": name})


def cover_scene(rng: np.random.Generator) -> Scene:
    """A book cover: two title words on top, an emblem, the author at the bottom; colour and emblem tell the genre."""
    genre = pick(rng, list(GENRES))
    colour, emblem = GENRES[genre]
    title, author = (pick(rng, TITLE_FIRST), pick(rng, TITLE_SECOND)), pick(rng, AUTHORS)
    canvas = Canvas(rng, colour=COLOURS[colour])
    ink = "black" if colour in ("yellow", "orange") else "white"
    size, column = int(pick(rng, (12, 16))), int(rng.integers(5))
    canvas.paint(stencils.shape(emblem, size), 8 * column, 20, kind="shape", name=emblem, colour="black" if ink == "white" else "white")
    for row, word in ((0, title[0]), (1, title[1]), (5, author)):
        canvas.write(word, row, int(rng.integers(7 - len(word))), ink)
    return Scene("cover", canvas, {"title": " ".join(title), "author": author, "genre": genre, "colour": colour, "emblem": emblem})


def arrow_scene(rng: np.random.Generator, direction: str | None = None) -> Scene:
    """One arrow; `facts["direction"]` says where it points."""
    direction = direction or pick(rng, DIRECTIONS)
    canvas, size = Canvas(rng), int(pick(rng, (16, 20, 24)))
    (x, y), = place(rng, [size], SIDE_PX, SIDE_PX)
    colour = pick(rng, list(COLOURS))
    canvas.paint(stencils.arrow(direction, size), x, y, kind="arrow", name=direction, colour=colour)
    return Scene("arrow", canvas, {"direction": direction})


def bars_scene(rng: np.random.Generator) -> Scene:
    """A bar chart of three or four colours with clearly different heights; `facts` names the tallest and the shortest."""
    count = int(rng.integers(3, 5))
    canvas, colours = Canvas(rng), pick_several(rng, list(COLOURS), count)
    heights = [8 * int(v) for v in pick_several(rng, range(1, 6), count)]
    left = 4 * int(rng.integers(3 if count == 3 else 1))
    for i, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        canvas.paint(solid(8, height), left + 12 * i + 2, SIDE_PX - 2 - height, kind="bar", name="bar", colour=colour, height=height)
    order = np.argsort(heights)
    return Scene("bars", canvas, {"colours": colours, "tallest": colours[order[-1]], "shortest": colours[order[0]]})


def thermometers_scene(rng: np.random.Generator) -> Scene:
    """Two thermometers, left and right; `facts["warmer"]` says which stands higher."""
    canvas = Canvas(rng)
    levels = pick_several(rng, (8, 16, 24, 32), 2)
    for side, level in zip(("left", "right"), levels, strict=True):
        x = 8 if side == "left" else 32
        canvas.paint(solid(8, 40), x, 4, kind="thermometer", name=side, colour="white", height=level)
        canvas.paint(solid(4, level), x + 2, 42 - level, kind="thermometer", name=side, colour="red", height=level)
    return Scene("thermometers", canvas, {"warmer": "left" if levels[0] > levels[1] else "right"})


def random_object(rng: np.random.Generator) -> Scene:
    """`object_scene` of a random object."""
    return object_scene(rng, pick(rng, OBJECTS))
