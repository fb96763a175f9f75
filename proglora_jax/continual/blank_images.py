"""Which images stood blank (config.data.on_bad_image=blank): by row of a training phase, and by question of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from proglora_jax.data.images import ImageLoader
from proglora_jax.data.rows import EncodedRows
from proglora_jax.training.processes import in_any_process


class BlankRows:
    """The rows of a phase that were trained on with a blank image; kept with the phase's progress, so that a stop loses none.

    Rows are kept by number, because the data may lie elsewhere when a run goes on.
    """

    def __init__(self, rows: EncodedRows, numbers: np.ndarray, loader: ImageLoader):
        """Args: rows: where the numbers point; numbers: those that the phase's batches hold; loader: what reads their images."""
        self._rows, self._numbers, self._loader = rows, np.unique(numbers), loader
        self._before = np.zeros(len(rows), bool)

    def restore(self, numbers: Sequence[int]) -> None:
        """Takes up what `numbers` gave before the phase was stopped."""
        self._before[list(numbers)] = True

    def numbers(self) -> list[int]:
        """Numbers of the rows that are known to be blank, whichever process read them; all processes must ask at the same point."""
        found = self._before.copy()
        if self._loader.bad:
            found[[number for number in self._numbers if self._rows.rows[number].example.image in self._loader.bad]] = True
        blank_allowed = self._loader.on_bad == "blank"
        return np.flatnonzero(in_any_process(found) if blank_allowed else found).tolist()

    def images(self) -> set[str]:
        """Paths of their images; all processes must ask at the same point."""
        return {str(self._rows.rows[number].example.image) for number in self.numbers()}


def blank_questions(images: Iterable[str | None], loader: ImageLoader) -> list[bool]:
    """For the image of each question of a batch whether it stood blank, whichever process read it; all must ask at the same point."""
    found = np.asarray([image in loader.bad for image in images], bool)
    return (in_any_process(found) if loader.on_bad == "blank" else found).tolist()
