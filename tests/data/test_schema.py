"""Readers of CoIN's files: variants, repairs and refusals."""

from __future__ import annotations

import json
import os

import pytest
from data_fixtures import conversation, write_json

from proglora_jax.data.errors import UserError
from proglora_jax.data.box_text import parse_box
from proglora_jax.data.schema import normalise_image_path, read_examples, read_questions


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "images")


def examples(tmp_path, root, *records):
    return read_examples(write_json(str(tmp_path / "train.json"), list(records)), "GQA", root)[0]


def questions(tmp_path, root, *records):
    return read_questions(write_json(str(tmp_path / "test.json"), list(records)), "Grounding", root)


@pytest.mark.parametrize("answer", ["[0.1, 0.2, 0.3]", "[0.1, NaN, 0.3, 0.4]", "It is at [0.1, 0.2, 30, 0.4].", "[0.1,0.2,0.3,-inf]",
                                    "0.1, nan, 0.2, 0.3", "0.1, 0.2, 0.3", "(0.1, 0.2, 0.3, 3)"])
def test_answers_that_teach_a_box_that_is_none(tmp_path, root, answer):
    path = write_json(str(tmp_path / "train.json"), [{"id": 4, "conversations": conversation(("Q1", "[0, 0, 0.5, 1]"), ("Q2", answer))}])
    (example,), left_out = read_examples(path, "GQA", root)  # of a task whose answers are no boxes
    assert example.turns[1][1] == answer and left_out == 0
    with pytest.raises(UserError, match=r"json: 1 problem\(s\): record 0 \(id 4\): answer of turn 1: box '.*' must be four numbers"):
        read_examples(path, "Grounding", root, boxes=True)
    with pytest.raises(UserError, match="config.data.on_bad_record=skip: choose one of stop, skip_and_count"):
        read_examples(path, "Grounding", root, boxes=True, on_bad="skip")


def test_words_where_a_box_is_expected_are_no_box(tmp_path, root):
    """A description, a sentence around a box, nothing: what to think of these is for check-data to say."""
    turns = conversation(("Q1", "a man, 2 dogs"), ("Q2", "It is at [0.1, 0.2, 0.3, 0.4]."), ("Q3", " "))
    path = write_json(str(tmp_path / "train.json"), [{"id": 4, "conversations": turns}])
    assert len(read_examples(path, "Grounding", root, boxes=True)[0]) == 1


@pytest.mark.parametrize(
    "name", ["./GQA/images/1.jpg", "GQA/images/1.jpg", "GQA/images/1.jpg.jpg", "././GQA/images/1.jpg", "GQA\\images\\1.jpg"]
)
def test_image_paths_are_normalised(root, name):
    assert normalise_image_path(name, root) == os.path.join(root, "GQA", "images", "1.jpg")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", ".", "a\0b.jpg"])
def test_image_paths_outside_the_root_are_refused(tmp_path, root, name):
    with pytest.raises(UserError, match=r"train.json: 1 problem\(s\): record 0 \(id 5\): image path"):
        examples(tmp_path, root, {"id": 5, "image": name, "conversations": conversation(("q", "a"))})


def test_image_aliases(root):
    path = normalise_image_path("ImageNet_withlabel/val/x.JPEG", root, {"ImageNet_withlabel": "ImageNet"})
    assert path == os.path.join(root, "ImageNet", "val", "x.JPEG")


def test_ids_and_multi_turn(tmp_path, root):
    first, second, third = examples(
        tmp_path,
        root,
        {"id": 7, "image": "a.jpg", "conversations": conversation(("<image>\nQ1", "A1"), ("Q2", "A2")), "unknown": {"x": 1}},
        {"question_id": "9", "conversations": conversation(("Q", "A"))},
        {"image": None, "conversations": conversation(("Q", "A"))},
    )
    assert (first.id, second.id, third.id) == ("7", "9", "2")
    assert first.turns == (("Q1", "A1"), ("Q2", "A2"))
    assert first.image == os.path.join(root, "a.jpg") and second.image is None and third.image is None


def test_text_without_placeholder_is_untouched(tmp_path, root):
    (example,) = examples(tmp_path, root, {"image": "a.jpg", "conversations": conversation((" Q\n", " A "))})
    assert example.turns == ((" Q\n", " A "),)


def test_first_gpt_turn_and_unanswered_last_turn_are_dropped(tmp_path, root):
    turns = [{"from": "gpt", "value": "hi"}, *conversation(("Q", "A")), {"from": "human", "value": "?"}]
    assert examples(tmp_path, root, {"conversations": turns})[0].turns == (("Q", "A"),)


