"""Whether the rows of every step can be split evenly over groups, micro-batches and devices: asked once, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from proglora_jax.continual.stages import plan_stages
from proglora_jax.core.mesh import batch_ways
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Phase, TaskInfo
from proglora_jax.training.settings import Settings, TrainSettings

LATE = 2
"""1 / LATE of a batch is asked again at once with the whole cap: with CoIN's prompts and caps that takes about what the batch does with
room for short answers. Fewer at once would cost models that talk long more steps."""


def check_rows(settings: Settings, tasks: tuple[str, ...], mesh: Any) -> None:
    """Refuses a run of which some stage, however late, could not be trained on this mesh.

    Raises:
        UserError: "config.train: batches of <rows> rows cannot be split over <n> devices: ..." and the like.
    """
    if problem := split_problem(settings, step_rows(settings, tasks), batch_ways(mesh)):
        raise UserError(f"config.train: {problem}")


def step_rows(settings: Settings, tasks: tuple[str, ...]) -> dict[str, int]:
    """{stage: rows of a step}; a phase that has its own number is named behind its stage. Phases on features take what fits the devices."""
    stages, found = plan_stages(tasks, settings.method, settings.run.protocol), {}
    for stage in (stage for stage in stages if stage.train):
        total = 1 if stage.fresh else len(stages)
        info = TaskInfo(stage.index, stage.name, total, 1, np.full(stage.index, np.nan, np.float32), settings.run.seed)
        size = settings.train.batch_sizes.get(stage.name, settings.train.batch_size)
        found |= {row_name(stage.name, phase): phase.batch_size or size for phase in settings.method.phases(info) if not phase.features}
    return found


def row_name(stage: str, phase: Phase) -> str:
    """What the rows of a phase are called in messages."""
    return f"{stage}, phase {phase.name}" if phase.batch_size else stage


def split_problem(settings: Settings, rows: Mapping[str, int], ways: int) -> str:
    """Which batches cannot be split evenly, and what could; "" where all can.

    Micro-batches of uneven parts would run, but the compiler then lets devices compute the same rows, and memory is planned for fewer.

    Args:
        settings: the config.
        rows: from `step_rows`.
        ways: devices that share a batch.
    """
    # Where replayed rows have a mean of their own there are no groups, but in the first stage, which replays nothing.
    grouped = dict(list(rows.items())[:1]) if settings.method.replays_apart else rows
    return _uneven(rows, settings.train, ways) or _uneven_groups(grouped, settings.train, ways)


def even_parts(rows: Mapping[str, int], ways: int) -> list[int]:
    """Numbers of micro-batches that split every batch evenly over the devices."""
    most = min(rows.values()) // ways
    return [count for count in range(1, most + 1) if not any(size % (ways * count) for size in rows.values())]


def _uneven(rows: Mapping[str, int], train: TrainSettings, ways: int) -> str:
    """What devices and micro-batches do not divide."""
    parts = train.micro_batches
    if any(size % ways for size in rows.values()):
        misfits = {name: size for name, size in rows.items() if size % ways}
        return (f"batches of {_listed(misfits.values())} rows cannot be split over {ways} devices: use {_divisors(rows)} device(s), or "
                f"other config.train.batch_sizes ({_nearest(misfits, train, ways)}; or configs/coin.py:batches=coin_scripts)")
    if any(size % (ways * parts) for size in rows.values()):
        near = min(even_parts(rows, ways), key=lambda count: abs(count - parts / ways))
        return f"micro-batches are split unevenly over {ways} device{'s' * (ways > 1)}: --config.train.micro_batches={near} is even"
    return ""


def _uneven_groups(rows: Mapping[str, int], train: TrainSettings, ways: int) -> str:
    """What the groups of `train.loss_norm` do not divide."""
    misfits = {name: size for name, size in rows.items() if size % _group(train)}
    if not misfits:
        return ""
    field = f"loss_groups={train.loss_groups}" if train.loss_groups else f"loss_group_size={train.loss_group_size}"
    sizes, near = _listed(misfits.values()), _nearest(misfits, train, ways)
    return f"{field} does not divide batches of {sizes} rows: use rows that it divides ({near})"


def _group(train: TrainSettings) -> int:
    """What the rows of a step must be a multiple of for its loss."""
    return 1 if train.loss_norm != "micro_batch_mean" else train.loss_groups or train.loss_group_size


def _nearest(misfits: Mapping[str, int], train: TrainSettings, ways: int) -> str:
    """For each batch the sizes below and above it that devices and groups divide."""
    unit = math.lcm(ways, _group(train))
    near = {name: (size // unit * unit, -(-size // unit) * unit) for name, size in misfits.items()}
    return ", ".join(f"{name} {f'{low} or ' if low else ''}{high}" for name, (low, high) in near.items())


def _divisors(rows: Mapping[str, int]) -> str:
    """Numbers of devices that divide every batch, in words."""
    most = math.gcd(*rows.values())
    numbers = [str(count) for count in range(1, most + 1) if most % count == 0]
    return " or ".join(filter(None, (", ".join(numbers[:-1]), numbers[-1])))


def _listed(sizes: Any) -> str:
    return ", ".join(map(str, sorted(set(sizes))))


def late_rows(rows: int, ways: int) -> int:
    """Questions at once of those that are asked again with the whole cap on answers.

    Args:
        rows: of a batch of questions that are asked for the first time.
        ways: devices that share a batch.
    """
    return max(ways, rows // LATE // ways * ways)
