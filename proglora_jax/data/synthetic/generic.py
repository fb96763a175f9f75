"""The generic mixture that makes the base model: the benchmark's pictures with other questions and whole-sentence answers."""

from __future__ import annotations

import numpy as np

from proglora_jax.data.synthetic.ask_shapes import RELATIONS, holds, padded_box, the
from proglora_jax.data.synthetic.canvas import SIDE_PX, degrade
from proglora_jax.data.synthetic.generic_text import Turn, listed, one_turn, recall
from proglora_jax.data.synthetic.scenes import (
    Scene, arrow_scene, bars_scene, cover_scene, random_object, random_things, shapes_scene, sign_scene, thermometers_scene,
)
from proglora_jax.data.synthetic.words import (
    AUTHORS, COLOURS, DIRECTIONS, GENRES, LABEL_WORDS, OBJECTS, PLURALS, SHAPES, SIGN_WORDS, article, pick, pick_several,
)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random picture of any kind; one in five of the shapes and signs is a bad photograph."""
    kind = int(rng.integers(20))
    if kind < 11:
        side = {0: (SIDE_PX, 32), 1: (32, SIDE_PX)}.get(int(rng.integers(24)))
        count = int(pick(rng, (1, 2, 2, 3, 3, 4, 5)))
        if side:
            return shapes_scene(rng, random_things(rng, min(count, 3), distinct=True), width=side[0], height=side[1])
        things = random_things(rng, count, distinct=count < 4 and bool(rng.integers(6)))
        if count > 2 and not rng.integers(3):
            things = [(colour, things[0][1] if rng.integers(2) else name) for colour, name in things]
        scene = shapes_scene(rng, things)
    elif kind < 14:
        scene = sign_scene(rng, pick_several(rng, SIGN_WORDS + LABEL_WORDS, 1 + int(rng.integers(3) == 0)))
    else:
        return pick(rng, (random_object, random_object, cover_scene, arrow_scene, bars_scene, thermometers_scene))(rng)
    if rng.integers(5) == 0:
        scene.quality = pick(rng, ("blurry", "dark", "noisy", "useless"))
        scene.canvas.pixels = degrade(scene.canvas.pixels, scene.quality, rng)
    return scene


def draw_turns(rng: np.random.Generator, scene: Scene | None, count: int) -> list[Turn]:
    """Different questions about a picture, with sentences as answers.

    Args:
        rng: generator.
        scene: the picture, or None for text only.
        count: how many turns.

    Returns:
        (question, answer) pairs; fewer than `count` where the picture gives no more.
    """
    if scene is None and rng.integers(4) == 0:
        return recall(rng, 2 * count)
    found: dict[str, str] = {}
    for _ in range(8 * count):
        if scene is None:
            turn = one_turn(rng)
        elif scene.quality == "useless" or (scene.quality != "sharp" and rng.integers(4) == 0):
            turn = _quality(rng, scene)
        elif rng.integers(8) == 0:
            turn = _options(rng, scene)
        else:
            turn = pick(rng, _QUESTIONS[scene.kind])(rng, scene)
        if turn is not None:
            found.setdefault(*turn)
        if len(found) == count:
            break
    return list(found.items())


def _quality(rng: np.random.Generator, scene: Scene) -> Turn:
    if scene.quality == "useless" and rng.integers(2):
        return "Say how this photo can be used.", "Anything that it shows is unanswerable."
    return pick(rng, ("How good is the photo?", "Judge the photo.")), f"The photo is {scene.quality}."


def _unique(scene: Scene, attribute: str) -> list:
    """Elements whose name or colour no other element shares."""
    values = [getattr(e, attribute) for e in scene.elements]
    return [e for e in scene.elements if values.count(getattr(e, attribute)) == 1]


def _single(rng: np.random.Generator, scene: Scene):
    """An element that its colour and name single out, or None."""
    keys = [(e.colour, e.name) for e in scene.elements]
    single = [e for e in scene.elements if keys.count((e.colour, e.name)) == 1]
    return pick(rng, single) if single else None


def _describe(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if len(scene.elements) > 3:
        return None
    names = [article(f"{e.colour} {e.name}") for e in sorted(scene.elements, key=lambda e: (e.box[0], e.box[1]))]
    return "Describe the picture from left to right.", "It shows " + " and ".join(names) + "."


def zone(scene: Scene, element) -> str:
    """Ninth of the picture in which an element's centre lies, such as `top left`."""
    width, height = scene.canvas.size
    x, y = element.centre
    return ("top", "middle", "bottom")[min(2, int(3 * y / height))] + " " + ("left", "center", "right")[min(2, int(3 * x / width))]


def _where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one = _single(rng, scene)
    if one is None:
        return None
    return _about(rng, f"Where do you find {the(one)}?", the(one), f"is in the {zone(scene, one)}")


