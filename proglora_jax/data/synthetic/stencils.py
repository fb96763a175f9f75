"""Stencils: small index maps of letters, shapes and objects (0 nothing, 1 main colour, 2 dark, 3 light), drawn once and painted often."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

# Five column bytes a letter, lowest bit on top: the classic 5 x 7 dot-matrix alphabet, which fits one 8 x 8 patch.
_GLYPHS = (
    "7E1111117E 7F49494936 3E41414122 7F4141221C 7F49494941 7F09090901 3E4149497A 7F0808087F 00417F4100 2040413F01 7F08142241 "
    "7F40404040 7F020C027F 7F0408107F 3E4141413E 7F09090906 3E4151215E 7F09192946 4649494931 01017F0101 3F4040403F 1F2040201F "
    "3F4038403F 6314081463 0708700807 6151494543"
).split()
CELL_PX = 8


@functools.lru_cache(maxsize=None)
def letter(char: str) -> np.ndarray:
    """One upper-case letter.

    Args:
        char: a letter A to Z (either case).

    Returns:
        u8[8, 8] stencil; the letter keeps a margin of one column on the left and one row on top.
    """
    columns = bytes.fromhex(_GLYPHS[ord(char.upper()) - ord("A")])
    bits = np.array([[(column >> row) & 1 for column in columns] for row in range(7)], np.uint8)
    return np.pad(bits, ((1, 0), (1, 2)))


def text(word: str) -> np.ndarray:
    """A word, one 8 x 8 cell a letter: u8[8, 8 * len(word)]."""
    return np.concatenate([letter(char) for char in word], axis=1)


def _inside(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 (y grows downwards) lie inside the named shape."""
    r = np.hypot(x, y)
    if name == "circle":
        return r <= 1
    if name == "square":
        return np.ones_like(x, bool)
    if name == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if name == "cross":
        return np.minimum(np.abs(x), np.abs(y)) <= 0.34
    if name == "diamond":
        return np.abs(x) + np.abs(y) <= 1
    if name == "star":
        angle = np.arctan2(x, -y)
        turn = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        # The edge from the tip (radius 1, angle 0) to the notch (radius 0.42, angle 36 degrees).
        a, b = 0.42 * np.sin(np.pi / 5), 1 - 0.42 * np.cos(np.pi / 5)
        return r * (a * np.cos(turn) + b * np.sin(turn)) <= a
    if name == "heart":
        u, v = x * 1.15, 0.15 - y * 1.12
        return (u**2 + v**2 - 0.85) ** 3 - 1.6 * u**2 * v**3 <= 0
    raise ValueError(f"shape {name!r} has no stencil")


@functools.lru_cache(maxsize=None)
def shape(name: str, size: int) -> np.ndarray:
    """A filled shape that touches all four sides of its square.

    Args:
        name: one of `words.SHAPES`.
        size: side in pixels.

    Returns:
        u8[size, size] stencil with tight extents.
    """
    fine = (np.arange(8 * size) + 0.5) / (8 * size) * 2.4 - 1.2
    y, x = np.meshgrid(fine, fine, indexing="ij")
    mask = _inside(name, np.clip(x, -1.2, 1.2), np.clip(y, -1.2, 1.2)) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8) * 255)
    small = np.asarray(tight.resize((size, size), Image.Resampling.BOX)) > 96
    small[[0, -1], :] |= _edge(np.asarray(tight), size, 0)
    small[:, [0, -1]] |= _edge(np.asarray(tight), size, 1).T
    return small.astype(np.uint8)


