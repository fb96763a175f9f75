"""What a lower-triangular accuracy matrix says about a sequence of tasks: ACC (= MFN), MAA, BWT, FWT and PCLR's names.

`accuracy[i][k]` is the accuracy in percent on task k after stage i (both from 0), absent (None, or a shorter row) for k > i;
a whole row may be None too.
"""

from __future__ import annotations

import dataclasses
import decimal
from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None] | None]
Row = Sequence[float]


@dataclasses.dataclass(frozen=True)
class SequenceMetrics:
    """The numbers of one sequence, in percent, not rounded; None where one cannot be had.

    Attributes:
        stages: number of finished stages that the numbers cover.
        acc: mean accuracy after the last of them; ACC in the first paper, MFN in the second, Avg.ACC in PCLR's.
        maa: mean over stages of the mean accuracy on the tasks so far.
        bwt: backward transfer, mean change since right after training; the divisor counts the last task too.
        fwt: forward transfer against training on each task alone; None without those results.
        new_acc: mean accuracy right after training (PCLR's New.ACC).
        forgetting: mean loss of the tasks before the last (PCLR's Forgetting); None for one stage.
    """

    stages: int
    acc: float | None
    maa: float | None
    bwt: float | None
    fwt: float | None
    new_acc: float | None
    forgetting: float | None


def finished_stages(accuracy: Matrix) -> int:
    """Number of leading stages whose rows are complete (every task up to their own is scored)."""
    for stage, row in enumerate(accuracy):
        if row is None or len(row) <= stage or any(value is None for value in row[: stage + 1]):
            return stage
    return len(accuracy)


def triangle(accuracy: Matrix) -> list[list[float]]:
    """The finished stages of a matrix as ragged rows: row i holds the i + 1 tasks seen so far."""
    return [[float(value) for value in accuracy[stage][: stage + 1]] for stage in range(finished_stages(accuracy))]


def diagonal(accuracy: Matrix) -> list[float]:
    """Accuracy on each task right after it was trained, for the finished stages."""
    return [row[-1] for row in triangle(accuracy)]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean.

    Raises:
        ValueError: "mean of no values"
    """
    if not values:
        raise ValueError("mean of no values")
    return sum(values) / len(values)


def final_average(final: Row) -> float:
    """ACC (= MFN = Avg.ACC): mean of the last row of the matrix."""
    return mean(final)


def mean_average_accuracy(accuracy: Matrix) -> float:
    """MAA: mean over stages i of the mean accuracy on tasks 1..i after stage i."""
    return mean([mean(row) for row in triangle(accuracy)])


def backward_transfer(final: Row, right_after: Row) -> float:
    """BWT: mean over all N tasks of final minus right-after accuracy; divides by N though the last term is 0."""
    return _mean_difference(final, right_after)


def forward_transfer(right_after: Row, isolated: Row) -> float:
    """FWT: mean over tasks of right-after accuracy minus the accuracy of training on that task alone."""
    return _mean_difference(right_after, isolated)


def forgetting(final: Row, right_after: Row) -> float | None:
    """PCLR's Forgetting: mean over the first N - 1 tasks of right-after minus final accuracy; None for N = 1."""
    return _mean_difference(right_after[:-1], final[:-1]) if len(final) > 1 else None


def _mean_difference(one: Row, other: Row) -> float:
    if len(one) != len(other):
        raise ValueError(f"rows of different lengths: {len(one)} and {len(other)}")
    return mean([a - b for a, b in zip(one, other)])


def metrics(accuracy: Matrix, isolated: Sequence[float | None] | None = None) -> SequenceMetrics:
    """All metrics of the finished stages of a matrix.

    Args:
        accuracy: [stages][tasks], percent; None or missing where not scored.
        isolated: accuracy of training on each task alone, in the order of the tasks; FWT needs it for every finished task.

    Returns:
        The metrics over the finished stages; all None if there is none.

    Source: CoIN's metrics as used by the ProgLoRA papers; PCLR for New.ACC and Forgetting.
    """
    rows = triangle(accuracy)
    if not rows:
        return SequenceMetrics(0, None, None, None, None, None, None)
    final, right_after = rows[-1], diagonal(accuracy)
    alone = list(isolated or ())[: len(rows)]
    complete = len(alone) == len(rows) and all(value is not None for value in alone)
    return SequenceMetrics(
        stages=len(rows),
        acc=final_average(final),
        maa=mean_average_accuracy(rows),
        bwt=backward_transfer(final, right_after),
        fwt=forward_transfer(right_after, alone) if complete else None,
        new_acc=mean(right_after),
        forgetting=forgetting(final, right_after),
    )


def mean_so_far(accuracy: Matrix) -> list[float]:
    """Mean accuracy over the tasks seen, after each finished stage."""
    return [mean(row) for row in triangle(accuracy)]


def round_half_up(value: float, digits: int = 2) -> float:
    """Rounds to `digits` decimals with halves away from zero, unmoved by the last binary digits of a mean.

    Python's own round would give 56.39 or 56.40 for 56.395 depending on how the float came to be.
    """
    exact = decimal.Decimal(repr(round(float(value), digits + 6)))
    # Adding zero turns -0.0 into 0.0, which would print with a sign.
    return float(exact.quantize(decimal.Decimal(1).scaleb(-digits), rounding=decimal.ROUND_HALF_UP)) + 0.0


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divisor n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return (sum((value - centre) ** 2 for value in values) / (len(values) - 1)) ** 0.5
