"""Checkpoints come back bit for bit on any mesh, damage is always noticed, and a kill leaves the old or the new one."""

from __future__ import annotations

import collections
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proglora_jax.checkpoints import folders
from proglora_jax.checkpoints.integrity import CheckpointDamaged
from proglora_jax.checkpoints.stage import find_newest, load_checkpoint, load_records, save_checkpoint
from proglora_jax.data.errors import UserError

ROOT = Path(__file__).parents[2]


def make_tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "pool": {
            "block_00": {"q_proj": {"a": rng.standard_normal((2, 8, 4)).astype(np.float32), "b": np.zeros((2, 4, 16), np.float32)}},
            "block_01": {"q_proj": {"a": jax.numpy.asarray(rng.standard_normal((2, 8, 4)), jax.numpy.bfloat16)}},
        },
        "counts": np.arange(5, dtype=np.int64) << 40,
        "flags": np.array([True, False]),
        "key": np.array([1, 2**32 - 1], np.uint32),
        "nothing": {},
        "no_rows": np.zeros((0, 3), ml_dtypes.bfloat16),
        "step": 7,
        "rate": 2.5e-5,
        "done": False,
        "zero_d": np.float32(1.5),
    }


def assert_same_bits(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.shape(a) == np.shape(b) and np.asarray(a).dtype == np.asarray(b).dtype, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def abstract_of(tree, sharding=None):
    def leaf(x):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding) if hasattr(x, "dtype") else x

    return jax.tree.map(leaf, tree)


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One checkpoint, to be copied by the tests that damage it."""
    path = tmp_path_factory.mktemp("saved") / "01_gqa"
    return save_checkpoint(path, {"adapter": make_tree(), "memory": {}}, {"meta": {"rank": 4, "tasks": ["gqa"]}})


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "01_gqa"))


def test_round_trip_as_saved_is_bit_exact_with_types(saved):
    trees, records = load_checkpoint(saved)
    assert_same_bits(trees["adapter"], make_tree())
    assert trees["memory"] == {} and records == {"meta": {"rank": 4, "tasks": ["gqa"]}} == load_records(saved)
    assert type(trees["adapter"]["step"]) is int and type(trees["adapter"]["rate"]) is float and trees["adapter"]["done"] is False
    assert isinstance(trees["adapter"]["pool"]["block_01"]["q_proj"]["a"], np.ndarray)


def test_only_the_trees_that_are_named_are_read(saved):
    assert list(load_checkpoint(saved, ["memory"])[0]) == ["memory"]
    with pytest.raises(UserError, match=r"has no tree 'optimizer'; it has adapter, memory\."):
        load_checkpoint(saved, ["optimizer"])


def test_optimizer_state_returns_in_its_own_containers(tmp_path):
    params = {"a": jax.numpy.arange(4.0), "b": {"c": jax.numpy.ones((2, 3))}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 10)))
    state = optimizer.update(params, optimizer.init(params), params)[1]
    save_checkpoint(tmp_path / "c", {"optimizer": state}, {})
    abstract = jax.eval_shape(optimizer.init, params)
    restored = load_checkpoint(tmp_path / "c", {"optimizer": abstract})[0]["optimizer"]
    assert_same_bits(restored, state)
    assert type(restored[1][0]) is type(state[1][0])


@pytest.mark.parametrize("before, after", [(8, 1), (1, 8), (8, 4)])
def test_restores_onto_another_mesh(tmp_path, before, after):
    rng = np.random.default_rng(1)
    tree = {"w": rng.standard_normal((16, 6)).astype(np.float32), "h": rng.standard_normal((8, 4)).astype(ml_dtypes.bfloat16)}
    tree |= {"step": np.int32(3), "none": np.zeros((8, 0), np.float32)}
    shard, whole = (lambda mesh: NamedSharding(mesh, PartitionSpec("data"))), (lambda mesh: NamedSharding(mesh, PartitionSpec()))

    def place(count):
        return {k: shard(mesh_of(count)) if np.ndim(tree[k]) else whole(mesh_of(count)) for k in tree}

    save_checkpoint(tmp_path / "c", {"t": jax.device_put(tree, place(before))}, {})
    abstract = {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=place(after)[k]) for k, v in tree.items()}
    restored = load_checkpoint(tmp_path / "c", {"t": abstract})[0]["t"]
    assert all(restored[k].sharding == place(after)[k] for k in tree)
    assert_same_bits(restored, tree)
    assert_same_bits(load_checkpoint(tmp_path / "c")[0]["t"], tree)


def test_structure_shape_and_dtype_must_fit_and_the_message_says_where(saved):
    abstract = abstract_of(make_tree())
    abstract["pool"]["block_00"]["q_proj"]["a"] = jax.ShapeDtypeStruct((2, 8, 16), np.float32)
    abstract["key"] = jax.ShapeDtypeStruct((2,), np.int32)
    abstract["extra"] = abstract.pop("flags")
    with pytest.raises(UserError) as error:
        load_checkpoint(saved, {"adapter": abstract})
    message = str(error.value)
    assert f"checkpoint {saved}, tree 'adapter' does not fit: 4 problem(s)" in message and "\n" not in message
    assert "pool/block_00/q_proj/a is float32[2, 8, 4] in the checkpoint, expected float32[2, 8, 16]" in message
    assert "key is uint32[2] in the checkpoint, expected int32[2]" in message
    assert "extra is not in the checkpoint" in message and "flags is in the checkpoint but not expected" in message


@pytest.mark.parametrize(
    "trees, records",
    [({"a/b": {}}, {}), ({}, {"manifest": 1}), ({}, {"trees": 1}), ({"t": {"a.b": np.ones(1)}}, {}), ({"t": {"a": "text"}}, {}),
     ({"t": np.ones(2)}, {}), ({"t": {"k": jax.random.key(0)}}, {})],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, trees, records):
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "c", trees, records)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_anywhere_is_noticed(copy):
    rng = np.random.default_rng(0)
    files = [p for p in sorted(copy.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 8
    for file in files:
        whole = file.read_bytes()
        for offset in {0, len(whole) - 1, *rng.integers(0, len(whole), 12).tolist()}:
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CheckpointDamaged):
                load_checkpoint(copy)
        file.write_bytes(whole)
    load_checkpoint(copy)


def test_every_truncated_removed_or_added_file_is_named(copy):
    for file in [p for p in sorted(copy.rglob("*")) if p.is_file()]:
        name, whole = file.relative_to(copy).as_posix(), file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if whole else b"x")
        with pytest.raises(CheckpointDamaged) as error:
            load_checkpoint(copy)
        assert error.value.file == name and name in str(error.value) and str(copy) in str(error.value)
        file.unlink()
        with pytest.raises(CheckpointDamaged, match="is missing") as error:
            load_checkpoint(copy)
        assert error.value.file == name
        file.write_bytes(whole)
    (copy / "adapter" / "d" / "more").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="is not in the manifest"):
        load_checkpoint(copy)
    with pytest.raises(CheckpointDamaged, match="the folder does not exist"):
        load_checkpoint(copy / "nowhere")


def test_find_newest_falls_back_and_says_why(tmp_path):
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path / f"step_{step}", {"t": {"step": step}}, {})
    (tmp_path / "step_12").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "step_11" / "trees.json").unlink()
    with open(tmp_path / "step_10" / "trees.json", "ab") as file:
        file.write(b" ")
    newest, skipped = find_newest(tmp_path, "step_*")
    assert newest == tmp_path / "step_9" and load_checkpoint(newest)[0]["t"]["step"] == 9
    assert [path.name for path, _ in skipped] == ["step_12", "step_11", "step_10"]
    assert [why.split(" ", 1)[0] for _, why in skipped] == ["manifest.json", "trees.json", "trees.json"]
    assert find_newest(tmp_path / "none") == (None, [])


def test_leftovers_are_ignored_and_cleaned(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "02_vqa.tmp-0123abcd")
    shutil.copytree(saved, tmp_path / "01_gqa.old-0123abcd")
    assert load_checkpoint(tmp_path / "01_gqa")[1]["meta"]["rank"] == 4
    assert find_newest(tmp_path, clean=False) == (tmp_path / "01_gqa", [])
    assert len(list(tmp_path.iterdir())) == 2
    assert find_newest(tmp_path) == (tmp_path / "01_gqa", [])
    assert [p.name for p in tmp_path.iterdir()] == ["01_gqa"]


def test_a_crash_before_any_file_system_step_leaves_one_whole_checkpoint(tmp_path, monkeypatch):
    """Replaces a checkpoint, stopping dead before each rename, removal and folder sync in turn."""
    path, calls = tmp_path / "c", collections.Counter()
    save_checkpoint(path, {"t": {"n": 0}}, {})

    class Dead(BaseException):
        pass

    def crash_at(target, original):
        def step(*args, **keywords):
            calls["all"] += 1
            if calls["all"] >= target:  # a killed process does nothing more, not even cleaning up
                raise Dead
            return original(*args, **keywords)

        return step

    seen = set()
    for target in range(1, 40):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(folders.os, "rename", crash_at(target, os.rename))
            patch.setattr(folders.os, "replace", crash_at(target, os.replace))
            patch.setattr(folders.shutil, "rmtree", crash_at(target, shutil.rmtree))
            try:
                save_checkpoint(path, {"t": {"n": target}}, {})
                finished = True
            except Dead:
                finished = False
        number = load_checkpoint(path)[0]["t"]["n"]
        assert number in (target, target - 1 if target > 1 else 0), f"crash at step {target} left {number}"
        assert find_newest(tmp_path, "c")[0] == path and load_checkpoint(path)[0]["t"]["n"] == number
        seen.add(number == target)
        if finished:
            break
        save_checkpoint(path, {"t": {"n": target}}, {})
    assert finished and seen == {True, False}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


KILLED = """
import sys, itertools, numpy as np
from proglora_jax.checkpoints.stage import save_checkpoint
print("ready", flush=True)
for n in itertools.count(1):
    save_checkpoint(sys.argv[1], {"t": {str(i): np.full(20000, n, np.int32) for i in range(8)}}, {"meta": {"n": n}})
    print(n, flush=True)
