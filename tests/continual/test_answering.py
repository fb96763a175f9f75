"""Answers on the disk: what is written comes back, what is torn or changed or of another adapter does not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from proglora_jax.checkpoints.integrity import atomic_write_json, sha256_of_file
from proglora_jax.continual import answering
from proglora_jax.continual.answering import _line, _reopen, finished_scores, read_answers
from proglora_jax.data.errors import UserError
from proglora_jax.data.padding import Padding
from proglora_jax.training.loop import Stopped

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


class Later:
    """Results of the device: reading them is noted."""

    def __init__(self, value, note):
        self.value, self.note = value, note

    def __array__(self, *_, **__):
        self.note()
        return np.asarray(self.value)


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function that asks ten questions, two at a time: (what happened, in order; what ended it; the answers; their partial file)."""

    def asked(broken: int = -1, stop_at: int = -1):
        happened, stop, path = [], SimpleNamespace(requested=False), tmp_path / f"{broken}" / "GQA.jsonl"

        def prepare(start, threads):
            for number in range(start, 5):
                if number == broken:
                    raise UserError("GQA question 7: a.jpg: no such image")
                yield {"tokens": np.zeros((2, 3)), "example": np.arange(2 * number, 2 * number + 2)}

        def generate(params, memory, llava, batch, stage):
            number = int(batch["example"][0]) // 2

            def read():
                happened.append(f"answers of {number}")
                stop.requested |= number == stop_at

            happened.append(f"batch {number}")
            known = {"example": batch["example"], "valid": np.ones(2, bool), "count": np.ones(2, int), "tokens": np.full((2, 1), number),
                     "hit_cap": np.zeros(2, bool), "gates": np.ones((2, 1))}
            return known | {"valid": Later(known["valid"], read)}

        class Five(list):
            batches, members, padding = staticmethod(prepare), staticmethod(lambda n: [2 * n, 2 * n + 1]), staticmethod(Padding)

        monkeypatch.setattr(answering, "eval_batches", lambda *_, **__: Five(range(5)))
        monkeypatch.setattr(answering.meshes, "put_batch", lambda batch, mesh: batch)
        session = SimpleNamespace(
            settings=SimpleNamespace(evaluate=SimpleNamespace(batch_size=2, prompt_lengths=(), share_prefix="off", first_new_tokens=0),
                                     data=SimpleNamespace(threads=0)),
            eval_loader=lambda mode: SimpleNamespace(bad=set(), cut=set(), on_bad="raise"),
            chief=True, mesh=None, llava=None, stop=stop, share=(0, 1),
            encoder=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda tokens: f" word{tokens[0]}")),
            method=SimpleNamespace(fixed_at_test=True), generator=lambda new_tokens, by_image: generate,
        )  # fmt: skip
        questions, end = [SimpleNamespace(id=f"q{n}", text=f"What is {n}?", image=None) for n in range(10)], None
        try:
            answering._answers(session, SimpleNamespace(params=0, memory=0, stage=0), dict(HEADER), 0, questions, path)
        except (UserError, Stopped) as error:
            end = error
        partial = path.with_suffix(".partial.jsonl")
        return happened, end, read_answers(partial if end else path), partial

    return asked


def test_a_batch_is_computed_while_the_answers_of_the_one_before_are_written(ask):
    happened, end, entries, partial = ask()
    assert happened == ["batch 0", "batch 1", "answers of 0", "batch 2", "answers of 1", "batch 3", "answers of 2", "batch 4",
                        "answers of 3", "answers of 4"]
    assert end is None and not partial.exists() and [entries[n]["text"] for n in range(10)] == [f"word{n // 2}" for n in range(10)]
    assert [(row["index"], row["question_id"], row["prompt"]) for row in entries.values()] == [
        (n, f"q{n}", f"What is {n}?") for n in range(10)]


