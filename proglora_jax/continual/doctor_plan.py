"""The stages of a config with their rows, steps and questions, from the table of tasks; no file is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from proglora_jax.continual.answering import other_images
from proglora_jax.continual.stages import Stage, plan_stages
from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import ORDERS, TASKS, task_order
from proglora_jax.methods.base import Replay
from proglora_jax.models.llava import Llava
from proglora_jax.training import shapes
from proglora_jax.training.settings import Settings, batch_size_of


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """A training phase that runs the language model.

    Attributes:
        batch: rows of a step.
        steps: of the phase.
        shapes: the method's state as it begins.
    """

    batch: int
    steps: int
    shapes: shapes.StageShapes


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """What a stage will do.

    Attributes:
        number: place in the run, from 0.
        name: what it is called.
        train_rows: own rows; 0 where nothing trains.
        replayed: rows of earlier tasks, at most (as if no two tasks were alike).
        batch: rows of a step of the first phase.
        phases: those that run the model; those on stored features cost next to nothing.
        questions: asked afterwards, with images in another way as well where the config says so.
        shapes: the method's state.
    """

    number: int
    name: str
    train_rows: int
    replayed: int
    batch: int
    phases: tuple[PlannedPhase, ...]
    questions: int
    shapes: shapes.StageShapes

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def rows_passed(self) -> int:
        """Rows of all these steps."""
        return sum(phase.steps * phase.batch for phase in self.phases)


def planned_stages(settings: Settings, llava: Llava, mesh: Any) -> list[PlannedStage]:
    """All stages of a run.

    Raises:
        UserError: for tasks and protocols that a run would refuse.
    """
    order = settings.data.tasks
    tasks = task_order(order if order in ORDERS else [name.strip() for name in order.split(",")])
    stages = plan_stages(tasks, settings.method, settings.run.protocol)
    sizes = [train_rows(settings, name) for name in tasks]
    rows = [sum(sizes[task] for task in stage.train) for stage in stages]
    if stages[0].fresh:
        states = [next(shapes.abstract_stages(settings.method, llava, [stage.name], [size], mesh)) for stage, size in zip(stages, rows)]
    else:
        states = list(shapes.abstract_stages(settings.method, llava, [stage.name for stage in stages], rows, mesh))
    asked = [questions(settings, name) * (2 if other_images(settings, name) else 1) for name in tasks]
    return [_planned(settings, stage, own, sizes, sum(asked[task] for task in stage.evaluate), state)
            for stage, own, state in zip(stages, rows, states)]


def train_rows(settings: Settings, task: str) -> int:
    """Training rows of a task: the embedded benchmark's, or those of the published file."""
    data = settings.data
    size = data.embedded_train_size if data.benchmark == "embedded" else TASKS[task].train_records
    return min(size, data.train_examples) if data.train_examples else size


def questions(settings: Settings, task: str) -> int:
    """Questions of a task that are asked."""
    size = settings.data.embedded_test_size if settings.data.benchmark == "embedded" else TASKS[task].eval_questions
    return min(size, settings.evaluate.subset_of(task) or size)


def steps_of(settings: Settings, rows: int, replay: Replay | None, replayed: int, batch: int, epochs: int = 0) -> int:
    """Optimizer steps of a phase, as data/plan.py cuts them; `epochs` 0 takes the config's."""
    train = settings.train
    if train.max_steps:
        return train.max_steps
    if replay and replay.mix == "concat":
        rows += replayed
    elif replay and replayed:
        batch -= max(1, round(batch * replay.share))
    full, rest = divmod(rows, batch)
    return (epochs or train.epochs) * (full + (rest > 0 and settings.data.remainder == "wrap"))


def _planned(settings: Settings, stage: Stage, own: int, sizes: list[int], asked: int, state: shapes.StageShapes) -> PlannedStage:
    if not state.phases:
        return PlannedStage(stage.number, stage.name, 0, 0, 0, (), asked, state)
    replay = settings.method.replay(state.info)
    replayed = sum(min(count, size) for count, size in zip(replay.counts, sizes)) if replay else 0
    batch = batch_size_of(settings.train, stage.name)
    phases = []
    for one in (one for one in state.phases if not one.phase.features):
        size = one.phase.batch_size or batch
        phases.append(PlannedPhase(size, steps_of(settings, own, replay, replayed, size, one.phase.epochs), one))
    if not all(phase.steps for phase in phases):
        raise UserError(f"config.train.batch_size={batch}: the stage {stage.name} has only {own} rows; lower it or set "
                        "config.data.remainder=wrap")
    return PlannedStage(stage.number, stage.name, own, replayed, batch, tuple(phases), asked, state)
