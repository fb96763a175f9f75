"""Which images stood blank (config.data.on_bad_image=blank), and which were cut off: by row of a training phase, and by question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from proglora_jax.data.images import ImageLoader
from proglora_jax.data.rows import EncodedRows
from proglora_jax.training.processes import in_any_process

KINDS = {
    "blank": "could not be read; a blank one stood for each of them",
    "cut": "cut off or damaged, used as far as they could be decoded",
}
"""What may be odd with an image, and what is said of several."""


class BlankRows:
    """The rows of a phase that were trained on with a blank image, or with one that is cut off; kept with the phase's progress, so that a
    stop loses none.

    Rows are kept by number, because the data may lie elsewhere when a run goes on.
    """

    def __init__(self, rows: EncodedRows, numbers: np.ndarray, loader: ImageLoader, kind: str = "blank"):
        """Args: rows: where the numbers point; numbers: those of the phase's batches; loader: reads their images; kind: "blank", "cut"."""
        self._rows, self._numbers, self._loader, self._kind = rows, np.unique(numbers), loader, kind
        self._before = np.zeros(len(rows), bool)

    def restore(self, numbers: Sequence[int]) -> None:
        """Takes up what `numbers` gave before the phase was stopped."""
        self._before[list(numbers)] = True

    def numbers(self) -> list[int]:
        """Numbers of the rows that are known to be so, whichever process read them; all processes must ask at the same point."""
        found = self._before.copy()
        if paths := _paths(self._loader, self._kind):
            found[[number for number in self._numbers if self._rows.rows[number].example.image in paths]] = True
        return np.flatnonzero(_told(found, self._loader, self._kind)).tolist()

    def images(self) -> set[str]:
        """Paths of their images; all processes must ask at the same point."""
        return {str(self._rows.rows[number].example.image) for number in self.numbers()}


def odd_rows(rows: EncodedRows, numbers: np.ndarray, loader: ImageLoader) -> dict[str, BlankRows]:
    """The rows of a phase with images that stood "blank", and with images that were "cut" off."""
    return {kind: BlankRows(rows, numbers, loader, kind) for kind in KINDS}


def odd_questions(images: Iterable[str | None], loader: ImageLoader, kind: str) -> list[bool]:
    """For the image of each question of a batch whether it is of a kind, whichever process read it; all must ask at the same point."""
    paths = _paths(loader, kind)
    return _told(np.asarray([image in paths for image in images], bool), loader, kind).tolist()


def _paths(loader: ImageLoader, kind: str) -> set[str]:
    return loader.bad if kind == "blank" else loader.cut


def _told(found: np.ndarray, loader: ImageLoader, kind: str) -> np.ndarray:
    """What any process found; where no image may stand blank, none need be asked for those."""
    return found if kind == "blank" and loader.on_bad != "blank" else in_any_process(found)
