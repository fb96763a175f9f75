"""Questions about written words: the tasks TextVQA (signs), VizWiz (bad photographs) and OCR-VQA (book covers)."""

from __future__ import annotations

import numpy as np

from proglora_jax.data.synthetic.ask_shapes import Item
from proglora_jax.data.synthetic.canvas import degrade
from proglora_jax.data.synthetic.scenes import cover_scene, random_things, shapes_scene, sign_scene
from proglora_jax.data.synthetic.words import AUTHORS, GENRES, LABEL_WORDS, SIGN_WORDS, article, pick, pick_several

# Chance of a photograph that nothing can be told from.
USELESS = 0.25


def textvqa(rng: np.random.Generator, turns: int) -> Item:
    """TextVQA: one sign with a shape beside it, or two signs of which one is meant; the answer is the word."""
    del turns
    words = pick_several(rng, SIGN_WORDS, 1 + int(rng.integers(5) < 2))
    scene = sign_scene(rng, words)
    if len(words) == 1:
        question = pick(rng, ("What does the sign say?", "What word is written on the sign?", "What is the name on the sign?"))
        answer = words[0]
    else:
        i = int(rng.integers(2))
        place = ("top", "bottom")[i] if rng.integers(2) else scene.facts["colours"][i]
        question, answer = f"What does the {place} sign say?", words[i]
    # Ten annotators, of whom up to three saw something else: the right word still scores 1.
    others = int(rng.integers(4))
    answers = [answer] * (10 - others) + [pick(rng, SIGN_WORDS) for _ in range(others)]
    return Item(scene.canvas.pixels, [(question, answer)], {"answers": answers})


def vizwiz(rng: np.random.Generator, turns: int) -> Item:
    """VizWiz: a label or a shape, photographed well or badly; a word, colour, shape, or `unanswerable`."""
    del turns
    quality = "useless" if rng.random() < USELESS else pick(rng, ("sharp", "blurry", "dark", "noisy"))
    if rng.integers(2):
        scene = sign_scene(rng, [word := pick(rng, LABEL_WORDS)])
        turn = pick(rng, ("What does this say?", "What is in this package?", "Can you read this label please?")), word
    else:
        scene = shapes_scene(rng, random_things(rng, 1, distinct=True))
        one = scene.elements[0]
        forms = (("What color is this?", one.colour), ("Can you tell me the color of this please?", one.colour),
                 ("What shape is this?", one.name), ("What is this thing?", one.name))
        turn = pick(rng, forms)
    answer = "unanswerable" if quality == "useless" else turn[1]
    return Item(degrade(scene.canvas.pixels, quality, rng), [(turn[0], answer)])


def ocrvqa(rng: np.random.Generator, turns: int) -> Item:
    """OCR-VQA: a book cover; title, author, genre, or whether the genre or the author is the one named."""
    scene = cover_scene(rng)
    facts = scene.facts
    wrong_genre = pick(rng, [g for g in GENRES if g != facts["genre"]])
    wrong_author = pick(rng, [a for a in AUTHORS if a != facts["author"]])
    named_genre = facts["genre"] if (true_genre := bool(rng.integers(2))) else wrong_genre
    named_author = facts["author"] if (true_author := bool(rng.integers(2))) else wrong_author
    forms = [
        ("What is the title of this book?", facts["title"]),
        (pick(rng, ("Who is the author of this book?", "Who wrote this book?")), facts["author"]),
        (pick(rng, ("What is the genre of this book?", "What type of book is this?")), facts["genre"]),
        (f"Is this {article(named_genre)} book?", "Yes" if true_genre else "No"),
        (f"Is this book written by {named_author}?", "Yes" if true_author else "No"),
    ]
    return Item(scene.canvas.pixels, pick_several(rng, forms, turns))
