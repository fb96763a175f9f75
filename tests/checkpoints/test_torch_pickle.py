"""Files of torch.save: every tensor comes back as torch sees it, and a pickle that wants more is refused before anything runs."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from proglora_jax.checkpoints.tensors import FLOATS, open_file
from proglora_jax.data.errors import UserError


def pack(path, program: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED, order: bytes = b"little"):
    """An archive as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", order)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def tensors(rng) -> dict[str, torch.Tensor]:
    """Every float format, and every way in which a tensor can share or skip the data of another."""
    base = torch.tensor(rng.standard_normal((5, 7)), dtype=torch.float32)
    return {
        "plain": base, "transposed": base.t(), "window": base[1:3, 2:], "half": base.half(), "brain": base.bfloat16(),
        "double": base.double(), "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "parameter": torch.nn.Parameter(base),
        "expanded": base[:1].expand(4, 7),
        "whole": torch.arange(3), "bytes": torch.arange(3, dtype=torch.uint8), "patches": base[:4, :6].reshape(2, 2, 2, 3),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch(tmp_path, rng, protocol):
    saved = tensors(rng)
    torch.save(saved, tmp_path / "x.bin", pickle_protocol=protocol)
    found = open_file(tmp_path / "x.bin")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        ours = found[name].read()
        assert ours.shape == tuple(tensor.shape) and not ours.flags.writeable or ours.size == 0
        theirs = tensor.detach().float() if found[name].format in FLOATS else tensor
        np.testing.assert_array_equal(ours.astype(np.float32) if found[name].format in FLOATS else ours, theirs.numpy(), err_msg=name)
    assert [found[name].format for name in ("half", "brain", "double", "whole")] == ["F16", "BF16", "F64", "I64"]


def test_state_dicts_and_shared_storages(tmp_path):
    module = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    state = module.state_dict()
    assert isinstance(state, OrderedDict) and state._metadata  # an attribute that the pickle sets
    state["again"] = state["weight"]
    torch.save(state, tmp_path / "x.bin")
    found = open_file(tmp_path / "x.bin")
    assert found["again"].offset == found["weight"].offset
    np.testing.assert_array_equal(found["weight"].read().astype(np.float32), module.weight.detach().float().numpy())


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, protocol):
    flag = tmp_path / "ran"
    program = pickle.dumps({"weight": Evil(flag)}, protocol=protocol)
    refused = r"x.bin: its pickle (asks for (posix|nt).system|uses the instruction DICT), .* nothing of it was run"
    with pytest.raises(UserError, match=refused):
        open_file(pack(tmp_path / "x.bin", program))
    assert not flag.exists()
    pickle.loads(program)  # the flag is what the pickle would have made
    assert flag.exists()


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
        (torch.zeros(2).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
        (np.zeros(2), "asks for numpy"),
        ([torch.zeros(2)], "holds a list where a table of tensors should be"),
        ({"model": {"weight": torch.zeros(2)}}, "the entry 'model' of its table is a dict, not a tensor"),
        ({"weight": {1, 2}}, "asks for builtins.set|asks for __builtin__.set"),
        ({3: torch.zeros(2)}, "the entry 3 of its table is a tensor"),
    ],
)
def test_what_is_no_table_of_tensors_is_named(tmp_path, value, refused):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(UserError, match=refused):
        open_file(tmp_path / "x.bin")


def rebuilt(offset: str = "K\x00", shape: str = "K\x02\x85", strides: str = "K\x01\x85", count: str = "K\x02") -> bytes:
    """A pickle of one float tensor, its numbers given as instructions."""
    storage = f"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu{count}tQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{offset}{shape}{strides}\x89}}tR"
    return f"\x80\x02}}X\x01\x00\x00\x00w{tensor}s.".encode("latin-1")


