"""What one process of a run finds on the disk, and the others do not: all take the same way, or all say why they cannot."""

from __future__ import annotations

import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.checkpoints.stage import save_checkpoint
from proglora_jax.continual import answering, phases, stages
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Phase
from proglora_jax.training import processes
from proglora_jax.training.loop import PhaseState

STAGE = stages.Stage(0, 0, "GQA", (0,), (0,), ("GQA",))


@pytest.fixture
def progress(tmp_path) -> Path:
    """A stage's progress after three steps, which began with the state "before"."""
    meta = {"step": 3, "phase": "train", "origin": "before", "loss": 1.5, "seconds": 2.0}
    trees = {"trainable": {"a": jnp.ones(2)}, "optimizer": {"m": jnp.zeros(2)}}
    save_checkpoint(tmp_path / "progress" / "train_0000003", trees, {"meta": meta, "iterator": {"next_index": 3}})
    return tmp_path / "progress"


@pytest.mark.parametrize("origin, other, kept", [("before", False, True), ("before", True, False), ("changed", False, False)])
def test_progress_is_dropped_by_all_processes_or_by_none_and_not_before_all_have_read_it(progress, monkeypatch, origin, other, kept):
    """`other` is what the other processes say: whether something speaks against it there."""
    asked = []

    def in_any_process(holds: np.ndarray) -> np.ndarray:
        assert (progress / "train_0000003").exists(), "the others may still be reading"
        asked.append(bool(holds))
        return np.asarray(holds) | other

    monkeypatch.setattr(phases, "in_any_process", in_any_process, raising=False)
    places = []
    batches = types.SimpleNamespace(set_state=places.append, get_state=lambda: {"next_index": 0})
    session = types.SimpleNamespace(chief=True, logger=types.SimpleNamespace(message=lambda text: None))
    state = PhaseState({"a": jnp.zeros(2)}, {"m": jnp.zeros(2)})
    spent = phases._resume(session, progress, (Phase(),), 0, origin, state, phases._PhaseData(batches, 9, str, {}))
    assert asked == [origin != "before"]
    assert ((progress / "train_0000003").exists(), state.step, spent, places[-1]["next_index"]) == (
        (True, 3, 2.0, 3) if kept else (False, 0, 0.0, 0))
    assert progress.with_name("progress_dropped").exists() == (not kept)


@pytest.fixture
def stored(tmp_path):
    """A method, its initial state, and the folder of a run that has trained its only stage."""
    initial = types.SimpleNamespace()
    method = types.SimpleNamespace(name="lora", from_disk=lambda tree, fresh, stage: initial)
    save_checkpoint(STAGE.folder(tmp_path) / "adapter", {"adapter": {"a": np.ones(2)}}, {"meta": {"previous": "", "digest": "abc"}})
    return method, initial, tmp_path


@pytest.mark.parametrize("chief, other, outcome", [
    ("abc", False, "done"), ("", False, "trained"), ("xyz", False, "refused"), ("abc", True, "refused"),
])  # fmt: skip
def test_a_stage_is_done_where_process_0_says_so_and_all_find_what_it_finds(stored, monkeypatch, chief, other, outcome):
    """`chief` is the hash that process 0 finds, `other` whether another process finds something else; this one finds "abc"."""
    method, initial, workdir = stored
    monkeypatch.setattr(stages, "from_chief", lambda value: chief, raising=False)
    monkeypatch.setattr(stages, "in_any_process", lambda holds: np.asarray(holds) | other, raising=False)
    load = lambda folder: stages.load_stage(STAGE, folder, method, initial, None)
    if outcome == "refused":
        with pytest.raises(UserError, match="00_gqa/adapter: not every process finds .* process 0 finds .* --workdir must be"):
            load(workdir)
        return
    found = load(workdir)
    assert (found is not None) == (outcome == "done")
    if outcome == "done":
        assert found.digest == "abc"
        with pytest.raises(UserError, match="not every process finds .*here: nothing"):
            load(workdir / "elsewhere")


def test_what_process_0_has_is_what_all_get(monkeypatch):
    """Both sides of a broadcast of two processes, one after the other."""
    sent = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(processes.jax, "process_index", lambda number=number: number)
        passed = iter(sent)
        broadcast = (lambda value: sent.append(np.asarray(value)) or value) if number == 0 else (lambda value: next(passed))
        monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
        value = {"rows": [{"index": 3, "text": "\u2028 日本 \ud800", "gates": [0.1, 1e-06]}], "whole": True, "none": None}
        for mine in (value, "", "x" * 5000):
            assert processes.from_chief(mine if number == 0 else object()) == mine
    assert {leaf.dtype for leaf in sent} == {np.dtype("int32"), np.dtype("uint8")}


def test_answers_are_read_by_process_0_alone(tmp_path, monkeypatch):
    header = {"task": "GQA", "adapter": "abc", "questions": "0f", "max_new_tokens": 5, "image_mode": "pad"}
    path = tmp_path / "answers" / "GQA.jsonl"
    partial = path.with_suffix(".partial.jsonl")
    rows = {index: {"index": index, "text": str(index)} for index in range(3)}
    answering._reopen(partial, header, {0: rows[0]}).close()
    assert answering._kept(path, partial, header, 3, chief=True) == (False, {0: rows[0]})
    monkeypatch.setattr(answering, "from_chief", lambda value: [False, [rows[0], rows[1]]])
    assert answering._kept(path, partial, header, 3, chief=False) == (False, {0: rows[0], 1: rows[1]})
    monkeypatch.undo()
    answering._reopen(partial, header, rows).close()
    assert answering._kept(path, partial, header, 3, chief=True)[0] is False, "a whole partial file is still to be put in place"
    answering._reopen(path, header, rows).close()
    assert answering._kept(path, partial, header, 3, chief=True) == (True, rows)
