"""The embedded benchmark's pictures: stencils touch their box, boxes are tight, letters sit on the patch grid, scenes are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from proglora_jax.data.synthetic import canvas, scenes, stencils
from proglora_jax.data.synthetic.ask_shapes import box_text, holds, padded_box
from proglora_jax.data.synthetic.generic import draw_scene, zone
from proglora_jax.data.synthetic.words import COLOURS, LABEL_WORDS, OBJECTS, SHAPES, SIGN_WORDS, article, named_rng, pick_several


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [12, 16, 20, 24])
def test_shape_stencil_touches_all_four_sides(name, size):
    mask = stencils.shape(name, size)
    assert mask.shape == (size, size)
    assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
    assert 0.2 < mask.mean() <= 1


def test_shapes_and_objects_look_different():
    for size, draw, names in ((12, stencils.shape, SHAPES), (24, stencils.drawn_object, OBJECTS)):
        images = [draw(name, size) > 0 for name in names]
        for i, one in enumerate(images):
            assert all((one != other).mean() > 0.06 for other in images[:i])


def test_letters_differ_and_leave_a_margin():
    letters = [stencils.letter(chr(ord("A") + i)) for i in range(26)]
    assert all(letter.shape == (8, 8) and not letter[0].any() and not letter[:, 0].any() for letter in letters)
    assert len({letter.tobytes() for letter in letters}) == 26
    np.testing.assert_array_equal(stencils.text("ab"), np.concatenate(letters[:2], axis=1))


def test_arrow_turns():
    ups = stencils.arrow("up", 16)
    assert ups[:6].sum() < ups[6:12].sum()
    np.testing.assert_array_equal(stencils.arrow("down", 16), ups[::-1, ::-1])
    assert stencils.arrow("left", 16)[:, 0].sum() < stencils.arrow("left", 16)[:, -1].sum()


@pytest.mark.parametrize("width, height", [(48, 48), (48, 32), (32, 48)])
def test_boxes_are_tight_and_inside(width, height):
    for i in range(20):
        rng = named_rng(i, "boxes")
        scene = scenes.shapes_scene(rng, scenes.random_things(rng, 3, distinct=True), width=width, height=height)
        assert scene.canvas.size == (width, height)
        for index, element in enumerate(scene.elements):
            rows, columns = np.nonzero(scene.canvas.owner == index + 1)
            assert element.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            box = padded_box(element.box, width, height)
            assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


def test_padded_box_by_hand():
    assert padded_box((0, 0, 24, 16), 48, 32) == (0, 8 / 48, 0.5, 0.5)
    assert padded_box((0, 0, 16, 24), 32, 48) == (8 / 48, 0, 0.5, 0.5)
    assert box_text((0, 8 / 48, 0.5, 1.0)) == "[0.00, 0.17, 0.50, 1.00]"


def test_relation_needs_a_clear_distance():
    rng = named_rng(0, "relation")
    board = canvas.Canvas(rng)
    one = board.paint(canvas.solid(4, 4), 0, 0, kind="shape", name="square", colour="red")
    near = board.paint(canvas.solid(4, 4), 9, 0, kind="shape", name="square", colour="blue")
    far = board.paint(canvas.solid(4, 4), 10, 20, kind="shape", name="square", colour="green")
    assert not holds("left", one, near) and holds("left", one, far) and holds("right", far, one)
    assert holds("above", one, far) and holds("below", far, one) and not holds("above", far, one)


def test_words_lie_on_the_patch_grid():
    for word in SIGN_WORDS + LABEL_WORDS:
        scene = scenes.sign_scene(named_rng(0, word), [word])
        text = next(e for e in scene.elements if e.kind == "text")
        assert text.box[0] % 8 == 0 and text.box[1] % 8 == 0 and text.box[2] <= 48
        row, column, _ = scene.canvas.letters[0]
        assert "".join(letter for *_, letter in scene.canvas.letters) == word.upper()
        ink = scene.canvas.pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].astype(int)
        mask = stencils.letter(word[0]) > 0
        assert np.abs(ink[mask].mean(0) - ink[~mask].mean(0)).max() > 60


@pytest.mark.parametrize("count", [1, 2])
def test_two_signs_do_not_overlap(count):
    for i in range(30):
        rng = named_rng(i, "signs")
        scene = scenes.sign_scene(rng, pick_several(rng, SIGN_WORDS, count))
        assert scene.facts["words"] == [e.name for e in scene.elements if e.kind == "text"]
        for index, element in enumerate(scene.elements):
            x1, y1, x2, y2 = element.box
            if element.kind == "shape" or element.kind == "text":
                assert (scene.canvas.owner == index + 1).sum() > 20
                assert x2 <= 48 and y2 <= 48


def test_diagrams_tell_the_truth():
    for i in range(20):
        bars = scenes.bars_scene(named_rng(i, "bars"))
        heights = {e.colour: e.height for e in bars.elements}
        assert max(heights, key=heights.get) == bars.facts["tallest"] and min(heights, key=heights.get) == bars.facts["shortest"]
        assert len(set(heights.values())) == len(heights)
        thermometers = scenes.thermometers_scene(named_rng(i, "thermometers"))
        left, right = (e for e in thermometers.elements if e.colour == "red")
        assert thermometers.facts["warmer"] == ("left" if left.height > right.height else "right")


def test_degrading():
    scene = scenes.sign_scene(named_rng(0, "photo"), ["milk"])
    pixels = scene.canvas.pixels
    assert canvas.degrade(pixels, "sharp", named_rng(0)) is pixels
    for quality in ("blurry", "dark", "noisy", "useless"):
        bad = canvas.degrade(pixels, quality, named_rng(0, quality))
        assert bad.shape == pixels.shape and bad.dtype == np.uint8 and (bad != pixels).mean() > 0.1
        np.testing.assert_array_equal(bad, canvas.degrade(pixels, quality, named_rng(0, quality)))


def test_scenes_repeat_and_streams_are_independent():
    one, same, other = (draw_scene(named_rng(0, "scene", i)) for i in (3, 3, 4))
    np.testing.assert_array_equal(one.canvas.pixels, same.canvas.pixels)
    assert one.canvas.pixels.shape != other.canvas.pixels.shape or (one.canvas.pixels != other.canvas.pixels).any()
    assert {draw_scene(named_rng(0, "kinds", i)).kind for i in range(200)} == {
        "shapes", "sign", "object", "cover", "arrow", "bars", "thermometers",
    }


def test_small_words():
    assert article("orange circle") == "an orange circle" and article("Science") == "a Science"
    assert len(COLOURS) == 8
    rng = named_rng(0, "zone")
    scene = scenes.shapes_scene(rng, [("red", "circle")])
    assert zone(scene, scene.elements[0]).split()[0] in ("top", "middle", "bottom")
