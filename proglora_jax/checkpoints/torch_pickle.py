"""Finds the tensors in a file that torch.save wrote, without torch and without running the pickle in it.

Such a file is a zip archive of uncompressed entries: `<folder>/data.pkl` says which tensors there are, and `<folder>/data/<key>` hold their
bytes. A pickle is a program; here its instructions are interpreted one by one by a machine that knows dicts, lists, tuples, numbers, texts,
and the two calls that rebuild a tensor. It has no way to import or to call anything: whatever else a pickle asks for is named and refused.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from proglora_jax.data.errors import UserError

_ZIP = b"PK\x03\x04"
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before it turned to zip
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LARGEST_PICKLE = 256 << 20
# "little" or "big".
_LONGEST_ORDER = 16
_STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
_GLOBALS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
_GLOBALS |= {f"torch.{name}" for name in _STORAGES}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file.

    Attributes:
        format: "F32", "BF16" ..., as safetensors spells it.
        shape: its shape.
        offset: byte in the file where its first element lies.
        strides: steps between elements along each axis, in elements; () for row-major order.
    """

    format: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def looks_like(start: bytes) -> bool:
    """Whether a file that begins so was written by torch.save."""
    return start.startswith((_ZIP, _OLD))


def open_tensors(path: pathlib.Path) -> dict[str, Place]:
    """Name -> place, for a file that holds a table of tensors; reads the table only.

    Raises:
        UserError: "<file>: cannot be read as a file of torch.save (<why>); it may be truncated ...", "<file>: its pickle asks for
            <module.name>, which a table of tensors does not need; ...", "<file>: the tensor <name> reaches beyond its data; ..."
    """
    with path.open("rb") as file:
        if file.read(len(_OLD)) == _OLD:
            raise UserError(f"{path}: is in the format that torch.save had before version 1.6; load it with torch and save it again")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return _Reader(path, archive, file).tensors()
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        why = f"cannot be read as a file of torch.save ({error})"
        raise UserError(f"{path}: {why}; it may be truncated: download or write it again") from error


class _Storage(NamedTuple):
    format: str
    size: int
    offset: int
    count: int


class _Global(str):
    """The name of something that a pickle asked for; only a name."""


class _Mark:
    """What the instruction MARK leaves on the stack."""


