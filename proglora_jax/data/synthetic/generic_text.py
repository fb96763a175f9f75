"""The part of the generic mixture that needs no picture: meanings, numbers, lists of choices, copying."""

from __future__ import annotations

import numpy as np

from proglora_jax.data.synthetic.words import (
    COLOURS, DIRECTIONS, KINDS, LETTERS, OBJECTS, SHAPES, SIGN_WORDS, article, pick, pick_several,
)

Turn = tuple[str, str]
TOPICS = {"History": "the past", "Cooking": "food", "Travel": "places", "Science": "nature", "Sports": "games", "Romance": "love"}
WORDS = (*COLOURS, *SHAPES, *DIRECTIONS, *OBJECTS, *SIGN_WORDS, *(w for kind in KINDS.values() for w in kind), "neither", *"0123456789")


def one_turn(rng: np.random.Generator) -> Turn:
    """One question that needs no picture."""
    return pick(rng, (_definition, _comparison, _copy_option, _repeat, _kind_option, _kind_option))(rng)


def listed(rng: np.random.Generator, task: str, right: str, wrong: list[str]) -> Turn:
    """A choice among listed words; the answer names a letter in a sentence (`I` first, so that no letter parser finds it)."""
    wrong = [w for w in wrong if w != right]
    count = min(len(wrong) + 1, int(pick(rng, (2, 3, 4))))
    choices = pick_several(rng, [right, *pick_several(rng, wrong, count - 1)], count)
    mark = pick(rng, (".", ".", ":", ")"))
    lines = "\n".join(f"{LETTERS[i]}{mark} {choice}" for i, choice in enumerate(choices))
    letter = LETTERS[choices.index(right)]
    # Naming the content first teaches the way from content to letter; the short answer then has to take it at once.
    if rng.integers(2):
        return f"Explain and {task[0].lower()}{task[1:]}\n{lines}", f"It is {right}, so I pick {letter}."
    return f"{task}\n{lines}", f"I pick {letter}."


def _definition(rng: np.random.Generator) -> Turn:
    if rng.integers(4) == 0:
        genre = pick(rng, list(TOPICS))
        return f"Say what {genre} books are about.", f"{genre} books are about {TOPICS[genre]}."
    kind = pick(rng, list(KINDS))
    thing = pick(rng, KINDS[kind])
    return f"Say what {article(thing)} is.", f"It is {article(kind)}."


def recall(rng: np.random.Generator, count: int) -> list[Turn]:
    """Lists of choices with several questions about each: words to letters and back."""
    turns: list[Turn] = []
    while len(turns) < count:
        words = pick_several(rng, WORDS, int(rng.integers(2, 5)))
        mark = pick(rng, (".", ".", ":", ")"))
        lines = "\n".join(f"{LETTERS[i]}{mark} {word}" for i, word in enumerate(words))
        for n, i in enumerate(rng.permutation(len(words))):
            back = rng.integers(4) == 0
            question, answer = f"Pick the word {words[i]}.", f"I pick {LETTERS[i]}."
            if back:
                question, answer = f"Name {LETTERS[i]}.", f"It is {words[i]}."
            turns.append((question if n else f"{question}\n{lines}", answer))
    return turns[:count]


def _repeat(rng: np.random.Generator) -> Turn:
    words = " ".join(pick_several(rng, WORDS, int(rng.integers(6, 11))))
    return f"Repeat: {words}.", f"{words}."


def _comparison(rng: np.random.Generator) -> Turn:
    numbers = [str(v) for v in pick_several(rng, range(10), int(rng.integers(2, 5)))]
    which, best = (("largest", max(numbers)) if rng.integers(2) else ("smallest", min(numbers)))
    if rng.integers(2):
        return f"Name the {which} of {', '.join(numbers)}.", f"It is {best}."
    return listed(rng, f"Pick the {which} number.", best, numbers)


def _copy_option(rng: np.random.Generator) -> Turn:
    right, *wrong = pick_several(rng, WORDS, 4)
    return listed(rng, f"Pick the word {right}.", right, wrong)


def _kind_option(rng: np.random.Generator) -> Turn:
    kind = pick(rng, list(KINDS))
    return listed(rng, f"Pick {article(kind)}.", pick(rng, KINDS[kind]), [pick(rng, KINDS[k]) for k in KINDS if k != kind])