def _corners(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one = _single(rng, scene)
    if one is None:
        return None
    x1, y1, x2, y2 = padded_box(one.box, *scene.canvas.size)
    unique_name = any(e is one for e in _unique(scene, "name")) and rng.integers(3) == 0
    name = f"the {one.name}" if unique_name else the(one)
    return _about(rng, f"Give the corners of {name}.", name, f"starts at {x1:.2f}, {y1:.2f} and ends at {x2:.2f}, {y2:.2f}")


def _edge(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one = _single(rng, scene)
    if one is None:
        return None
    i = int(rng.integers(4))
    side = ("left", "top", "right", "bottom")[i]
    return f"Give the {side} edge of {the(one)}.", f"Its {side} edge is at {padded_box(one.box, *scene.canvas.size)[i]:.2f}."


def _about(rng: np.random.Generator, question: str, name: str, rest: str) -> Turn:
    """A turn whose answer names its subject again or, asked to be brief, says `it`: the first is the easier lesson of the two."""
    return (f"{question} Be brief.", f"It {rest}.") if rng.integers(2) else (question, f"T{name[1:]} {rest}.")


def _each(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, "name")
    if len(things) < 2:
        return None
    chosen = pick_several(rng, things, min(3, len(things)))
    listed = ", ".join(f"the {e.name}" for e in chosen)
    return f"Tell me about {listed}.", "T" + ", ".join(f"the {e.name} is painted {e.colour}" for e in chosen)[1:] + "."


def _relation(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if len(scene.elements) < 2 or len(_unique(scene, "name")) < len(scene.elements):
        return None
    # Most dice name a relation that is not clear, so they are thrown a few times.
    return next((turn for turn in (_relation_once(rng, scene) for _ in range(6)) if turn is not None), None)


def _relation_once(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one, other = pick_several(rng, scene.elements, 2)
    relation = pick(rng, list(RELATIONS))
    form = int(rng.integers(4))
    if form == 0 and holds(relation, one, other):
        axis = "sideways" if relation in ("left", "right") else "upright"
        return f"Compare {axis} the {one.name} with the {other.name}.", f"It is {RELATIONS[relation]} the {other.name}."
    if form == 1:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
        if holds(relation, one, other) or holds(opposite, one, other):
            verdict = "yes" if holds(relation, one, other) else "no"
            return f"Judge this: {the(one)} is {RELATIONS[relation]} {the(other)}.", f"My verdict is {verdict}."
        return None
    found = [e for e in scene.elements if e is not other and holds(relation, e, other)]
    if form > 1 and len(found) == 1:
        return f"Name what you see {RELATIONS[relation]} {the(other)}.", f"You see {article(found[0].colour)} {found[0].name}."
    return None


def _colour(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, "name")
    if not things:
        return None
    one = pick(rng, things)
    return _about(rng, f"Tell me how the {one.name} is painted.", f"the {one.name}", f"is painted {one.colour}")


def _name(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, "colour")
    if not things:
        return None
    one = pick(rng, things)
    return _about(rng, f"Tell me what is painted {one.colour}.", f"the {one.colour} one", f"is the {one.name}")


def _presence(rng: np.random.Generator, scene: Scene) -> Turn | None:
    one = pick(rng, scene.elements)
    if rng.integers(2):
        return f"Judge this: {article(one.colour)} {one.name} is here.", "My verdict is yes."
    fake = (pick(rng, list(COLOURS)), one.name) if rng.integers(2) else (one.colour, pick(rng, SHAPES))
    if any((e.colour, e.name) == fake for e in scene.elements):
        return None
    return f"Judge this: {article(fake[0])} {fake[1]} is here.", "My verdict is no."


def _verdict(rng: np.random.Generator, claim: str, right: str, others: list[str]) -> Turn:
    """A claim about one word of the picture, to be judged: `claim` has a gap for the word."""
    word = right if rng.integers(2) else pick(rng, [w for w in others if w != right])
    return f"Judge this: {claim.format(word)}.", f"My verdict is {'yes' if word == right else 'no'}."


def _count(rng: np.random.Generator, scene: Scene) -> Turn:
    if rng.integers(2):
        return "Count everything.", f"I counted {len(scene.elements)} in total."
    name = pick(rng, scene.elements).name
    return f"Count the {PLURALS[name]}.", f"I counted {sum(e.name == name for e in scene.elements)} of them."


def _sign(rng: np.random.Generator, scene: Scene) -> Turn:
    words, colours = scene.facts["words"], scene.facts["colours"]
    i = int(rng.integers(len(words)))
    if rng.integers(5) == 0:
        return _verdict(rng, "the board reads {}", words[i], [w for w in SIGN_WORDS + LABEL_WORDS if w not in words])
    if rng.integers(4) == 0:
        return f"Tell me how the board with {words[i]} is painted.", f"It is painted {colours[i]}."
    if len(words) == 1:
        return pick(rng, ("Read the board.", "Read it aloud.")), f"It reads {words[0]}."
    if rng.integers(4) == 0:
        return "Read both boards.", f"They read {words[0]} and {words[1]}."
    which = ("top", "bottom")[i] if rng.integers(2) else colours[i]
    return _about(rng, f"Read the {which} board.", f"the {which} board", f"reads {words[i]}")


def _object(rng: np.random.Generator, scene: Scene) -> Turn:
    one = scene.elements[0]
    form = int(rng.integers(5))
    if form == 4:
        return _verdict(rng, "the drawing shows {}", article(one.name), [article(name) for name in OBJECTS])
    if form == 0:
        return "Name the drawing.", f"It shows {article(one.name)}."
    if form == 1:
        return "Give the drawing a title.", f"Its title is {one.name.capitalize()}."
    if form == 2:
        return "Describe the drawing.", f"It shows {article(one.colour)} {one.name} in the {zone(scene, one)}."
    return _colour(rng, scene)


def _cover(rng: np.random.Generator, scene: Scene) -> Turn:
    facts = scene.facts
    form = int(rng.integers(6))
    if form == 4:
        return _verdict(rng, "the cover is painted {}", facts["colour"], [colour for colour, _ in GENRES.values()])
    if form == 5:
        return _verdict(rng, "the lowest word of the cover is {}", facts["author"], list(AUTHORS))
    if form == 0:
        return "Read the upper words of the cover.", f"They read {facts['title']}."
    if form == 1:
        return "Read the lowest word of the cover.", f"It reads {facts['author']}."
    if form == 2:
        return "Describe the cover.", f"It is painted {facts['colour']} with {article(facts['emblem'])}."
    return "Read the cover aloud.", f"It reads {facts['title']} and {facts['author']}."


def _arrow(rng: np.random.Generator, scene: Scene) -> Turn:
    one = scene.elements[0]
    return pick(rng, (
        ("Describe the arrow.", f"It is painted {one.colour} and goes {one.name}."),
        ("Follow the arrow.", f"It goes {one.name}."),
    ))


def _bars(rng: np.random.Generator, scene: Scene) -> Turn:
    facts = scene.facts
    return pick(rng, (
        ("Compare the bars.", f"The tallest is {facts['tallest']} and the shortest is {facts['shortest']}."),
        ("Name the tallest bar.", f"It is the {facts['tallest']} bar."),
        ("Name the shortest bar.", f"It is the {facts['shortest']} bar."),
    ))


def _thermometers(rng: np.random.Generator, scene: Scene) -> Turn:
    warmer = scene.facts["warmer"]
    cooler = "right" if warmer == "left" else "left"
    return "Compare the thermometers.", f"The {warmer} one is higher and the {cooler} one is lower."


_SHAPES = (
    _describe, _where, _where, _corners, _corners, _corners, _corners, _corners, _edge, _relation, _relation, _relation, _relation,
    _colour, _colour, _name, _name, _each, _presence, _presence, _presence, _presence, _count, _count,
)
_QUESTIONS = {
    "shapes": _SHAPES, "sign": (_sign,), "object": (_object,), "cover": (_cover,),
    "arrow": (_arrow,), "bars": (_bars,), "thermometers": (_thermometers,),
}


def _options(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """A choice about a picture."""
    if scene.kind == "shapes":
        names, colours = _unique(scene, "name"), _unique(scene, "colour")
        if names and rng.integers(2):
            return listed(rng, f"Pick how the {(one := pick(rng, names)).name} is painted.", one.colour, list(COLOURS))
        return listed(rng, f"Pick what is painted {(one := pick(rng, colours)).colour}.", one.name, list(SHAPES)) if colours else None
    if scene.kind == "sign":
        return listed(rng, "Pick a word that you read.", pick(rng, scene.facts["words"]),
                       [w for w in SIGN_WORDS + LABEL_WORDS if w not in scene.facts["words"]])
    if scene.kind == "object":
        return listed(rng, "Pick what is drawn.", scene.facts["name"], list(OBJECTS))
    if scene.kind == "cover":
        return listed(rng, "Pick how the cover is painted.", scene.facts["colour"], list(COLOURS))
    if scene.kind == "arrow":
        return listed(rng, "Pick where the arrow goes.", scene.facts["direction"], list(DIRECTIONS))
    if scene.kind == "bars":
        which = pick(rng, ("tallest", "shortest"))
        return listed(rng, f"Pick the {which} bar.", scene.facts[which], scene.facts["colours"])
    return listed(rng, "Pick the higher one.", scene.facts["warmer"], ["left", "right", "neither"])