class _Reader:
    """One archive: interprets its pickle and looks up where storages lie."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile, file: Any):
        self.path, self.archive, self.file = path, archive, file
        tables = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise UserError(f"{path}: is a zip archive without the one data.pkl that torch.save writes; give a file of torch.save")
        self.table, self.folder = tables[0], tables[0].removesuffix("data.pkl")
        order = f"{self.folder}byteorder"
        if order in archive.namelist() and archive.getinfo(order).file_size > _LONGEST_ORDER:
            raise UserError(f"{path}: its entry byteorder has {archive.getinfo(order).file_size:,} bytes; that is no checkpoint")
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError(f"{path}: was written on a big-endian machine; load it with torch and save it again on a common one")
        self.storages: dict[str, _Storage] = {}

    def tensors(self) -> dict[str, Place]:
        """The table."""
        if self.archive.getinfo(self.table).file_size > _LARGEST_PICKLE:
            raise UserError(f"{self.path}: its table of tensors is larger than {_LARGEST_PICKLE >> 20} MiB; that is no checkpoint")
        try:
            found = self._interpret(self.archive.read(self.table))
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path}: its pickle is damaged ({error}); download or write it again") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: holds {_kind(found)} where a table of tensors should be; give a state dict")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Place):
                raise UserError(f"{self.path}: the entry {name!r} of its table is {_kind(value)}, not a tensor; give a flat state dict")
        return found

    # ---- the machine

    def _interpret(self, program: bytes) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                stack.append(argument)
            elif name in _TUPLES:
                count = _TUPLES[name]
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument)] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif name == "GLOBAL":
                stack.append(self._named(argument.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(self._named(f"{module}.{last}"))
            elif name == "STOP":
                return stack.pop()
            elif name in _ACTIONS:
                _ACTIONS[name](self, stack)
            elif name not in ("PROTO", "FRAME"):
                raise UserError(f"{self.path}: its pickle uses the instruction {name}, which a table of tensors does not need; {_REFUSED}")
        raise ValueError("it has no end")

    def _named(self, name: str) -> _Global:
        if name not in _GLOBALS:
            raise UserError(f"{self.path}: its pickle asks for {name}, which a table of tensors does not need; {_REFUSED}")
        return _Global(name)

    def _tuple(self, stack: list[Any]) -> None:
        stack.append(tuple(_since_mark(stack)))

    def _append(self, stack: list[Any]) -> None:
        item = stack.pop()
        _expect(stack[-1], list).append(item)

    def _appends(self, stack: list[Any]) -> None:
        items = _since_mark(stack)
        _expect(stack[-1], list).extend(items)

    def _set(self, stack: list[Any]) -> None:
        value, key = stack.pop(), stack.pop()
        _expect(stack[-1], dict)[_expect(key, (str, int))] = value

    def _sets(self, stack: list[Any]) -> None:
        items = _since_mark(stack)
        table = _expect(stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[_expect(key, (str, int))] = value

    def _build(self, stack: list[Any]) -> None:
        """Attributes of an object: a state dict has one with its versions, which nothing needs."""
        stack.pop()
        _expect(stack[-1], dict)

    def _call(self, stack: list[Any]) -> None:
        arguments, called = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
        if called == "collections.OrderedDict":
            stack.append(dict(*arguments))
        elif called == "torch._utils._rebuild_tensor_v2":
            stack.append(self._tensor(*arguments[:4]))
        elif called == "torch._utils._rebuild_parameter":
            stack.append(_expect(arguments[0], Place))
        else:
            raise UserError(f"{self.path}: its pickle calls {called}, which a table of tensors does not need; {_REFUSED}")

    # ---- tensors

    def _storage(self, stack: list[Any]) -> None:
        kind, type_, key, _, count = _expect(stack.pop(), tuple)
        format_, size = _STORAGES[_expect(type_, _Global).removeprefix("torch.")]
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage is not described as torch describes it")
        if key not in self.storages:
            offset, length = self._entry(f"{self.folder}data/{key}")
            self.storages[key] = _Storage(format_, size, offset, length // size)
        if self.storages[key].format != format_ or self.storages[key].count < count:
            raise UserError(f"{self.path}: the data {key} is shorter than its table says; download or write the file again")
        stack.append(self.storages[key])

    def _entry(self, name: str) -> tuple[int, int]:
        """(first byte in the file, number of bytes) of an uncompressed entry of the archive."""
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(f"{self.path}: its entry {name} is compressed or encrypted, unlike torch.save's own; save it with torch again")
        self.file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        if header[0] != _ZIP or start + info.file_size > self.path.stat().st_size:
            raise zipfile.BadZipFile(f"the entry {name} lies outside of the file")
        return start, info.file_size

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Place:
        storage, shape, strides = _expect(storage, _Storage), _expect(shape, tuple), _expect(strides, tuple)
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a tensor's shape, strides or offset are no whole numbers")
        if 0 not in shape and offset + sum((size - 1) * step for size, step in zip(shape, strides)) >= storage.count:
            raise UserError(f"{self.path}: a tensor of shape {list(shape)} reaches beyond its data; download or write the file again")
        return Place(storage.format, shape, storage.offset + offset * storage.size, () if strides == _row_major(shape) else strides)


_REFUSED = "nothing of it was run. If you trust the file, load it with torch and save its tensors as safetensors"
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "MARK": _Mark,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE",
    "BINSTRING", "SHORT_BINSTRING", "STRING",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS = {
    "TUPLE": _Reader._tuple, "APPEND": _Reader._append, "APPENDS": _Reader._appends, "SETITEM": _Reader._set, "SETITEMS": _Reader._sets,
    "BUILD": _Reader._build, "REDUCE": _Reader._call, "BINPERSID": _Reader._storage,
}  # fmt: skip


def _since_mark(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark, and the mark, off the stack."""
    at = max(index for index, item in enumerate(stack) if isinstance(item, _Mark))
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{_kind(value)} where something else belongs")
    return value


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Place) else f"a {type(value).__name__.lstrip('_').lower()}"


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