"""


@pytest.mark.parametrize("delay", [0.01, 0.13, 0.37])
def test_sigkill_during_saves_leaves_a_whole_checkpoint(tmp_path, delay):
    path = tmp_path / "c"
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert worker.stdout.readline() == "ready\n"
        finished = int(worker.stdout.readline())
        time.sleep(delay)
    finally:
        worker.send_signal(signal.SIGKILL)
        finished = max([finished, *map(int, worker.stdout.read().split())])
        worker.wait()
    for _ in range(2):  # before and after the cleaning
        trees, records = load_checkpoint(path)
        assert records["meta"]["n"] in (finished, finished + 1)
        assert all((leaf == records["meta"]["n"]).all() for leaf in trees["t"].values())
        assert find_newest(tmp_path, "c") == (path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_system_error_is_one_sentence_and_keeps_the_old_one(copy, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"could not be written: No space left on device\. What was there before is untouched\."):
        save_checkpoint(copy, {"t": {"n": 1}}, {})
    monkeypatch.undo()
    assert load_checkpoint(copy)[1]["meta"]["rank"] == 4 and len(list(copy.parent.iterdir())) == 1


def test_saves_are_quiet(tmp_path, caplog, capfd):
    rng = np.random.default_rng(0)
    tree = {f"leaf_{i:02}": {"a": jax.numpy.asarray(rng.standard_normal(8192).astype(np.float32))} for i in range(30)}
    caplog.set_level(logging.INFO, "absl")
    save_checkpoint(tmp_path / "c", {"adapter": tree}, {"meta": {}})
    load_checkpoint(tmp_path / "c", {"adapter": tree})
    assert caplog.records == [] and capfd.readouterr() == ("", "")


PROCESSES = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from proglora_jax.checkpoints.stage import find_newest, load_checkpoint, save_checkpoint
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
tree = {"w": jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i]), "local": np.arange(3), "step": 5}
for n in range(2):
    save_checkpoint(sys.argv[1] + "/c", {"t": tree}, {"meta": {"n": n}})
path, skipped = find_newest(sys.argv[1])
abstract = dict(tree, w=jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding))
trees, records = load_checkpoint(path, {"t": abstract})
assert records["meta"]["n"] == 1 and trees["t"]["step"] == 5 and (trees["t"]["local"] == np.arange(3)).all()
for shard in trees["t"]["w"].addressable_shards:
    assert (np.asarray(shard.data) == whole[shard.index]).all()
"""


def test_two_processes_save_and_load_together(tmp_path, unused_port):
    environment = {**os.environ, "XLA_FLAGS": tiny_run.xla_flags(2), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESSES, str(tmp_path), f"127.0.0.1:{unused_port}"]
    workers = [subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    trees, _ = load_checkpoint(tmp_path / "c")
    np.testing.assert_array_equal(trees["t"]["w"], np.arange(32).reshape(8, 4))


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