def test_stray_placeholders_are_removed(tmp_path, root):
    text_only, later = examples(
        tmp_path,
        root,
        {"conversations": conversation(("<image>\nQ", "A"))},
        {"image": "a.jpg", "conversations": conversation(("Q1 <image>", "A"), ("what is <image> here", "A"))},
    )
    assert text_only.turns == (("Q", "A"),)
    assert later.turns == (("Q1", "A"), ("what is  here", "A"))


def test_damaged_records_are_collected(tmp_path, root):
    bad = [
        {"id": 1},
        {"id": 2, "conversations": []},
        {"id": 3, "conversations": [{"from": "human", "value": "Q"}]},
        {"id": 4, "conversations": [{"from": "human", "value": 3}]},
        {"id": 5, "conversations": [{"from": "human", "value": "a"}] * 2},
        {"id": 6, "image": ["a.jpg"], "conversations": conversation(("Q", "A"))},
        {"id": 7, "image": "a.jpg", "conversations": conversation(("<image><image>Q", "A"))},
        "text",
        {"id": {"x": 1}, "conversations": conversation(("Q", "A"))},
    ]
    with pytest.raises(UserError) as caught:
        examples(tmp_path, root, *bad, {"id": 8, "conversations": conversation(("Q", "A"))})
    message = str(caught.value)
    assert "train.json: 9 problem(s)" in message and "\n" not in message
    for part in ("record 0 (id 1): no 'conversations'", "2 '<image>' placeholders in the first turn", "record 7: must be a JSON object"):
        assert part in message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe[", "not UTF-8 text"),
        (b"[{", "not valid JSON"),
        (b"{}", "must hold a JSON list"),
        (b"[]", "holds no records"),
        (b"", "not valid JSON"),
        (b"[" * 100000, "JSON"),
        (b"[" + b"9" * 5000 + b"]", "not usable JSON"),
    ],
)
def test_damaged_files(tmp_path, content, sentence):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_examples(str(path), "GQA", str(tmp_path))
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(str(tmp_path / "none.json"), "GQA", str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(str(tmp_path), "GQA", str(tmp_path))


def test_byte_order_mark_and_lone_surrogates(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"conversations": conversation(("Q \ud800", "A"))}]).encode())
    (example,), _ = read_examples(str(path), "GQA", str(tmp_path))
    assert example.turns[0][0].encode("utf-8").startswith(b"Q ")


def test_questions(tmp_path, root):
    (question,) = questions(
        tmp_path,
        root,
        {"question_id": 3, "image": "a.jpg", "text": "<image>\nWhere?", "answer_bbox": "[0.41, 0.28, 0.6, 0.9]"}
        | {"size": [640, 427], "x": 1},
    )
    assert (question.id, question.text, question.answer) == ("3", "Where?", "[0.41, 0.28, 0.6, 0.9]")
    assert question.bbox == (0.41, 0.28, 0.6, 0.9) and question.size == (640, 427) and question.extra["x"] == 1
    assert question.extra["answer_bbox"] == "[0.41, 0.28, 0.6, 0.9]"


def test_question_variants(tmp_path, root):
    one, two, same = questions(tmp_path, root, {"id": "a", "text": "Q", "answer": 3}, {"text": " Q "}, {"id": "a", "text": "Q"})
    assert (one.answer, two.answer, two.id, two.text, one.image) == ("3", "", "1", " Q ", None) and same.id == "a"


BAD_BOXES = ["[0.1, nan, 0.2, 0.3]", "[0.1, 0.2, 0.3]", "[0, 0, 1, 1.5]", "", "[a, b, c, d]", [1, 2], 3, "[0,0,1,inf]"]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_bad_boxes(tmp_path, root, box):
    with pytest.raises(ValueError, match="must be four numbers between 0 and 1"):
        parse_box(box)
    with pytest.raises(UserError, match=r"test.json: 1 problem\(s\): record 0 \(id 1\): box"):
        questions(tmp_path, root, {"question_id": 1, "text": "Q", "answer_bbox": box})


def test_bad_questions(tmp_path, root):
    records = [{"text": ""}, {"text": "<image>\n"}, {"text": "Q", "answer": {"a": 1}}, {"text": "Q", "size": [0, 3]}]
    records.append({"text": "Q", "size": "x"})
    with pytest.raises(UserError, match=r"5 problem\(s\)"):
        questions(tmp_path, root, *records)