def test_tensors_that_reach_beyond_their_data(tmp_path):
    data = {"0": np.array([1, 2], np.float32).tobytes()}
    good = open_file(pack(tmp_path / "good.bin", rebuilt(), data))
    np.testing.assert_array_equal(good["w"].read(), [1, 2])
    for name, change in {
        "offset": {"offset": "K\x01"}, "shape": {"shape": "K\x03\x85"}, "strides": {"strides": "K\x02\x85"}, "count": {"count": "K\x03"},
    }.items():  # fmt: skip
        with pytest.raises(UserError, match="reaches beyond its data|is shorter than its table says"):
            open_file(pack(tmp_path / f"{name}.bin", rebuilt(**change), data))
    wrong = {"negative": {"offset": "J\xff\xff\xff\xff"}, "back": {"strides": "J\xff\xff\xff\xff\x85"}, "rank": {"shape": ")"}}
    for name, change in wrong.items():
        with pytest.raises(UserError, match="its pickle is damaged .a tensor's shape, strides or offset are no whole numbers."):
            open_file(pack(tmp_path / f"{name}.bin", rebuilt(**change), data))


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (b"\x80\x02}", "its pickle is damaged"),
        (b"\x80\x02.", "its pickle is damaged"),
        (b"", "its pickle is damaged"),
        (b"\x80\x02}h\x07.", "its pickle is damaged"),
        (b"\x80\x02}ccollections\nOrderedDict\n.", "holds a global where"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "its pickle is damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "its pickle calls torch.FloatStorage, which"),
        (b"\x80\x02cos\nsystem\n(S'x'\no.", "asks for os.system"),
        (b"(S'x'\nios\nsystem\n.", "uses the instruction INST"),
        (b"\x80\x02\x82\x01.", "uses the instruction EXT1"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "asks for posix.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the instruction NEWOBJ"),
    ],
)
def test_programs_that_torch_does_not_write(tmp_path, program, sentence):
    with pytest.raises(UserError, match=sentence):
        open_file(pack(tmp_path / "x.bin", program))


def test_damaged_archives_give_one_sentence(tmp_path, rng):
    torch.save(tensors(rng), tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut.bin: cannot be read as a file of torch.save .*may be truncated") as raised:
            open_file(tmp_path / "cut.bin")
        assert "\n" not in str(raised.value)
    flipped = bytearray(whole)
    flipped[whole.index(b"storage")] ^= 1
    (tmp_path / "flipped.bin").write_bytes(flipped)
    with pytest.raises(UserError, match="cannot be read as a file of torch.save .Bad CRC-32"):
        open_file(tmp_path / "flipped.bin")
    with pytest.raises(UserError, match="nowhere.bin: cannot be read .No such file"):
        open_file(tmp_path / "nowhere.bin")
    torch.save(tensors(rng), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="in the format that torch.save had before version 1.6"):
        open_file(tmp_path / "old.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("photo.txt", "x")
    with pytest.raises(UserError, match="without the one data.pkl"):
        open_file(tmp_path / "other.bin")
    data = {"0": bytes(8)}
    with pytest.raises(UserError, match="archive/data/0 is compressed or encrypted"):
        open_file(pack(tmp_path / "deflated.bin", rebuilt(), data, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="its pickle is damaged .*data/0"):
        open_file(pack(tmp_path / "without.bin", rebuilt()))
    with pytest.raises(UserError, match="its entry byteorder has 67,108,864 bytes; that is no checkpoint"):
        open_file(pack(tmp_path / "bomb.bin", rebuilt(), data, zipfile.ZIP_DEFLATED, order=bytes(64 << 20)))


def test_any_flipped_byte_of_the_pickle_is_an_error_of_the_users(tmp_path, rng):
    """With a matching checksum around it, so that the interpreter itself sees the damage: it ends in a sentence or in tensors."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        program = bytearray(next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")))
    sentences = 0
    for at in range(len(program)):
        for flip in (1, 8, 0x55):
            changed = bytearray(program)
            changed[at] ^= flip
            try:
                for tensor in open_file(pack(tmp_path / "y.bin", bytes(changed), {"0": bytes(8)})).values():
                    tensor.read()
            except UserError as error:
                sentences += 1
                assert re.match(r".*y\.bin: ", str(error))
    assert sentences > len(program)
