"""Which samples of an earlier task are kept and replayed, and how they join the rows of the current one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Example, TrainRow


def replay_count(similarity: float, per_task: int) -> int:
    """How many samples of an earlier task to replay: the less similar, the more.

    round_half_up((1 - similarity) * per_task), clipped to [0, per_task].

    Args:
        similarity: of the earlier task to the current one, in [0, 1].
        per_task: phi, most samples per earlier task.

    Raises:
        UserError: "similarity nan: must be a number", "recall_per_task=-1: must be 0 or more"

    Source: ProgLoRA, number of recalled samples n_{p,i}.
    """
    if not math.isfinite(similarity):
        raise UserError(f"similarity {similarity}: must be a number; check the task embeddings")
    if per_task < 0:
        raise UserError(f"recall_per_task={per_task}: must be 0 or more")
    # Rounded first: (1 - 0.9) * 25 is 2.4999999999999996 in binary and 2.5 on paper.
    wanted = math.floor(round((1.0 - similarity) * per_task, 9) + 0.5)
    return max(0, min(per_task, wanted))


def replay_indices(size: int, count: int, seed: int, task: str) -> np.ndarray:
    """Positions of the samples to keep of one task, drawn without replacement.

    They are the first `count` of one fixed permutation, so a smaller selection is always a prefix of a larger one.

    Args:
        size: examples in the task.
        count: how many are wanted; fewer come back if the task is smaller.
        seed: any integer.
        task: task name; every task has its own permutation.

    Returns:
        i64[min(count, size)]
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(b"replay"), zlib.crc32(task.encode())])
    return rng.permutation(size)[: max(0, count)]


def task_rows(examples: Sequence[Example], task_id: int, weight: float = 1.0, positions: Iterable[int] | None = None) -> list[TrainRow]:
    """Rows of a task's examples, all of them or those at the given positions."""
    chosen = range(len(examples)) if positions is None else positions
    return [TrainRow(examples[int(i)], task_id, int(i), weight) for i in chosen]


def mix_rows(current: Sequence[TrainRow], replayed: Iterable[Sequence[TrainRow]], weight: float) -> list[TrainRow]:
    """Current rows followed by replayed rows, these with the given loss weight; the batch plan shuffles them.

    Args:
        current: rows of the current task.
        replayed: one sequence of rows per earlier task.
        weight: lambda, the recall weight.

    Raises:
        UserError: "recall_weight=-1.0: must be a number of 0 or more"
    """
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"recall_weight={weight}: must be a number of 0 or more")
    return [*current, *(TrainRow(row.example, row.task_id, row.index, weight) for rows in replayed for row in rows)]
