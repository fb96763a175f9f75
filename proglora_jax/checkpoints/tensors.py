"""Tensors that lie in files: what their headers say, and their values as memory-mapped views that are read when they are touched."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from proglora_jax.checkpoints import torch_pickle
from proglora_jax.data.errors import UserError

# Spellings of safetensors' headers; formats that numpy has no type for (8-bit floats) are known by name only.
DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
FORMATS = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        path: the file.
        name: the tensor's name in it.
        format: "F32", "BF16" ..., as safetensors spells it.
        shape: its shape.
        offset: byte in the file where its first element lies.
        strides: steps between elements along each axis, in elements; () for row-major order.
    """

    path: pathlib.Path
    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * DTYPES[self.format].itemsize

    def read(self) -> np.ndarray:
        """The values as a read-only view into the file; the memory goes back when the view is dropped."""
        dtype = DTYPES[self.format]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        if not self.strides:
            return np.memmap(self.path, dtype, "r", self.offset, self.shape)
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides))
        flat = np.memmap(self.path, dtype, "r", self.offset, (reach,))
        return np.lib.stride_tricks.as_strided(flat, self.shape, [step * dtype.itemsize for step in self.strides], writeable=False)


def open_file(path: str | pathlib.Path) -> dict[str, StoredTensor]:
    """Name -> tensor, for a safetensors file or one that torch.save wrote, told apart by their first bytes; reads headers only.

    Raises:
        UserError: "<file>: is a Git LFS pointer ...", "<file>: cannot be read as safetensors (<why>); it may be truncated ...", or what
            `torch_pickle.open_tensors` says.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)")
    if torch_pickle.looks_like(start) or path.suffix in (".bin", ".pt", ".pth"):
        found = torch_pickle.open_tensors(path)
        return {name: StoredTensor(path, name, *dataclasses.astuple(place)) for name, place in found.items()}
    return _open_safetensors(path)


def _open_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(str(path), "np"):  # checks the header against the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); it may be truncated: download or write it again") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def largest(tensors: Sequence[StoredTensor]) -> int:
    """Bytes of the largest of some tensors."""
    return max((tensor.nbytes for tensor in tensors), default=0)
