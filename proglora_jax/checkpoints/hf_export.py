"""Writes a LLaVA as a Hugging Face folder (config.json and safetensors) that transformers 4.x and 5.x load."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from proglora_jax.checkpoints.hf_import import CONFIG, INDEX, WEIGHTS
from proglora_jax.checkpoints.names import Row, llava_rows
from proglora_jax.data.errors import UserError
from proglora_jax.models.llava import Llava

SHARD_BYTES = 5 * 10**9


def save_llava(llava: Llava, folder: str | pathlib.Path, *, shard_bytes: int = SHARD_BYTES) -> list[pathlib.Path]:
    """Writes config.json and the weights, in one file or in shards with an index, in the dtypes that the parameters have.

    The names are those of LLaVA folders on the hub (`language_model.model.*`, `vision_tower.vision_model.*`), which every version of
    transformers reads. Layers of the vision tower that the feature layer does not need are written too.

    Args:
        llava: the model.
        folder: where to write; is made if it does not exist.
        shard_bytes: a new file is begun before this size is passed; also bounds the memory that the export takes.

    Returns:
        The weight files.

    Raises:
        UserError: "<folder>: holds a model already (<file>); choose another folder or remove it"
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(path.name for path in [folder / CONFIG, folder / INDEX, *folder.glob("*.safetensors")] if path.exists())
    if old:
        raise UserError(f"{folder}: holds a model already ({old[0]}); choose another folder or remove it")
    shards, total = _write_shards(llava, folder, shard_bytes)
    files = _name_shards(folder, shards, total)
    dtype = llava.language.embed_tokens[...].dtype.name
    # transformers 4 reads torch_dtype, and 5 still does.
    fields = {**llava.config.to_hf(), "torch_dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return files


def hf_tensors(llava: Llava) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors by their names on disk, one at a time, in the layout on disk."""
    config = llava.config
    tree = llava.to_tree()
    for row in llava_rows(tied=config.tie_word_embeddings, projector_bias=config.multimodal_projector_bias):
        leaf: Any = tree
        for name in row.path.split("/"):
            leaf = leaf[name]
        yield from _row_tensors(row, leaf, config.vision_config.num_channels)


def _row_tensors(row: Row, leaf: jax.Array, channels: int) -> Iterator[tuple[str, np.ndarray]]:
    if not row.stacked:
        yield row.name, row.write(np.asarray(leaf), row.disk_shape(leaf.shape, channels))
        return
    shape = row.disk_shape(leaf.shape[1:], channels)
    for layer in range(leaf.shape[0]):
        yield row.name.format(layer=layer), row.write(np.asarray(leaf[layer]), shape)


def _write_shards(llava: Llava, folder: pathlib.Path, shard_bytes: int) -> tuple[list[tuple[pathlib.Path, list[str]]], int]:
    """Writes shards under temporary names; returns [(file, tensor names)] and the total size in bytes."""
    shards: list[tuple[pathlib.Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"{len(shards)}.safetensors.partial"
        save_file(held, str(path), metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    for name, array in hf_tensors(llava):
        if held and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    return shards, total


def _name_shards(folder: pathlib.Path, shards: list[tuple[pathlib.Path, list[str]]], total: int) -> list[pathlib.Path]:
    """Gives the shards their final names, which hold their count, and writes the index if there are several."""
    if len(shards) == 1:
        return [shards[0][0].rename(folder / WEIGHTS)]
    files, weight_map = [], {}
    for index, (path, names) in enumerate(shards, 1):
        files.append(path.rename(folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors"))
        weight_map.update(dict.fromkeys(names, files[-1].name))
    fields = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return files
