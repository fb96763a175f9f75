"""A canvas that remembers what it painted: pixels, the owner of every pixel, and a tight box and the words of each element."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageFilter

from proglora_jax.data.synthetic import stencils
from proglora_jax.data.synthetic.words import BACKGROUNDS, COLOURS, pick

SIDE_PX = 48


@dataclasses.dataclass(frozen=True)
class Element:
    """One painted thing.

    Attributes:
        kind: what it is (`shape`, `sign`, `text`, `object`, `arrow`, `bar`, `thermometer`).
        name: its name (`circle`, `hotel`, `house`, ...).
        colour: its colour word, `""` where colour says nothing.
        box: (x1, y1, x2, y2) in pixels of the picture; x2 and y2 are just past the last pixel.
        height: a quantity that a diagram shows (bars, thermometers), in pixels.
    """

    kind: str
    name: str
    colour: str
    box: tuple[int, int, int, int]
    height: int = 0

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box (x, y), in pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


class Canvas:
    """A picture under construction.

    Attributes:
        pixels: u8[H, W, 3].
        owner: i16[H, W], 0 for background, else 1 + index in `elements`.
        elements: what was painted, in order.
        letters: (row, column, letter) of every letter, in cells of 8 x 8 pixels.
    """

    def __init__(self, rng: np.random.Generator, width: int = SIDE_PX, height: int = SIDE_PX, colour: tuple[int, int, int] | None = None):
        """A canvas with a plain, slightly noisy background; `colour` fixes it, else one of four muted ones is drawn."""
        base = np.array(colour if colour is not None else pick(rng, BACKGROUNDS), np.int16)
        noise = rng.integers(-5, 6, (height, width, 1), dtype=np.int16)
        self.pixels = np.clip(base + rng.integers(-8, 9, 3, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
        self.owner = np.zeros((height, width), np.int16)
        self.elements: list[Element] = []
        self.letters: list[tuple[int, int, str]] = []
        self.rng = rng

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def paint(self, stencil: np.ndarray, x: int, y: int, *, kind: str, name: str, colour: str, height: int = 0) -> Element:
        """Paints a stencil in a (slightly jittered) colour.

        Args:
            stencil: u8[h, w] with 0 nothing, 1 main colour, 2 dark detail, 3 light detail.
            x: left edge, pixels.
            y: top edge, pixels.
            kind: as in `Element`.
            name: as in `Element`.
            colour: colour word of the main colour.
            height: as in `Element`.

        Returns:
            The new element, with its tight box.
        """
        main = np.clip(np.array(COLOURS[colour], np.int16) + self.rng.integers(-12, 13, 3, dtype=np.int16), 0, 255)
        palette = np.stack([main, main, np.array([70, 55, 45]), np.array([240, 235, 215])]).astype(np.uint8)
        mask = stencil > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1)
        self.elements.append(Element(kind, name, colour, box, height))
        view = slice(y, y + stencil.shape[0]), slice(x, x + stencil.shape[1])
        self.pixels[view] = np.where(mask[..., None], palette[stencil], self.pixels[view])
        self.owner[view] = np.where(mask, len(self.elements), self.owner[view])
        return self.elements[-1]

    def write(self, word: str, row: int, column: int, ink: str, colour: str = "") -> Element:
        """Writes a word on the grid of 8-pixel cells, so that one patch holds one letter.

        The element owns the whole cells, not only the ink; `colour` is that of the board below it, where there is one.
        """
        mask = stencils.text(word)
        y, x = row * stencils.CELL_PX, column * stencils.CELL_PX
        view = slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
        self.pixels[view] = np.where(mask[..., None] > 0, np.array(COLOURS[ink], np.uint8), self.pixels[view])
        self.elements.append(Element("text", word, colour, (x, y, x + mask.shape[1], y + mask.shape[0])))
        self.owner[view] = len(self.elements)
        self.letters.extend((row, column + i, char.upper()) for i, char in enumerate(word))
        return self.elements[-1]


def solid(width: int, height: int) -> np.ndarray:
    """A full rectangle as a stencil: u8[height, width]."""
    return np.ones((height, width), np.uint8)


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of u8[H, W, 3] with a radius in pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def darken(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies u8[H, W, 3] by a factor below one."""
    return (pixels * factor).astype(np.uint8)


def add_noise(pixels: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise of `sigma` grey levels to u8[H, W, 3]."""
    return np.clip(pixels + rng.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8)


def degrade(pixels: np.ndarray, quality: str, rng: np.random.Generator) -> np.ndarray:
    """A photograph taken badly.

    Args:
        pixels: u8[H, W, 3].
        quality: `sharp` (unchanged), `blurry`, `dark`, `noisy` (still legible), or `useless`.
        rng: source of noise and of strength.

    Returns:
        u8[H, W, 3].
    """
    if quality == "blurry":
        return blur(pixels, float(rng.uniform(0.5, 0.8)))
    if quality == "dark":
        return darken(pixels, float(rng.uniform(0.3, 0.5)))
    if quality == "noisy":
        return add_noise(pixels, float(rng.uniform(18, 30)), rng)
    if quality == "useless":
        kind = int(rng.integers(3))
        if kind == 0:
            return blur(pixels, float(rng.uniform(7, 10)))
        if kind == 1:
            return add_noise(darken(pixels, 0.03), 4, rng)
        return add_noise(darken(pixels, 0.4), 220, rng)
    return pixels
