"""Writes safetensors files, one tensor in memory at a time; in shards with an index where there is too much for one file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from proglora_jax.checkpoints.weight_files import INDEX, WEIGHTS
from proglora_jax.checkpoints.tensors import FORMATS
from proglora_jax.data.errors import UserError

SHARD_BYTES = 5 * 10**9


class Entry(NamedTuple):
    """A tensor to be written: its name, dtype and shape now, its values when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_shards(folder: pathlib.Path, entries: Sequence[Entry], shard_bytes: int = SHARD_BYTES) -> list[pathlib.Path]:
    """Writes model.safetensors, or parts of it and their index, into a folder that holds none.

    Args:
        folder: is made if it does not exist.
        entries: the tensors; a part keeps their order.
        shard_bytes: a new file is begun before this size is passed.

    Returns:
        The weight files.

    Raises:
        UserError: "<folder>: holds a model already (<file>); choose another folder or remove it"
    """
    refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0])
        return [folder / WEIGHTS]
    files = [folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_file(file, shard)
    weight_map = {entry.name: file.name for file, shard in zip(files, shards) for entry in shard}
    fields = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return files


def write_file(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes one safetensors file under a temporary name beside it and renames it.

    Wide types come first, so that every tensor begins at a multiple of its element's size.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": FORMATS[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for entry in entries:
                array = np.ascontiguousarray(entry.read())
                if array.shape != entry.shape or array.dtype != entry.dtype:
                    raise ValueError(f"{entry.name} is {array.dtype}{array.shape}, announced as {entry.dtype}{entry.shape}")
                file.write(array.reshape(-1).view(np.uint8).data)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(folder: pathlib.Path) -> None:
    """Refuses a folder that holds a model.

    Raises:
        UserError: "<folder>: holds a model already (<file>); choose another folder or remove it"
    """
    old = sorted(path.name for path in [*folder.glob("*config.json"), folder / INDEX, *folder.glob("*.safetensors")] if path.exists())
    if old:
        raise UserError(f"{folder}: holds a model already ({old[0]}); choose another folder or remove it")
