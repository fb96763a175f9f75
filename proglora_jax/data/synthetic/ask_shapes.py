"""Questions about coloured shapes: the tasks GQA (relations), Grounding (boxes) and VQAv2 (counts, colours, yes or no)."""

from __future__ import annotations

import dataclasses

import numpy as np

from proglora_jax.data.synthetic.canvas import SIDE_PX, Element
from proglora_jax.data.synthetic.scenes import Scene, random_things, shapes_scene
from proglora_jax.data.synthetic.words import COLOURS, PLURALS, SHAPES, pick, pick_several

RELATIONS: dict[str, str] = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
# A relation holds where the centres differ by this much along its axis.
CLEAR_PX = 10


@dataclasses.dataclass
class Item:
    """One drawn record of a task.

    Attributes:
        pixels: u8[H, W, 3], or None for a text-only record.
        turns: (question, answer) pairs without instruction line.
        extra: what the task's auxiliary files need.
    """

    pixels: np.ndarray | None
    turns: list[tuple[str, str]]
    extra: dict = dataclasses.field(default_factory=dict)


def holds(relation: str, one: Element, other: Element) -> bool:
    """Whether `one` stands clearly in the relation (`left`, `right`, `above`, `below`) to `other`."""
    dx, dy = one.centre[0] - other.centre[0], one.centre[1] - other.centre[1]
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation] >= CLEAR_PX


def the(element: Element) -> str:
    """`the red circle`."""
    return f"the {element.colour} {element.name}"


def _relation_turn(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """One question about a relation in a scene of different shapes; None where the dice name an unclear one."""
    one, other = pick_several(rng, scene.elements, 2)
    relation = pick(rng, list(RELATIONS))
    phrase = RELATIONS[relation]
    if (form := int(rng.integers(4))) < 2:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
        if form == 0 and holds(relation, one, other):
            return f"Is {the(one)} {phrase} {the(other)}?", "yes"
        if form == 1 and holds(opposite, one, other):
            return f"Is {the(one)} {phrase} {the(other)}?", "no"
        return None
    found = [e for e in scene.elements if e is not other and holds(relation, e, other)]
    if len(found) != 1:
        return None
    if form == 2:
        return f"Which shape is {phrase} {the(other)}?", found[0].name
    return f"What color is the shape {phrase} the {other.name}?", found[0].colour


def gqa(rng: np.random.Generator, turns: int) -> Item:
    """GQA: two or three different shapes; a relation to verify, or the shape or colour of the thing in a relation."""
    while True:
        scene = shapes_scene(rng, random_things(rng, int(rng.integers(2, 4)), distinct=True))
        asked: dict[str, str] = {}
        for _ in range(24):
            if (turn := _relation_turn(rng, scene)) is not None:
                asked.setdefault(*turn)
            if len(asked) == turns:
                return Item(scene.canvas.pixels, list(asked.items()))


def box_text(box: tuple[float, float, float, float]) -> str:
    """`[x1, y1, x2, y2]` with two decimals."""
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def padded_box(box: tuple[int, int, int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """A pixel box in the frame of the square that padding makes, each value in [0, 1].

    Source: CoIN's Grounding annotations (corners plus half the padding, divided by the longer side).
    """
    side, dx, dy = max(width, height), max(height - width, 0) / 2, max(width - height, 0) / 2
    x1, y1, x2, y2 = box
    return (x1 + dx) / side, (y1 + dy) / side, (x2 + dx) / side, (y2 + dy) / side


def _expression(rng: np.random.Generator, scene: Scene, target: Element) -> str | None:
    """A referring expression that fits the target only, or None."""
    same_shape = [e for e in scene.elements if e.name == target.name and e is not target]
    same_colour = [e for e in scene.elements if e.colour == target.colour and e is not target]
    form = int(rng.integers(8))
    if form < 5:
        return None if any(e.name == target.name for e in same_colour) else the(target)
    if form == 5:
        return None if same_shape else f"the {target.name}"
    if form == 6:
        return None if same_colour else f"the {target.colour} shape"
    if len(same_shape) != 1:
        return None
    side = next((s for s in ("left", "right") if holds(s, target, same_shape[0])), None)
    return side and f"the {target.name} on the {side}"


def grounding(rng: np.random.Generator, turns: int) -> Item:
    """Grounding: two or three shapes, one in eight pictures not square; an expression to a box in the padded frame."""
    wide = int(rng.integers(16))
    width, height = {0: (SIDE_PX, 32), 1: (32, SIDE_PX)}.get(wide, (SIDE_PX, SIDE_PX))
    while True:
        things = random_things(rng, int(rng.integers(2, 4)), distinct=bool(rng.integers(3)))
        scene = shapes_scene(rng, things, width=width, height=height)
        asked: dict[str, tuple] = {}
        for _ in range(12):
            target = pick(rng, scene.elements)
            expression = _expression(rng, scene, target)
            if expression is None or any(target.box == box for box in asked.values()):
                continue
            asked[expression] = target.box
            if len(asked) == turns:
                boxes = [padded_box(box, width, height) for box in asked.values()]
                plain = tuple(v / s for v, s in zip(next(iter(asked.values())), (width, height) * 2, strict=True))
                return Item(
                    scene.canvas.pixels,
                    [(e, box_text(b)) for e, b in zip(asked, boxes, strict=True)],
                    {"origin": box_text(plain), "size": [width, height]},
                )


def _attribute_turn(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """One VQAv2 question about the scene; None where the dice name one without a clear answer."""
    things = scene.elements
    names = [e.name for e in things]
    one, form = pick(rng, things), int(rng.integers(7))
    if form == 0:
        return "How many shapes are there?", str(len(things))
    if form == 1:
        # A count of one is what the dice give most often; two in three of them are passed over.
        count = names.count(one.name)
        return None if count == 1 and rng.integers(3) else (f"How many {PLURALS[one.name]} are in the picture?", str(count))
    if form in (2, 3):
        return None if names.count(one.name) > 1 else (f"What color is the {one.name}?", one.colour)
    if form == 4:
        return f"Is there a {one.colour} {one.name} in the picture?", "yes"
    if form == 5:
        fake = (pick(rng, list(COLOURS)), one.name) if rng.integers(2) else (one.colour, pick(rng, SHAPES))
        absent = all((e.colour, e.name) != fake for e in things)
        return (f"Is there a {fake[0]} {fake[1]} in the picture?", "no") if absent else None
    if names.count(one.name) > 1:
        return None
    colour = one.colour if rng.integers(2) else pick(rng, list(COLOURS))
    return f"Is the {one.name} {colour}?", "yes" if colour == one.colour else "no"


def vqav2(rng: np.random.Generator, turns: int) -> Item:
    """VQAv2: one to five shapes, some alike; counts, colours, presence."""
    while True:
        things = random_things(rng, int(rng.integers(1, 6)), distinct=False)
        if len(things) > 2 and rng.integers(3):
            things = [(colour, things[0][1] if rng.integers(2) else name) for colour, name in things]
        scene = shapes_scene(rng, things)
        asked: dict[str, str] = {}
        for _ in range(24):
            if (turn := _attribute_turn(rng, scene)) is not None:
                asked.setdefault(*turn)
            if len(asked) == turns:
                return Item(scene.canvas.pixels, list(asked.items()))
