"""Files that survive a kill and notice damage: atomic writes, JSON records, and the sha256 manifest of a folder.

Nothing here imports jax. A write goes to a temporary name in the same folder, is flushed to the disk, and is renamed: a reader
sees the old file or the new one, never half of one. A manifest lists every file of a folder with its size and sha256; it also
carries its own, and is compared byte for byte with what its contents would be written as, so that no bit of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proglora_jax.data.errors import UserError

MANIFEST = "manifest.json"
_FORMAT = 1


class CheckpointDamaged(UserError):
    """A file or a checkpoint folder is not what was written; the message names the file and what to do.

    Attributes:
        path: the checkpoint folder or the file that cannot be trusted.
        file: the file inside it at fault, relative to `path`; "" when the whole of it is.
        reason: what is wrong, without the path and the advice (for lists of skipped checkpoints).
    """

    def __init__(self, path: Path, file: str, reason: str):
        self.path, self.file, self.reason = Path(path), file, (f"{file} {reason}" if file else reason)
        super().__init__(f"{path} is damaged: {self.reason}. Delete it, or put back an intact copy.")


def fsync_path(path: str | os.PathLike) -> None:
    """Asks the system to put a file or a folder's entries on the disk; a file system that cannot do it for folders is let be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file so that a crash at any moment leaves either the old contents or the new ones; makes missing folders.

    Args:
        path: where to write.
        data: the whole contents.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the temporary files that killed writes left anywhere below a folder that no other process writes to."""
    for path in Path(folder).rglob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file (UTF-8) as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def to_json(value: Any) -> str:
    """JSON text with two-space indents; numpy scalars and arrays become numbers and lists, paths become strings.

    Raises:
        TypeError: a value that JSON has no form for, with its type.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain)


def atomic_write_json(path: str | os.PathLike, value: Any, *, checksum: bool = False) -> None:
    """Writes a JSON file as `atomic_write_bytes` does.

    Args:
        path: where to write.
        value: what JSON can hold, and numpy scalars, numpy arrays and paths.
        checksum: adds a last key "sha256" over the rest, which `read_json(checksum=True)` verifies; `value` must be a dict.
    """
    if checksum:
        value = {**value, "sha256": hashlib.sha256(to_json(value).encode()).hexdigest()}
    atomic_write_text(path, to_json(value) + "\n")


def read_json(path: str | os.PathLike, *, checksum: bool = False) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        checksum: the file was written with `checksum=True`: verify it, and leave the key "sha256" out of the result.

    Raises:
        UserError: "<path> does not exist."
        CheckpointDamaged: the file is not JSON any more, or its checksum differs.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointDamaged(path, "", f"it is not JSON ({error})") from None
    if not checksum:
        return value
    stated = value.pop("sha256", None) if isinstance(value, dict) else None
    text = to_json({**value, "sha256": stated}) + "\n" if stated else ""
    if raw != text.encode() or stated != hashlib.sha256(to_json(value).encode()).hexdigest():
        raise CheckpointDamaged(path, "", "its contents do not match the checksum inside it")
    return value


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_manifest(folder: str | os.PathLike) -> None:
    """Writes `manifest.json` for every file below `folder`, and puts files and folders on the disk.

    Args:
        folder: a folder that nobody else writes to.
    """
    folder = Path(folder)
    files = {}
    for name, path in sorted(_files_below(folder).items()):
        fsync_path(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_path(inner)
    atomic_write_bytes(folder / MANIFEST, _manifest_bytes(files))


def verify_manifest(folder: str | os.PathLike) -> None:
    """Checks that a folder holds exactly the files of its manifest, unchanged.

    Args:
        folder: a folder that `write_manifest` was called on.

    Raises:
        CheckpointDamaged: "<folder> is damaged: <file> <is missing | is not in the manifest | has ... bytes instead of ... |
            was changed after it was written (sha256 differs)>. Delete it, or put back an intact copy."
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointDamaged(folder, "", "the folder does not exist" if not folder.exists() else "it is not a folder")
    stated, found = _read_manifest(folder), _files_below(folder)
    for name in sorted(set(stated) - set(found)):
        raise CheckpointDamaged(folder, name, "is missing")
    for name in sorted(set(found) - set(stated)):
        raise CheckpointDamaged(folder, name, "is not in the manifest, so it was added later")
    for name, entry in stated.items():
        size = found[name].stat().st_size
        if size != entry["bytes"]:
            raise CheckpointDamaged(folder, name, f"has {size} bytes instead of {entry['bytes']}")
        if sha256_of_file(found[name]) != entry["sha256"]:
            raise CheckpointDamaged(folder, name, "was changed after it was written (sha256 differs)")


def _read_manifest(folder: Path) -> dict[str, dict]:
    """The manifest's table of files, after comparing the manifest with its own checksum, byte for byte."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointDamaged(folder, MANIFEST, "is missing") from None
    try:
        files = json.loads(raw)["files"]
        same = raw == _manifest_bytes(files)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise CheckpointDamaged(folder, MANIFEST, "was changed after it was written")
    return files


def _manifest_bytes(files: Mapping[str, Mapping]) -> bytes:
    body = to_json({"format": _FORMAT, "files": files})
    return (to_json({"format": _FORMAT, "files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n").encode()


def _files_below(folder: Path) -> dict[str, Path]:
    """Every file below a folder but the manifest itself, by its path relative to the folder."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    paths.pop(MANIFEST, None)
    return paths


def _plain(value: Any) -> Any:
    """The JSON form of numpy scalars and arrays (by duck typing: arrays of jax work too) and of paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
