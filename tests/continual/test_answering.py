"""Answers on the disk: what is written comes back, what is torn or changed or of another adapter does not."""

from __future__ import annotations

import json

import pytest

from proglora_jax.checkpoints.integrity import atomic_write_json, sha256_of_file
from proglora_jax.continual.answering import _line, _reopen, finished_scores, read_answers

HEADER = {"task": "GQA", "adapter": "abc", "questions": "0f", "max_new_tokens": 5, "image_mode": "pad", "batch_size": 2}
ASKED = {"task": "GQA", "adapter": "abc", "questions": "0f", "max_new_tokens": 5, "image_mode": "pad", "references": "1a"}
ROWS = {
    0: {"index": 0, "text": "plain", "gates": [0.5, 0.25]},
    3: {"index": 3, "text": "line\u2028separators \x85 and \n breaks", "gates": []},
    1: {"index": 1, "text": "日本 \U0001f600 \\ \"", "gates": [1e-6]},
}


@pytest.fixture
def path(tmp_path):
    """A partial file with three answers."""
    _reopen(tmp_path / "answers" / "GQA.partial.jsonl", HEADER, ROWS).close()
    return tmp_path / "answers" / "GQA.partial.jsonl"


def test_answers_come_back_whatever_is_in_them(path):
    assert read_answers(path, HEADER) == ROWS
    with _reopen(path, HEADER, {0: ROWS[0]}) as file:
        file.write(_line(ROWS[3]))
    assert read_answers(path, HEADER) == {0: ROWS[0], 3: ROWS[3]}


def test_a_torn_line_is_left_out_wherever_it_is_torn(path):
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert set(read_answers(path, HEADER)) == {0, 3}
    path.write_bytes(whole[:-1])
    assert read_answers(path, HEADER) == ROWS


def test_any_flipped_bit_costs_the_lines_it_touches_and_changes_no_answer(path):
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        got = read_answers(path, HEADER)
        assert all(ROWS[index] == row for index, row in got.items()) and len(got) >= 1 - (position < whole.index(b"\n") + 1)


def test_answers_under_another_header_are_not_trusted(path):
    for field in ("task", "adapter", "questions", "max_new_tokens", "image_mode"):
        assert read_answers(path, HEADER | {field: "other"}) == {}
    assert read_answers(path, HEADER | {"batch_size": 7}) == ROWS  # answers do not depend on it
    assert read_answers(path.with_name("nothing.jsonl"), HEADER) == {}
    assert read_answers(path) == ROWS


def test_scores_are_finished_only_with_the_answers_questions_references_and_adapter_they_came_from(path, tmp_path):
    scores = tmp_path / "scores" / "GQA.json"
    assert finished_scores(scores, path, ASKED) is None
    record = {"asked": ASKED, "answers_sha256": sha256_of_file(path), "accuracy": {"coin": 50.0}}
    atomic_write_json(scores, record, checksum=True)
    assert finished_scores(scores, path, ASKED)["accuracy"] == {"coin": 50.0}
    for field in ASKED:
        assert finished_scores(scores, path, ASKED | {field: "other"}) is None
    content = json.loads(scores.read_text())
    path.write_text(path.read_text() + "\n")
    assert finished_scores(scores, path, ASKED) is None
    path.unlink()
    assert finished_scores(scores, path, ASKED) is None
    scores.write_text(json.dumps(content | {"accuracy": {"coin": 60.0}}))
    assert finished_scores(scores, path, ASKED) is None
