"""The small world of the embedded benchmark: its colours, shapes, objects, words, and the named random generators."""

from __future__ import annotations

import zlib

import numpy as np

# Values are far enough apart that a jitter of 12 grey levels never makes two of them alike.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 225, 60),
    "green": (45, 160, 60),
    "blue": (45, 80, 215),
    "purple": (150, 60, 185),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}
BACKGROUNDS: tuple[tuple[int, int, int], ...] = ((196, 196, 196), (150, 150, 150), (190, 176, 156), (160, 182, 190))
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
PLURALS: dict[str, str] = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
OBJECTS: tuple[str, ...] = (
    "house", "tree", "car", "boat", "flower", "fish", "cup", "key", "clock", "umbrella",
    "mushroom", "rocket", "lamp", "ladder", "flag", "chair", "hat", "bird", "bottle", "snowman",
)
SIGN_WORDS: tuple[str, ...] = (
    "stop", "exit", "open", "cafe", "bank", "hotel", "taxi", "sale", "park", "shop",
    "bus", "gate", "zoo", "slow", "ferry", "pizza", "toll", "gym", "lobby", "pool",
)
LABEL_WORDS: tuple[str, ...] = ("milk", "soup", "rice", "salt", "tea", "sugar", "flour", "honey", "beans", "corn", "juice", "mint")
TITLE_FIRST: tuple[str, ...] = ("Lost", "Dark", "Last", "Cold", "Wild", "Quiet", "Old", "Silent")
TITLE_SECOND: tuple[str, ...] = ("River", "Moon", "Storm", "Ocean", "Tower", "Night", "Forest", "Valley")
AUTHORS: tuple[str, ...] = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Laura", "Oscar")
# genre -> (colour of the cover, emblem)
GENRES: dict[str, tuple[str, str]] = {
    "History": ("orange", "cross"),
    "Cooking": ("red", "circle"),
    "Travel": ("blue", "diamond"),
    "Science": ("green", "star"),
    "Sports": ("yellow", "triangle"),
    "Romance": ("purple", "heart"),
}
DIRECTIONS: tuple[str, ...] = ("up", "down", "left", "right")
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "cow", "lion"),
    "vehicle": ("truck", "train", "plane", "bike", "ship"),
    "food": ("bread", "cheese", "apple", "cake", "egg"),
    "tool": ("hammer", "saw", "drill", "wrench", "axe"),
}
LETTERS = "ABCD"


def article(word: str) -> str:
    """Puts `a` or `an` before a word."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def named_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator that depends on a seed and on names only, so that one stream never shifts another.

    Args:
        seed: the benchmark's seed.
        *names: what the stream is for, such as a task, a split and an index.

    Returns:
        A fresh generator.
    """
    return np.random.default_rng([seed, *(n if isinstance(n, int) else zlib.crc32(n.encode()) for n in names)])


def pick(rng: np.random.Generator, items):
    """One item of a sequence, uniformly."""
    return items[int(rng.integers(len(items)))]


def pick_several(rng: np.random.Generator, items, count: int) -> list:
    """`count` different items of a sequence, in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]
