"""Checkpoints of a stage: one folder with named trees (Orbax), JSON records, and a manifest that notices every flipped bit.

    03_gqa/adapter/...       one folder per tree, written by Orbax
    03_gqa/meta.json         one file per record
    03_gqa/trees.json        names, dtypes and shapes of all leaves
    03_gqa/manifest.json     size and sha256 of every file above

The folder is built under a temporary name and renamed when it is complete and on the disk. Orbax notices truncated files but no
changed bits, so the manifest is verified before anything is restored. Orbax refuses empty trees and arrays without elements; those live
in trees.json alone.

Multi-process runs: every process calls these functions with the same arguments, on a folder that all of them see. Orbax writes each
process's shards; process 0 alone writes the rest and renames. numpy leaves and Python scalars are taken from process 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from proglora_jax.checkpoints import folders
from proglora_jax.checkpoints.integrity import MANIFEST, CheckpointDamaged, atomic_write_json, read_json, verify_manifest, write_manifest
from proglora_jax.checkpoints.layout import SCALARS, check_fit, describe, flatten, has_elements, nest
from proglora_jax.data.errors import UserError

PyTree = Any
_LAYOUT = "trees.json"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def save_checkpoint(path: str | os.PathLike, trees: Mapping[str, PyTree], records: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, all or nothing; one that is already at `path` is replaced.

    Args:
        path: the folder to write; missing parents are made.
        trees: name -> pytree of jax arrays, numpy arrays and Python scalars; empty containers and None may occur.
        records: name -> what JSON can hold, written to `<name>.json`.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        UserError: "checkpoint <path> could not be written: <reason>. What was there before is untouched."
        ValueError: a name of a tree, record or leaf that cannot be a file name, or a leaf that is no array.
    """
    path = Path(path).absolute()
    _check_names(trees, records)
    leaves = {name: flatten(trees[name])[0] for name in sorted(trees)}
    layouts = {name: describe(leaves[name]) for name in leaves}
    temporary = path.with_name(_agreed(folders.temporary_name(path)))
    chief = jax.process_index() == 0
    try:
        if chief:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.clean_leftovers(path.parent, path.name)
            temporary.mkdir()
        _barrier("checkpoint folder made")
        for name in leaves:
            _orbax_save(temporary / name, {k: leaves[name][k] for k, entry in layouts[name].items() if has_elements(entry)})
        _barrier("checkpoint trees written")
        if chief:
            for name, record in records.items():
                atomic_write_json(temporary / f"{name}.json", record)
            atomic_write_json(temporary / _LAYOUT, layouts)
            write_manifest(temporary)
            folders.put_in_place(temporary, path)
        _barrier("checkpoint in place")
    except Exception as error:
        if chief:
            shutil.rmtree(temporary, ignore_errors=True)
            folders.clean_leftovers(path.parent, path.name)
        reason = _system_reason(error)
        if reason is None:
            raise
        raise UserError(f"checkpoint {path} could not be written: {reason}. What was there before is untouched.") from error
    return path


