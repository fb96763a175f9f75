"""Atomic writes keep the old file when they fail, JSON keeps numbers, and no byte of a manifest or a checked record changes unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from proglora_jax.checkpoints import integrity
from proglora_jax.checkpoints.integrity import (
    CheckpointDamaged,
    atomic_write_json,
    atomic_write_text,
    read_json,
    verify_manifest,
    write_manifest,
)
from proglora_jax.data.errors import UserError


def test_json_round_trip_with_numpy_values_and_paths(tmp_path):
    value = {"a": np.float32(1.5), "b": np.arange(3), "c": [None, True, "é"], "path": Path("x") / "y", "n": np.int64(2**40)}
    for checksum in (False, True):
        atomic_write_json(tmp_path / "deep" / "r.json", value, checksum=checksum)
        expected = {"a": 1.5, "b": [0, 1, 2], "c": [None, True, "é"], "path": "x/y", "n": 2**40}
        assert read_json(tmp_path / "deep" / "r.json", checksum=checksum) == expected
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]
    with pytest.raises(TypeError, match="set has no JSON form"):
        atomic_write_json(tmp_path / "x.json", {"a": {1}})


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_contents_and_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    atomic_write_text(tmp_path / "f.txt", "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(integrity.os, failing, fail)
    with pytest.raises(OSError):
        atomic_write_text(tmp_path / "f.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "f.txt").read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist\."):
        read_json(tmp_path / "none.json")
    for raw in (b'{"a": 1', b"\xff\xfe", b""):
        (tmp_path / "bad.json").write_bytes(raw)
        with pytest.raises(CheckpointDamaged, match=r"bad\.json is damaged: it is not JSON .*put back an intact copy"):
            read_json(tmp_path / "bad.json")
    for value in ({"a": 1}, [1, 2], {"a": 1, "sha256": "00"}):
        (tmp_path / "bad.json").write_text(json.dumps(value))
        with pytest.raises(CheckpointDamaged, match="do not match the checksum"):
            read_json(tmp_path / "bad.json", checksum=True)


def test_every_byte_of_a_checked_record_and_of_a_manifest_counts(tmp_path):
    atomic_write_json(tmp_path / "r.json", {"accuracy": [[0.5, None], [0.25, 0.75]]}, checksum=True)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "data").write_bytes(b"123")
    write_manifest(tmp_path / "folder")
    rng = np.random.default_rng(0)
    checks = {tmp_path / "r.json": lambda: read_json(tmp_path / "r.json", checksum=True)}
    checks[tmp_path / "folder" / "manifest.json"] = lambda: verify_manifest(tmp_path / "folder")
    for file, check in checks.items():
        whole = file.read_bytes()
        check()
        for offset in range(len(whole)):
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CheckpointDamaged):
                check()
        file.write_bytes(whole)
        check()
