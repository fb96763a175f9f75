"""Questions about things and diagrams: the tasks ImageNet (name the object) and ScienceQA (options and letters)."""

from __future__ import annotations

import numpy as np

from proglora_jax.data.synthetic.ask_shapes import Item
from proglora_jax.data.synthetic.scenes import arrow_scene, bars_scene, object_scene, thermometers_scene
from proglora_jax.data.synthetic.words import DIRECTIONS, KINDS, LETTERS, OBJECTS, article, pick, pick_several

IMAGENET_QUESTION = "What is the object in the image?"
TEXT_ONLY = 0.25


def imagenet(rng: np.random.Generator, turns: int) -> Item:
    """ImageNet: one of twenty drawn objects; its name with a capital (the writer adds the period of training targets)."""
    del turns
    name = pick(rng, OBJECTS)
    return Item(object_scene(rng, name).canvas.pixels, [(IMAGENET_QUESTION, name.capitalize())], {"class": OBJECTS.index(name)})


def _options(question: str, right: str, choices: list[str]) -> Item:
    """A question with lettered choices in the order given; the answer is the right one's letter."""
    lines = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
    answer = choices.index(right)
    return Item(None, [(f"{question}\n{lines}", LETTERS[answer])], {"question": question, "choices": choices, "answer": answer})


def _some(rng: np.random.Generator, right: str, choices: list[str]) -> list[str]:
    """All choices, or one time in three only two or three of them with the right one among them; their order is kept."""
    count = len(choices) if rng.integers(3) else int(rng.integers(2, len(choices) + 1))
    kept = {right, *pick_several(rng, [c for c in choices if c != right], count - 1)}
    return [c for c in choices if c in kept]


def _knowledge(rng: np.random.Generator) -> Item:
    """A text-only question: which word belongs to a kind, or which number is the largest or smallest; choices in any order."""
    count = int(rng.integers(2, 5))
    if rng.integers(2):
        kind = pick(rng, list(KINDS))
        right = pick(rng, KINDS[kind])
        wrong = pick_several(rng, [pick(rng, KINDS[other]) for other in KINDS if other != kind], count - 1)
        return _options(f"Which of these is {article(kind)}?", right, pick_several(rng, [right, *wrong], count))
    numbers = pick_several(rng, range(10), count)
    which, right = ("largest", max(numbers)) if rng.integers(2) else ("smallest", min(numbers))
    return _options(f"Which of these numbers is the {which}?", str(right), [str(v) for v in numbers])


def scienceqa(rng: np.random.Generator, turns: int) -> Item:
    """ScienceQA: an arrow, a bar chart, two thermometers, or (a quarter) text only; two to four options, a letter.

    The choices of a picture come in their natural order (up, down, left, right; the bars from left to right), which a small
    model can learn; those of the text-only questions come in any order, and a small model can hardly learn them.
    """
    del turns
    if rng.random() < TEXT_ONLY:
        return _knowledge(rng)
    form = int(rng.integers(5))
    if form < 2:
        scene = arrow_scene(rng)
        right = scene.facts["direction"]
        item = _options("Which way does the arrow point?", right, _some(rng, right, list(DIRECTIONS)))
    elif form < 4:
        scene = bars_scene(rng)
        extreme = pick(rng, ("tallest", "shortest"))
        right = scene.facts[extreme]
        item = _options(f"Which bar is the {extreme}?", right, scene.facts["colours"])
    else:
        scene = thermometers_scene(rng)
        right = scene.facts["warmer"]
        choices = ["left", "right", "neither"][: 2 + int(rng.integers(2))]
        item = _options("Which thermometer shows the higher temperature?", right, choices)
    item.pixels = scene.canvas.pixels
    return item