def load_checkpoint(
    path: str | os.PathLike, trees: Sequence[str] | Mapping[str, PyTree] | None = None
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Verifies a checkpoint, then reads trees and all records from it.

    Args:
        path: the checkpoint's folder.
        trees: names of trees, or name -> abstract tree; None reads all. An abstract tree has the structure to be returned, with
            leaves that have `shape` and `dtype` (`jax.ShapeDtypeStruct` or arrays; Python scalars stand for themselves). A leaf with a
            `sharding` comes back as a jax array laid out so, whatever mesh it was saved from; one without as a numpy array. A name
            alone, or None for its abstract tree, gives nested dicts of numpy arrays and scalars as they were saved.

    Returns:
        (name -> tree, name -> record).

    Raises:
        CheckpointDamaged: a file is missing, extra or changed; the message names it.
        UserError: "checkpoint <path> has no tree 'x'; it has ..." or "checkpoint <path>, tree 'x' does not fit: ..." with the leaves
            at fault, and both shapes.
    """
    path = folders.resolve(Path(path).absolute())
    verify_manifest(path)
    layouts = read_json(path / _LAYOUT)
    if not isinstance(trees, Mapping):
        trees = dict.fromkeys(layouts if trees is None else trees)
    for name in trees:
        if name not in layouts:
            raise UserError(f"checkpoint {path} has no tree '{name}'; it has {', '.join(layouts) or 'none'}.")
    loaded = {name: _load_tree(path / name, layouts[name], abstract) for name, abstract in trees.items()}
    return loaded, _read_records(path)


def load_records(path: str | os.PathLike) -> dict[str, Any]:
    """Verifies a checkpoint and reads its JSON records alone.

    Raises:
        CheckpointDamaged: as `load_checkpoint`.
    """
    path = folders.resolve(Path(path).absolute())
    verify_manifest(path)
    return _read_records(path)


def find_newest(folder: str | os.PathLike, pattern: str = "*", *, clean: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a folder that is intact, trying from the newest to the oldest.

    Newest means last by name, numbers compared as numbers ("10_vqa" after "9_gqa").

    Args:
        folder: where checkpoints lie; it need not exist.
        pattern: which names count, as in a shell ("step_*").
        clean: first remove what saves that were killed left behind. Pass False where another process may be saving.

    Returns:
        (path of the checkpoint or None, [(path that was skipped, why)] from newest to oldest). In a multi-process run all get
        process 0's answer; the list is empty in the others.
    """
    folder = Path(folder).absolute()
    newest, skipped = "", []
    if jax.process_index() == 0:
        if clean:
            folders.clean_leftovers(folder)
        for path in folders.newest_first(folder, pattern):
            try:
                verify_manifest(folders.resolve(path))
            except CheckpointDamaged as error:
                skipped.append((path, error.reason))
            else:
                newest = path.name
                break
    newest = _agreed(newest)
    return (folder / newest if newest else None), skipped


def _check_names(trees: Mapping[str, PyTree], records: Mapping[str, Any]) -> None:
    reserved = {Path(MANIFEST).stem, Path(_LAYOUT).stem}
    for name in [*trees, *records]:
        if not _NAME.fullmatch(name) or (name in records and name in reserved):
            raise ValueError(f"'{name}' cannot name a tree or record: use letters, digits and _, for a record none of {sorted(reserved)}")


def _system_reason(error: Exception) -> str | None:
    """What the system said (disk full, no permission), or None where the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    for sign in ("No space left on device", "Disk quota exceeded", "Permission denied", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"):
        if sign in str(error):  # TensorStore reports these as ValueError
            return sign
    return None


def _load_tree(path: Path, layout: Mapping[str, dict], abstract: PyTree | None) -> PyTree:
    """Restores the tree in the folder `path`, described by `layout`, as nested dicts or with the abstract tree's structure."""
    wanted, structure = (layout, None) if abstract is None else flatten(abstract)
    if abstract is not None:
        check_fit(f"checkpoint {path.parent}, tree '{path.name}' does not fit", layout, describe(wanted))
    shardings = {name: getattr(wanted[name], "sharding", None) for name in layout}
    restored = _orbax_restore(path, {k: entry for k, entry in layout.items() if has_elements(entry)}, shardings)
    values = {}
    for name, entry in layout.items():
        if "empty" in entry:
            values[name] = {} if abstract is None else wanted[name]
        elif "scalar" in entry:
            values[name] = SCALARS[entry["scalar"]](restored[name])
        elif has_elements(entry):
            values[name] = restored[name]
        else:
            values[name] = _without_elements(entry, shardings[name])
    if abstract is None:
        return nest(values)
    return jax.tree_util.tree_unflatten(structure, [values[k] for k in wanted])


def _without_elements(entry: Mapping[str, Any], sharding: Any) -> Any:
    empty = np.zeros(entry["shape"], jax.numpy.dtype(entry["dtype"]))
    return empty if sharding is None else jax.make_array_from_callback(empty.shape, sharding, lambda index: empty[index])


def _orbax_save(path: Path, leaves: Mapping[str, Any]) -> None:
    if leaves:
        # numpy scalars become arrays: Orbax would hand them back as another type
        arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in leaves.items()}
        with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(nest(arrays)))


def _orbax_restore(path: Path, layout: Mapping[str, dict], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the leaves of `layout` by name; those with a sharding as jax arrays, the others as numpy arrays."""
    if not layout:
        return {}
    how = {}
    for name, entry in layout.items():
        how[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        if shardings[name] is not None:
            dtype = jax.numpy.dtype(entry["dtype"])
            how[name] = ocp.ArrayRestoreArgs(sharding=shardings[name], global_shape=tuple(entry["shape"]), dtype=dtype)
    args = ocp.args.PyTreeRestore(item=nest(dict.fromkeys(how, 0)), restore_args=nest(how))
    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return flatten(checkpointer.restore(path, args=args))[0]
    except (OSError, KeyError, ValueError) as error:
        # the files are as they were written (the manifest says so), so it is a limit of the installed Orbax
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"checkpoint {path} is intact, but the installed Orbax {ocp.__version__} cannot read it: {first}") from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops Orbax's own log lines while it works: some thirty a save, and tracebacks for what also arrives as an exception."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _read_records(path: Path) -> dict[str, Any]:
    return {file.stem: read_json(file) for file in sorted(path.glob("*.json")) if file.name not in (MANIFEST, _LAYOUT)}


def _barrier(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _agreed(text: str) -> str:
    """Process 0's text in every process."""
    if jax.process_count() == 1:
        return text
    encoded = np.zeros(1024, np.uint8)
    encoded[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(encoded))).rstrip(b"\0").decode()