def test_what_is_computed_is_kept_where_an_image_cannot_be_read_and_where_the_run_is_stopped(ask):
    _, end, entries, _ = ask(broken=3)
    assert "no such image" in str(end) and sorted(entries) == list(range(6))
    happened, end, entries, _ = ask(broken=9, stop_at=1)
    assert "stopped while evaluating GQA after 6 of 10 questions; the answers are kept" in str(end) and sorted(entries) == list(range(6))
    assert happened[-2:] == ["answers of 1", "answers of 2"], "nothing is begun after the signal"


class Asked:
    """Batches of questions, in order; the last one is filled up."""

    def __init__(self, questions, encoder, loader, *, batch_size, **_):
        self.questions, self.size = questions, batch_size

    def __len__(self):
        return -(-len(self.questions) // self.size)

    def members(self, n):
        return list(range(len(self.questions)))[n * self.size : (n + 1) * self.size]

    def batches(self, start, threads):
        for n in range(start, len(self)):
            numbers = np.resize(self.members(n), self.size)
            yield {"tokens": np.zeros((self.size, 3)), "example": numbers, "valid": np.arange(self.size) < len(self.members(n)),
                   "asked": [self.questions[number].id for number in numbers]}

    def padding(self):
        return None


@pytest.mark.parametrize("stop_at", [None, *range(4)])
def test_only_longer_answers_are_asked_for_again_whenever_that_is_interrupted(tmp_path, monkeypatch, stop_at):
    """Answers of 0 to 9 tokens to ten questions, with room for five at first: a numbers-only stand-in for the device."""
    stop, path, calls = SimpleNamespace(requested=False), tmp_path / "GQA.jsonl", []

    def generator(tokens, by_image):
        def generate(params, memory, llava, batch, stage):
            calls.append((tokens, [int(name) for name, valid in zip(batch["asked"], batch["valid"]) if valid]))
            stop.requested |= len(calls) - 1 == stop_at
            length = np.asarray([int(name) for name in batch["asked"]])
            return {"example": batch["example"], "valid": batch["valid"], "count": np.minimum(length, tokens), "hit_cap": length >= tokens,
                    "tokens": np.broadcast_to(np.arange(tokens), (len(length), tokens)), "gates": np.ones((len(length), 1))}

        return generate

    monkeypatch.setattr(answering, "eval_batches", Asked)
    monkeypatch.setattr(answering.meshes, "put_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(answering.meshes, "batch_ways", lambda mesh: 1)
    session = SimpleNamespace(
        settings=SimpleNamespace(evaluate=SimpleNamespace(batch_size=8, prompt_lengths=(), share_prefix="off", first_new_tokens=5),
                                 data=SimpleNamespace(threads=0)),
        eval_loader=lambda mode: SimpleNamespace(bad=set(), cut=set(), on_bad="raise"), chief=True, mesh=None, llava=None, stop=stop,
        share=(0, 1), encoder=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))),
        method=SimpleNamespace(fixed_at_test=True), generator=generator,
    )  # fmt: skip
    questions = [SimpleNamespace(id=f"{n}", text="", image=None) for n in range(10)]
    state, header = SimpleNamespace(params=0, memory=0, stage=0), HEADER | {"max_new_tokens": 8}
    ask = lambda: answering._answers(session, state, header, 0, questions, path)
    if stop_at is not None:  # in one of four batches
        with pytest.raises(Stopped):
            ask()
        stop.requested = False
    entries, _ = ask()
    assert calls[:2] == [(5, [0, 1, 2, 3, 4, 5, 6, 7]), (5, [8, 9])][: len(calls)]
    again = [numbers for tokens, numbers in calls if tokens == 8]
    assert [list(one) for one in dict.fromkeys(map(tuple, again))] == [[5, 6, 7, 8], [9]]
    assert {n: (row["text"], row["hit_cap"]) for n, row in entries.items()} == {
        n: (" ".join(map(str, range(min(n, 8)))), n >= 8) for n in range(10)}
    kept = read_answers(path)
    assert list(kept) == list(range(10)) and not any("again" in row for row in kept.values())
    assert not path.with_suffix(".partial.jsonl").exists()
