"""Questions about things and diagrams: the tasks ImageNet (name the object) and ScienceQA (options and letters)."""

from __future__ import annotations

import numpy as np

from proglora_jax.data.synthetic.ask_shapes import Item
from proglora_jax.data.synthetic.scenes import arrow_scene, bars_scene, object_scene, thermometers_scene
from proglora_jax.data.synthetic.words import COLOURS, DIRECTIONS, KINDS, LETTERS, OBJECTS, article, pick, pick_several

IMAGENET_QUESTION = "What is the object in the image?"
TEXT_ONLY = 0.25


def imagenet(rng: np.random.Generator, turns: int) -> Item:
    """ImageNet: one of twenty drawn objects; its name with a capital (the writer adds the period of training targets)."""
    del turns
    name = pick(rng, OBJECTS)
    return Item(object_scene(rng, name).canvas.pixels, [(IMAGENET_QUESTION, name.capitalize())], {"class": OBJECTS.index(name)})


def _options(rng: np.random.Generator, question: str, right: str, wrong: list[str]) -> Item:
    """A question with two to four options in random order; the answer is the right one's letter."""
    count = min(len(wrong) + 1, int(pick(rng, (2, 3, 3, 4, 4, 4))))
    choices = pick_several(rng, [right, *pick_several(rng, wrong, count - 1)], count)
    lines = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
    answer = choices.index(right)
    return Item(None, [(f"{question}\n{lines}", LETTERS[answer])], {"question": question, "choices": choices, "answer": answer})


def _knowledge(rng: np.random.Generator) -> Item:
    """A text-only question: which word belongs to a kind, or which number is the largest or smallest."""
    if rng.integers(2):
        kind = pick(rng, list(KINDS))
        wrong = [pick(rng, KINDS[other]) for other in KINDS if other != kind]
        return _options(rng, f"Which of these is {article(kind)}?", pick(rng, KINDS[kind]), wrong)
    numbers = sorted(pick_several(rng, range(10), 4))
    if rng.integers(2):
        return _options(rng, "Which of these numbers is the largest?", str(numbers[-1]), [str(v) for v in numbers[:-1]])
    return _options(rng, "Which of these numbers is the smallest?", str(numbers[0]), [str(v) for v in numbers[1:]])


def scienceqa(rng: np.random.Generator, turns: int) -> Item:
    """ScienceQA: an arrow, a bar chart, two thermometers, or (a quarter) text only; two to four options, a letter."""
    del turns
    if rng.random() < TEXT_ONLY:
        return _knowledge(rng)
    form = int(rng.integers(5))
    if form < 2:
        scene = arrow_scene(rng)
        right = scene.facts["direction"]
        item = _options(rng, "Which way does the arrow point?", right, [d for d in DIRECTIONS if d != right])
    elif form < 4:
        scene = bars_scene(rng)
        extreme = pick(rng, ("tallest", "shortest"))
        right = scene.facts[extreme]
        shown = [c for c in scene.facts["colours"] if c != right]
        spare = pick_several(rng, [c for c in COLOURS if c not in scene.facts["colours"]], 3 - len(shown))
        item = _options(rng, f"Which bar is the {extreme}?", right, shown + spare)
    else:
        scene = thermometers_scene(rng)
        right = scene.facts["warmer"]
        wrong = [side for side in ("left", "right", "neither") if side != right]
        item = _options(rng, "Which thermometer shows the higher temperature?", right, wrong)
    item.pixels = scene.canvas.pixels
    return item
