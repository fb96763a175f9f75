"""Reads a LLaVA from Hugging Face or original LLaVA files, tensor by tensor, into the stacked arrays of the model, on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from proglora_jax.checkpoints.names import Row, llava_rows
from proglora_jax.checkpoints.sources import Source, find_source
from proglora_jax.checkpoints.tensors import largest
from proglora_jax.checkpoints.weight_files import Path
from proglora_jax.core import mesh as meshes
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import Llava, build

# A stacked parameter up to this many bytes is put together on the host and sent at once; a larger one goes layer by layer.
STACK_ON_HOST = 64 << 20


def load_llava(
    folder: Path,
    dtype: Any = jnp.bfloat16,
    *,
    settings: Settings | None = None,
    vision_folder: Path | None = None,
    projector_file: Path | None = None,
    mesh: Mesh | None = None,
) -> Llava:
    """Finds and loads a LLaVA, see `sources.find_source` and `load_source`.

    Raises:
        UserError: as `sources.find_source`.
    """
    return load_source(find_source(folder, vision_folder, projector_file), dtype, settings=settings, mesh=mesh)


def load_source(source: Source, dtype: Any = jnp.bfloat16, *, settings: Settings | None = None, mesh: Mesh | None = None) -> Llava:
    """Loads a LLaVA that was found.

    Besides the arrays on the devices, the host holds at most two tensors as they lie on disk at a time (a stacked parameter that is
    smaller than the largest tensor, or than 64 MiB, counts as one): files are memory-mapped, and layers are sent one by one into the
    array on the devices.

    Args:
        source: where it lies.
        dtype: of the parameters in memory.
        settings: compute dtype and attention; default: computes in `dtype`.
        mesh: the devices, on which the parameters lie as core/mesh.py says; default: the default device.

    Returns:
        The model. Rows of the vocabulary that are not on disk are the mean of those that are.
    """
    config, target = source.config, np.dtype(dtype)
    table = {row.path: row for row in llava_rows(tied=config.tie_word_embeddings, projector_bias=config.multimodal_projector_bias)}
    elements = max(largest(list(source.tensors.values())), STACK_ON_HOST) // target.itemsize

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        shape = abstract.shape
        sharding = meshes.backbone_sharding(path, shape, mesh) if mesh is not None else None
        if table[path].stacked and abstract.size > elements:
            return _send_layers(shape, target, _layers(source, table[path], shape[0], target), sharding)
        return _send(_whole(source, table[path], shape, target), sharding)

    return build(config, leaf, settings or Settings(dtype=target.name))


def _whole(source: Source, row: Row, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """One of our parameters on the host, all its layers, in an array of its own."""
    if row.stacked:
        whole = np.empty(shape, dtype)
        for index, name in enumerate(row.names(shape[0])):
            whole[index] = row.read(source.tensors[name].read())
        return whole
    stored = row.read(source.tensors[row.name].read())
    whole = np.empty(shape, dtype)
    whole[tuple(map(slice, stored.shape))] = stored
    if stored.shape != shape:  # a vocabulary that grows
        axis = next(i for i, (here, there) in enumerate(zip(stored.shape, shape)) if here != there)
        new = [slice(None)] * len(shape)
        new[axis] = slice(stored.shape[axis], None)
        whole[tuple(new)] = np.mean(stored, axis=axis, dtype=np.float32, keepdims=True).astype(stored.dtype)
    return whole


def _layers(source: Source, row: Row, count: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    for name in row.names(count):
        yield np.array(row.read(source.tensors[name].read()), dtype, order="C")


def _send(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _send_layers(shape: tuple[int, ...], dtype: np.dtype, layers: Iterator[np.ndarray], sharding: Sharding | None) -> jax.Array:
    """The stacked array on the devices, written in place layer by layer; the next layer is read when the last one is there."""
    start, write = _writer(shape, dtype, sharding)
    part_sharding = meshes.without_leading_axis(sharding) if sharding is not None else None
    whole = start()
    for index, layer in enumerate(layers):
        whole = write(whole, _send(layer, part_sharding), np.int32(index))
        del layer
        jax.block_until_ready(whole)
    return whole


@functools.lru_cache(maxsize=64)
def _writer(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> tuple[Callable, Callable]:
    start = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    write = jax.jit(
        lambda whole, layer, index: jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0), donate_argnums=0, out_shardings=sharding
    )
    return start, write
