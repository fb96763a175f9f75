"""The one exception for what a user can mend: its message is shown as it is, without a stack trace."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP,
}
"""What a full, read-only or broken disk says, and files where folders should be; anything else is not for the user to mend."""


class UserError(ValueError):
    """An error in the user's input (a config field, a file, a record); the message says what, where and what to do."""


def raise_collected(problems: Sequence[str], what: str, advice: str, shown: int = 10) -> None:
    """Raises one UserError for a list of problems, naming the first few and the count; does nothing if there are none.

    Args:
        problems: one short sentence each.
        what: what was being read, e.g. "weights of model.safetensors".
        advice: what the user should do.
        shown: how many problems the message spells out.

    Raises:
        UserError: "<what>: <count> problem(s): <first ones>. <advice>"
    """
    if not problems:
        return
    listed = "; ".join(problems[:shown])
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    raise UserError(f"{what}: {len(problems)} problem(s): {listed}{rest}. {advice}")


@contextlib.contextmanager
def disk_errors(place: str | os.PathLike, advice: str, partial: str | os.PathLike = "", *, every: bool = False) -> Iterator[None]:
    """Turns what a disk refuses into one sentence.

    Args:
        place: where something is written; named where the system names no file.
        advice: what the user should do.
        partial: the name that `place` has while it is not whole; the sentence says `place` instead.
        every: for lines that only make `place`: whatever the system says is said of it, a missing folder included.

    Raises:
        UserError: "<file>: <what the system says>; <advice>"
    """
    try:
        yield
    except OSError as error:
        if not (every or error.errno in DISK):
            raise
        named = str(place if every else error.filename or place)
        named = named.replace(str(partial), str(place)) if partial else named
        raise UserError(f"{named}: {error.strerror or error}; {advice}") from error


def write_file(path: str, text: str) -> None:
    """Writes what a user asked for into a file, whole or not at all.

    Raises:
        UserError: "<path>: cannot be written (<what the system says>); check the folder and the free space"
    """
    partial = f"{path}.partial"
    try:
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the folder and the free space") from error