def _edge(fine: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The outermost two rows (axis 0) or columns of a stencil: at least the pixel under the tip, so that boxes stay tight."""
    fine = fine if axis == 0 else fine.T
    out = np.zeros((2, size), bool)
    for side, line in enumerate((fine[0], fine[-1])):
        middle = np.flatnonzero(line).mean() / fine.shape[1] * size
        out[side, min(int(middle), size - 1)] = True
    return out


# Objects: a list of (primitive, index, unit coordinates); p polygon, e ellipse, r rectangle, l line of a width in units.
_OBJECTS: dict[str, list[tuple]] = {
    "house": [("r", 1, .1, .45, .9, 1), ("p", 2, 0, .48, .5, 0, 1, .48), ("r", 3, .42, .65, .62, 1), ("r", 2, .18, .55, .34, .72)],
    "tree": [("r", 2, .42, .6, .58, 1), ("e", 1, .1, 0, .9, .7)],
    "car": [("r", 1, 0, .45, 1, .75), ("p", 1, .18, .48, .32, .2, .7, .2, .84, .48), ("r", 3, .36, .27, .64, .44),
            ("e", 2, .1, .62, .36, .9), ("e", 2, .64, .62, .9, .9)],
    "boat": [("p", 1, 0, .65, 1, .65, .8, 1, .2, 1), ("l", 2, .06, .5, 0, .5, .65), ("p", 3, .56, .05, .56, .58, .95, .58)],
    "flower": [("r", 2, .46, .5, .54, 1), ("e", 1, .32, 0, .68, .32), ("e", 1, .32, .36, .68, .68), ("e", 1, .08, .18, .46, .5),
               ("e", 1, .54, .18, .92, .5), ("e", 3, .38, .22, .62, .46)],
    "fish": [("e", 1, 0, .2, .75, .8), ("p", 1, .65, .5, 1, .2, 1, .8), ("e", 2, .14, .38, .26, .5)],
    "cup": [("p", 1, .05, .2, .72, .2, .62, .95, .15, .95), ("e", 1, .55, .32, .98, .72), ("e", 0, .66, .42, .87, .62),
            ("r", 2, .05, .2, .72, .3)],
    "key": [("e", 1, 0, .28, .44, .72), ("e", 0, .12, .4, .32, .6), ("r", 1, .42, .44, 1, .56), ("r", 1, .74, .5, .82, .76),
            ("r", 1, .9, .5, 1, .76)],
    "clock": [("e", 1, 0, 0, 1, 1), ("e", 3, .12, .12, .88, .88), ("l", 2, .08, .5, .5, .5, .2), ("l", 2, .08, .5, .5, .75, .6)],
    "umbrella": [("e", 1, 0, .05, 1, 1.05), ("r", 0, 0, .55, 1, 1), ("r", 2, .46, .5, .54, .95), ("r", 2, .3, .9, .54, 1)],
    "mushroom": [("e", 1, 0, .05, 1, .95), ("r", 0, 0, .5, 1, 1), ("r", 3, .36, .5, .64, 1), ("e", 3, .2, .22, .36, .38),
                 ("e", 3, .56, .16, .76, .36)],
    "rocket": [("p", 2, .2, .95, .5, .6, .8, .95), ("r", 1, .35, .25, .65, .85), ("p", 1, .35, .27, .5, 0, .65, .27),
               ("e", 3, .41, .32, .59, .5)],
    "lamp": [("p", 1, .25, 0, .75, 0, 1, .5, 0, .5), ("r", 2, .46, .5, .54, .9), ("r", 2, .25, .88, .75, 1)],
    "ladder": [("r", 1, .2, 0, .3, 1), ("r", 1, .7, 0, .8, 1), ("r", 1, .2, .12, .8, .2), ("r", 1, .2, .38, .8, .46),
               ("r", 1, .2, .64, .8, .72), ("r", 1, .2, .88, .8, .96)],
    "flag": [("r", 2, .1, 0, .2, 1), ("r", 1, .2, .05, .95, .5), ("r", 3, .2, .2, .95, .34)],
    "chair": [("r", 1, .15, 0, .28, 1), ("r", 1, .15, .5, .85, .63), ("r", 1, .72, .5, .85, 1), ("r", 2, .2, .1, .26, .45)],
    "hat": [("r", 1, .25, .15, .75, .7), ("r", 2, .25, .55, .75, .68), ("r", 1, 0, .7, 1, .85)],
    "bird": [("e", 1, .2, .35, .8, .8), ("e", 1, .6, .15, .95, .5), ("p", 2, .9, .28, 1, .36, .9, .42), ("p", 1, .3, .55, 0, .3, 0, .7),
             ("l", 2, .05, .45, .78, .45, 1), ("l", 2, .05, .58, .78, .58, 1)],
    "bottle": [("r", 1, .28, .35, .72, 1), ("p", 1, .28, .37, .4, .2, .6, .2, .72, .37), ("r", 2, .41, 0, .59, .22),
               ("r", 3, .28, .55, .72, .8)],
    "snowman": [("e", 3, .15, .45, .85, 1), ("e", 3, .27, .12, .73, .55), ("r", 1, .3, .1, .7, .2), ("r", 1, .36, 0, .64, .15),
                ("e", 2, .38, .26, .46, .34), ("e", 2, .54, .26, .62, .34)],
}


@functools.lru_cache(maxsize=None)
def drawn_object(name: str, size: int) -> np.ndarray:
    """One of the drawn objects.

    Args:
        name: one of `words.OBJECTS`.
        size: side in pixels.

    Returns:
        u8[size, size] stencil.
    """
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    for primitive, index, *unit in _OBJECTS[name]:
        if primitive == "l":
            draw.line([v * (size - 1) for v in unit[1:]], fill=index, width=max(2, round(unit[0] * size)))
            continue
        points = [v * (size - 1) for v in unit]
        {"p": draw.polygon, "e": draw.ellipse, "r": draw.rectangle}[primitive](points, fill=index)
    return np.asarray(image)


@functools.lru_cache(maxsize=None)
def arrow(direction: str, size: int) -> np.ndarray:
    """An arrow that points up, down, left or right: u8[size, size]."""
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    end = size - 1
    draw.polygon([0.5 * end, 0, end, 0.5 * end, 0, 0.5 * end], fill=1)
    draw.rectangle([0.36 * end, 0.45 * end, 0.64 * end, end], fill=1)
    return np.rot90(np.asarray(image), {"up": 0, "left": 1, "down": 2, "right": 3}[direction])
