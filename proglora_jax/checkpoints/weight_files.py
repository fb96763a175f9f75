"""The weight files of a model's folder: which they are, the config.json beside them, and the tensors that their headers list."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proglora_jax.checkpoints.tensors import StoredTensor, open_file
from proglora_jax.data.errors import UserError, raise_collected

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROJECTORS = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")

Path = str | pathlib.Path


def read_fields(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        UserError: "<folder>: <name> is missing ...", "<file>: cannot be read as JSON (<why>) ...", "<file>: holds no JSON object ..."
    """
    path = existing(folder) / name
    if not path.exists():
        raise UserError(f"{folder}: {name} is missing; give a folder as transformers' save_pretrained writes it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download or write it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no JSON object; download or write it again")
    return fields


def index_folder(
    folder: pathlib.Path, table_name: Callable[[str], str | None]
) -> tuple[dict[str, StoredTensor], list[pathlib.Path]]:
    """All weights of a folder.

    Args:
        folder: holds safetensors or files of torch.save, in one or in parts with an index.
        table_name: name on disk -> name in the table of names, None for what is of no use.

    Returns:
        (name in the table -> tensor, files that were read).

    Raises:
        UserError: "<folder>: holds no model.safetensors, no pytorch_model.bin and no index of parts", "<folder>: <count> problem(s):
            <file> is missing; ...", "<index>: has no weight_map; ...", or as `named_tensors`.
    """
    for index, whole in ((INDEX, WEIGHTS), (TORCH_INDEX, TORCH_WEIGHTS)):
        if (folder / index).exists():
            shards = read_fields(folder, index).get("weight_map")
            if not isinstance(shards, Mapping) or not shards or not all(isinstance(name, str) for name in shards.values()):
                raise UserError(f"{folder / index}: has no weight_map; download the file again")
            names = sorted(set(shards.values()))
            break
        if (folder / whole).exists():
            shards, names = {}, [whole]
            break
    else:
        alone = next((name for name in PROJECTORS if (folder / name).exists()), None)
        parts = sorted(path.name for path in folder.glob("*-of-*"))
        hint = f" (found {alone}: give it as the projector, and the language model's folder here)" if alone else ""
        hint = hint or (f" (found {parts[0]}: the index that says what is in which part is missing)" if parts else "")
        raise UserError(f"{folder}: holds no {WEIGHTS}, no {TORCH_WEIGHTS} and no index of parts{hint}")
    outside = [f"{name} lies outside of the folder" for name in names if pathlib.Path(name).name != name]
    missing = [f"{name} is missing" for name in names if name not in outside and not (folder / name).exists()]
    raise_collected(outside or missing, str(folder), "Download these files again.")
    files = [folder / name for name in names]
    return named_tensors(files, table_name, shards, index), files


def named_tensors(
    files: Sequence[pathlib.Path], table_name: Callable[[str], str | None], places: Mapping[str, str] | None = None, index: str = ""
) -> dict[str, StoredTensor]:
    """The tensors of files by their names in a table, each once.

    Args:
        files: of one folder.
        table_name: as for `index_folder`.
        places: name of a tensor -> name of its file, as an index has it.
        index: name of the index, for messages.

    Raises:
        UserError: "<folder>: <count> problem(s): <name> of <file> and <name> of <file> are one tensor; no tensor <name> in <file>, where
            <index> has it; ...", or what `tensors.open_file` says.
    """
    held = {file.name: open_file(file) for file in files}
    problems = [f"no tensor {name} in {file}, where {index} has it" for name, file in (places or {}).items()
                if name not in held[file] and table_name(name) is not None]
    tensors: dict[str, StoredTensor] = {}
    for file, own in held.items():
        for name, tensor in own.items():
            known = table_name(name)
            if known in tensors:
                first = tensors[known]
                problems.append(f"{first.name} of {first.path.name} and {name} of {file} are one tensor")
            elif known is not None:
                tensors[known] = tensor
    raise_collected(problems, str(files[0].parent), "Download these files again, or write the model anew.")
    return tensors


def files_digest(files: Sequence[pathlib.Path]) -> str:
    """SHA-256 over names and contents of files, as hex digits."""
    # hashlib lets go of the interpreter's lock, so files are read side by side.
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_digest, files))
    return hashlib.sha256("".join(f"{path.name} {digest}\n" for path, digest in zip(files, digests)).encode()).hexdigest()


def existing(folder: Path) -> pathlib.Path:
    """The folder.

    Raises:
        UserError: "<folder>: no such folder; ..."
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder with {CONFIG} and {WEIGHTS} (nothing is downloaded)")
    return folder


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """config.json and the weight files of a folder, those of torch.save where there are no others."""
    weights = {*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")}
    weights = weights or {*folder.glob("*.bin"), *folder.glob("*.bin.index.json")}
    return sorted(path for path in {folder / CONFIG, *weights} if path.exists())


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
