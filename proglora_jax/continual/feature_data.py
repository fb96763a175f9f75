"""Batches of a phase that trains on features of the task's rows: shuffled by epoch, the same after a restart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from proglora_jax.data.errors import UserError


@dataclasses.dataclass(eq=False)
class FeatureBatches:
    """Endless iterator with the doors of `data.pipeline.TrainIterator`.

    Attributes:
        features: [n, ...] one value per row.
        numbers: i64[n] row numbers in the task, for messages.
        plan: i64[steps, B] positions in `features`.
        task: id of the task.
        share: which part of a batch's rows this process gives, and of how many.
        next_index: number of the batch that comes next.
    """

    features: np.ndarray
    numbers: np.ndarray
    plan: np.ndarray
    task: int
    share: tuple[int, int] = (0, 1)
    next_index: int = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.next_index >= len(self.plan):
            raise StopIteration
        part, parts = self.share
        rows = np.split(self.plan[self.next_index], parts)[part]
        count, self.next_index = len(rows), self.next_index + 1
        return {
            "features": self.features[rows], "length": np.zeros(count, np.int32), "task_id": np.full(count, self.task, np.int32),
            "example": self.numbers[rows].astype(np.int32),
        }  # fmt: skip

    def blank(self, number: int) -> dict[str, np.ndarray]:
        """Never asked for: features lie in memory, so that there is always a batch.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"batch {number} of features cannot be unreadable")

    def get_state(self) -> dict[str, int | str]:
        """Position and fingerprint, ready for JSON."""
        return {"next_index": self.next_index, "fingerprint": self._fingerprint()}

    def set_state(self, state: Mapping[str, int | str]) -> None:
        """Continues where `get_state` was taken.

        Raises:
            UserError: "feature batches: they were saved with other features (fingerprint 12ab..., now 34cd...); ..."
        """
        saved, found = str(state.get("fingerprint")), self._fingerprint()
        if saved != found:
            raise UserError(
                f"feature batches: they were saved with other features (fingerprint {saved[:12]}, now {found[:12]}); resume on the same "
                "kind of device with the same config, or start the stage again in a new workdir")
        self.next_index = int(state["next_index"])

    def _fingerprint(self) -> str:
        sha = hashlib.sha256(np.ascontiguousarray(self.features).tobytes())
        for part in (self.numbers, self.plan):
            sha.update(np.ascontiguousarray(part).tobytes())
        return sha.hexdigest()


def plan_rows(count: int, batch_size: int, epochs: int, max_steps: int, seed: int) -> np.ndarray:
    """i64[steps, B]: `epochs` shuffles of `count` rows cut into batches; the last of an epoch is filled from the epoch's first rows."""
    batches: list[np.ndarray] = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(count)
        batches += list(np.resize(order, -(-count // batch_size) * batch_size).reshape(-1, batch_size))
    return np.stack(batches[: max_steps or None])
