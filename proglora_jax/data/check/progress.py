"""A progress bar for people: drawn only where standard error is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more units are done; may be called from several threads.

    Args:
        title: what is being done.
        total: units in all.
        unit: name of a unit.
    """
    with tqdm(total=total, desc=title, unit=f" {unit}", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update
