"""Reads a LLaVA from a Hugging Face folder (config.json and safetensors), tensor by tensor, into the stacked arrays of the model."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy knows bfloat16 only once this is imported, and safetensors asks numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from proglora_jax.checkpoints.names import Row, canonical, llava_rows
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import Llava, abstract_llava, build
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")


def load_llava(
    folder: str | pathlib.Path,
    dtype: Any = jnp.bfloat16,
    *,
    settings: Settings | None = None,
    vision_folder: str | pathlib.Path | None = None,
    projector_file: str | pathlib.Path | None = None,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Llava:
    """Loads a LLaVA.

    Args:
        folder: holds config.json and model.safetensors (or shards and their index), with names of transformers 4.x or 5.x or of
            the original LLaVA. A folder with a Llama alone (Vicuna) needs the two below.
        dtype: of the parameters in memory.
        settings: compute dtype and attention; default: computes in `dtype`.
        vision_folder: folder of a CLIP, for a `folder` without a vision tower.
        projector_file: safetensors file with the projector's four tensors; wins over those in `folder`.
        place: (path, array) -> array on the devices; default puts all on the default device. The array is not used afterwards.

    Returns:
        The model. No more than one stacked parameter is on the host at a time.

    Raises:
        UserError: "<folder>: no such folder ...", "<folder>: config.json is missing ...", "<file>: cannot be read as safetensors ...",
            or "<folder>: <count> problem(s): no tensor <name>; ..." for all missing, unexpected and misshapen tensors at once.
    """
    config = read_config(folder, vision_folder)
    sources = [index_file(projector_file)] if projector_file else []
    sources += [index_folder(path) for path in (folder, vision_folder) if path]
    tensors: dict[str, _Tensor] = {}
    for source in sources:
        tensors = {**source, **tensors}
    rows = llava_rows(tied=config.tie_word_embeddings, projector_bias=config.multimodal_projector_bias)
    table = {row.path: row for row in rows}
    _check(folder, config, table, tensors)
    target, place = np.dtype(dtype), place or (lambda path, array: jnp.asarray(array))

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        return place(path, _read(table[path], abstract.shape, target, tensors))

    return build(config, leaf, settings or Settings(dtype=target.name))


def read_config(folder: str | pathlib.Path, vision_folder: str | pathlib.Path | None = None) -> LlavaConfig:
    """Reads the sizes of the model from config.json, of a LLaVA or of a Llama and a CLIP in two folders.

    Raises:
        UserError: "<folder>: no such folder ...", "<folder>: config.json is missing ...", "<file>: <field>=<value> is not supported ..."
    """
    fields = _read_json(folder, CONFIG)
    try:
        if "vision_config" in fields or "text_config" in fields:
            return LlavaConfig.from_hf(fields)
        if vision_folder is None:
            raise UserError(
                f"{folder}: {CONFIG} describes a language model without a vision tower; give the folder of a CLIP as vision_folder"
            )
        text = LlamaConfig.from_hf({**fields, "model_type": "llama"})
        vision = ClipConfig.from_hf(_read_json(vision_folder, CONFIG))
        layer = fields.get("mm_vision_select_layer", LlavaConfig.vision_feature_layer)
        return LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=layer)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{pathlib.Path(folder) / CONFIG}: {error}") from error


def index_folder(folder: str | pathlib.Path) -> dict[str, _Tensor]:
    """Canonical name -> where the tensor lies, for all safetensors files of a folder; reads headers only.

    Raises:
        UserError: "<folder>: holds no model.safetensors ..." and as `index_file`.
    """
    folder = _existing(folder)
    if (folder / INDEX).exists():
        shards = _read_json(folder, INDEX).get("weight_map")
        if not isinstance(shards, Mapping):
            raise UserError(f"{folder / INDEX}: has no weight_map; download the file again")
        files = sorted(set(shards.values()))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" (found {others[0]}, a pickle: load it with transformers and save_pretrained it)" if others else ""
        raise UserError(f"{folder}: holds no {WEIGHTS} and no {INDEX}{hint}")
    missing = [f"{name} is missing" for name in files if not (folder / name).exists()]
    raise_collected(missing, str(folder), "Download these files again.")
    tensors: dict[str, _Tensor] = {}
    for name in files:
        tensors.update(index_file(folder / name))
    return tensors


def index_file(path: str | pathlib.Path) -> dict[str, _Tensor]:
    """Canonical name -> where the tensor lies, for one safetensors file; names without a use here are left out.

    Raises:
        UserError: "<file>: cannot be read as safetensors (<why>); it may be truncated: download or write it again"
    """
    try:
        handle = safe_open(str(path), "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); it may be truncated: download or write it again") from error
    known = {name: canonical(name) for name in handle.keys()}
    return {ours: _Tensor(handle, name) for name, ours in known.items() if ours is not None}


def fingerprint(folder: str | pathlib.Path) -> str:
    """SHA-256 over config.json and the weight files of a folder, names and contents, as hex digits: the name of a base model.

    Raises:
        UserError: "<folder>: no such folder ..."
    """
    folder = _existing(folder)
    files = sorted({folder / CONFIG, *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")})
    files = [path for path in files if path.exists()]
    # hashlib lets go of the interpreter's lock, so shards are read side by side.
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_digest, files))
    return hashlib.sha256("".join(f"{path.name} {digest}\n" for path, digest in zip(files, digests)).encode()).hexdigest()


class _Tensor:
    """One tensor of an open file: its shape and format from the header, its values on demand."""

    def __init__(self, handle: Any, name: str):
        self.handle, self.name = handle, name
        header = handle.get_slice(name)
        self.shape, self.format = tuple(header.get_shape()), header.get_dtype()

    def read(self) -> np.ndarray:
        return self.handle.get_tensor(self.name)


def _check(folder: str | pathlib.Path, config: LlavaConfig, table: Mapping[str, Row], tensors: Mapping[str, _Tensor]) -> None:
    """Compares the table with the headers and raises once for all differences."""
    shapes: dict[str, tuple[int, ...]] = {}
    abstract = abstract_llava(config).to_tree()
    for path, row in table.items():
        shape = _at(abstract, path).shape
        for name in _names(row, shape):
            shapes[name] = row.disk_shape(shape[1:] if row.stacked else shape, config.vision_config.num_channels)
    problems = [f"no tensor {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name == "language_model.lm_head.weight" and config.tie_word_embeddings:
            continue  # some writers store a tied head as well
        if name not in shapes:
            problems.append(f"unexpected tensor {tensor.name}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, but {CONFIG} asks for {list(shapes[name])}")
        elif tensor.format not in _FLOATS:
            problems.append(f"{tensor.name} holds {tensor.format}, not floats (quantised weights are not supported)")
    raise_collected(problems, str(folder), f"Check that {CONFIG} and the weights belong together.")


def _read(row: Row, shape: tuple[int, ...], dtype: np.dtype, tensors: Mapping[str, _Tensor]) -> np.ndarray:
    """One of our parameters, all its layers."""
    if not row.stacked:
        return np.ascontiguousarray(row.read(tensors[row.name].read()).astype(dtype))
    out = np.empty(shape, dtype)
    for layer, name in enumerate(_names(row, shape)):
        out[layer] = row.read(tensors[name].read()).astype(dtype)
    return out


def _names(row: Row, shape: tuple[int, ...]) -> Iterable[str]:
    return [row.name.format(layer=layer) for layer in range(shape[0])] if row.stacked else [row.name]


def _at(tree: Mapping, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _existing(folder: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder with {CONFIG} and {WEIGHTS} (nothing is downloaded)")
    return folder


def _read_json(folder: str | pathlib.Path, name: str) -> dict[str, Any]:
    path = _existing(folder) / name
    if not path.exists():
        raise UserError(f"{folder}: {name} is missing; give a folder as transformers' save_pretrained writes it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download or write it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no JSON object; download or write it again")
    return fields


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
