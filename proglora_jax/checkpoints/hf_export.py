"""Writes a LLaVA as a folder (config.json and safetensors): for transformers 4.x and 5.x, or in the layout of original LLaVA."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from proglora_jax.checkpoints.names import STYLES, llava_rows, styled
from proglora_jax.checkpoints.shards import SHARD_BYTES, Entry, refuse_existing, write_shards
from proglora_jax.checkpoints.sources import PROTOCOL, Source, disk_names, padded_rows
from proglora_jax.checkpoints.tensors import DTYPES
from proglora_jax.checkpoints.weight_files import CONFIG
from proglora_jax.data.errors import UserError
from proglora_jax.models.llava import Llava
from proglora_jax.models.presets import LlavaConfig

VISION_FOLDER = "vision_tower"
Change = Callable[[str, np.ndarray, np.dtype], np.ndarray]
_VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def save_llava(llava: Llava, folder: str | pathlib.Path, *, shard_bytes: int = SHARD_BYTES) -> list[pathlib.Path]:
    """Writes config.json and the weights, in one file or in shards with an index, in the dtypes that the parameters have.

    The names are those of LLaVA folders on the hub (`language_model.model.*`, `vision_tower.vision_model.*`), which every version of
    transformers reads. Layers of the vision tower that the feature layer does not need are written too.

    Args:
        llava: the model.
        folder: where to write; is made if it does not exist.
        shard_bytes: a new file is begun before this size is passed.

    Returns:
        The weight files.

    Raises:
        UserError: "<folder>: holds a model already (<file>); choose another folder or remove it"
    """
    refuse_existing(pathlib.Path(folder))
    return _write(pathlib.Path(folder), hf_entries(llava), llava.config, "hub", shard_bytes, {})


def save_source(
    source: Source,
    folder: str | pathlib.Path,
    *,
    style: str = "hub",
    dtype: Any = None,
    change: Change | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[pathlib.Path]:
    """Writes a model that lies on disk anew, from file to file, one tensor in memory at a time.

    Args:
        source: the model.
        folder: where to write; is made if it does not exist.
        style: of the names, see `names.STYLES`; "original" makes the layout of original LLaVA: a vocabulary that ends before <image>,
            and the vision tower in a folder of its own.
        dtype: of all tensors; None leaves each as it is, so that nothing is lost.
        change: (name in the table, values, dtype to be written) -> values of that dtype in their place.
        shard_bytes: a new file is begun before this size is passed.

    Returns:
        The weight files.

    Raises:
        UserError: "<folder>: holds a model already (<file>); choose another folder or remove it", "<the model's folder>: the layout of
            original LLaVA has no row for <image>, ..."
    """
    if style == "original":
        _check_rows(source)
    entries, more = source_entries(source, dtype, change), {PROTOCOL: source.protocol}
    return _write(pathlib.Path(folder), entries, source.config, style, shard_bytes, more)


def hf_entries(llava: Llava) -> list[Entry]:
    """The model's tensors by their names in the table, in the layout on disk."""
    tree, entries, channels = llava.to_tree(), [], llava.config.vision_config.num_channels
    for row in llava_rows(tied=llava.config.tie_word_embeddings, projector_bias=llava.config.multimodal_projector_bias):
        leaf: Any = tree
        for name in row.path.split("/"):
            leaf = leaf[name]
        shape = row.disk_shape(leaf.shape[1:] if row.stacked else leaf.shape, channels)

        def read(index: int, row=row, leaf: jax.Array = leaf, shape=shape) -> np.ndarray:
            return row.write(np.asarray(leaf[index] if row.stacked else leaf), shape)

        entries += [Entry(name, leaf.dtype, shape, lambda i=i, read=read: read(i)) for i, name in enumerate(row.names(leaf.shape[0]))]
    return entries


def source_entries(source: Source, dtype: Any = None, change: Change | None = None) -> list[Entry]:
    """The tensors of a model on disk by their names in the table, with the rows of the vocabulary that its config has."""
    entries = []
    for name, shape in disk_names(source.config):
        tensor = source.tensors[name]
        target = DTYPES[tensor.format] if dtype is None else np.dtype(dtype)

        def read(name=name, shape=shape, tensor=tensor, target=target) -> np.ndarray:
            array = tensor.read()
            if array.shape != shape:
                new = np.mean(array, axis=0, dtype=np.float32, keepdims=True).astype(array.dtype)
                array = np.concatenate([array, np.broadcast_to(new, (shape[0] - array.shape[0], *shape[1:]))])
            if change is not None:
                array = change(name, array, target)
            return np.ascontiguousarray(array, target)

        entries.append(Entry(name, target, shape, read))
    return entries


def processor_fields(config: LlavaConfig) -> dict[str, Any]:
    """The fields of a LLaVA's processor_config.json."""
    return {
        "processor_class": "LlavaProcessor", "patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy, "image_token": "<image>",
    }  # fmt: skip


def _write(
    folder: pathlib.Path, entries: list[Entry], config: LlavaConfig, style: str, shard_bytes: int, more: Mapping[str, Any]
) -> list[pathlib.Path]:
    refuse_existing(folder)
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown: choose one of {', '.join(STYLES)}")
    fields = config.to_hf()
    files: list[pathlib.Path] = []
    # transformers 4 reads torch_dtype, and 5 still does.
    kind = {"torch_dtype": next(entry.dtype.name for entry in entries if entry.name == _VOCABULARY[0])}
    if style == "original":
        towers = [entry for entry in entries if entry.name.startswith("vision_tower.")]
        refuse_existing(folder / VISION_FOLDER)
        files += write_shards(folder / VISION_FOLDER, [entry._replace(name=styled(entry.name, style)) for entry in towers], shard_bytes)
        _write_json(folder / VISION_FOLDER / CONFIG, {**config.vision_config.to_hf(), **kind})
        entries = [_cut(entry, config.image_token_id) for entry in entries if entry not in towers]
        fields = _original_fields(config)
    entries = [entry._replace(name=styled(entry.name, style)) for entry in entries]
    files += write_shards(folder, entries, shard_bytes)
    _write_json(folder / CONFIG, {**fields, **kind, **more})
    return files


def _check_rows(source: Source) -> None:
    """Refuses a vocabulary that cannot be cut off before <image>."""
    image, pad, rows = source.config.image_token_id, source.config.pad_token_id, source.config.text_config.vocab_size
    if pad != image + 1 or rows != padded_rows(image):
        raise UserError(
            f"{source.folder}: the layout of original LLaVA has no row for <image>, but this model has it at {image} amid {rows} rows, "
            "with words behind it; choose another style"
        )


def _cut(entry: Entry, rows: int) -> Entry:
    """An entry of the vocabulary without the rows from <image> on; any other as it is."""
    if entry.name not in _VOCABULARY:
        return entry
    return entry._replace(shape=(rows, *entry.shape[1:]), read=lambda: entry.read()[:rows])


def _original_fields(config: LlavaConfig) -> dict[str, Any]:
    """config.json of original LLaVA: the language model's fields, and `mm_*` for the rest."""
    features = {"default": "patch", "full": "cls_patch"}
    return {
        **config.text_config.to_hf(), "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": config.image_token_id, "tie_word_embeddings": config.tie_word_embeddings, "mm_vision_tower": VISION_FOLDER,
        "mm_hidden_size": config.vision_config.hidden_size, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy], "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True,
    }  # fmt: skip


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
