"""How a checkpoint folder gets its name: built beside its place, swapped in by renames, cleaned up after a kill.

    <name>.tmp-<8 hex digits>   being built, or left by a save that was killed
    <name>.old-<8 hex digits>   stepped aside while its replacement is renamed; the checkpoint called <name> until that is done
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from proglora_jax.checkpoints.integrity import fsync_path

_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")


def temporary_name(path: Path) -> str:
    """A fresh name for the folder in which the checkpoint `path` is built."""
    return f"{path.name}.tmp-{secrets.token_hex(4)}"


def put_in_place(temporary: Path, path: Path) -> None:
    """Gives a complete folder its final name, replacing what has that name; after a kill at any moment one of the two is found."""
    aside = None
    if path.exists():
        aside = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
        os.rename(path, aside)
    os.rename(temporary, path)
    fsync_path(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def resolve(path: Path) -> Path:
    """Where the checkpoint called `path` is: there, or stepped aside for a replacement that was not finished."""
    if path.exists():
        return path
    return next((p for p, kind in _leftovers(path.parent, path.name) if kind == "old"), path)


def clean_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed saves left in a folder, and gives a checkpoint that had stepped aside its name back.

    Args:
        folder: where checkpoints lie; it need not exist.
        name: look only for leftovers of the checkpoint with this name.
    """
    for path, kind in _leftovers(folder, name):
        final = path.with_name(_LEFTOVER.fullmatch(path.name)["name"])
        if kind == "old" and not final.exists():
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """Folders whose names match, last name first with numbers compared as numbers; those stepped aside count by their own name."""
    if not folder.is_dir():
        return []
    finals = {p.name for p in folder.iterdir() if p.is_dir() and not _LEFTOVER.fullmatch(p.name)}
    finals |= {_LEFTOVER.fullmatch(p.name)["name"] for p, kind in _leftovers(folder, None) if kind == "old"}
    matching = [folder / name for name in finals if Path(name).match(pattern)]
    return sorted(matching, key=lambda p: [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", p.name)], reverse=True)


def _leftovers(folder: Path, name: str | None) -> list[tuple[Path, str]]:
    """(path, "tmp" or "old") of every leftover in a folder, or of those of one checkpoint."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match and name in (None, match["name"]):
            found.append((path, match["kind"]))
    return found
