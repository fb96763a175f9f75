"""The loop of a training phase: batches in, steps dispatched a little ahead, lines logged, progress saved, stops obeyed."""

from __future__ import annotations

import collections
import dataclasses
import math
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import PyTree
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import ADAPTER, Method, Phase
from proglora_jax.training import optim
from proglora_jax.training.log import RunLogger
from proglora_jax.training.processes import Round
from proglora_jax.training.settings import TrainSettings

IN_FLIGHT = 2


class Stopped(Exception):
    """The run was asked to stop and has saved its progress."""


class StopSignal:
    """Remembers that SIGTERM or SIGINT came, so that the loops can save and leave between two steps."""

    def __init__(self):
        self.requested = False

    def install(self) -> StopSignal:
        """Starts listening; a second signal ends the process at once."""

        def note(number, _frame):
            if self.requested:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.requested = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
        return self


@dataclasses.dataclass
class PhaseState:
    """What a phase changes: trainable parameters, optimizer state, the method's running statistics, and steps done."""

    trainable: PyTree
    optimizer: PyTree
    step: int = 0
    loss: float = math.nan
    running: PyTree = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """What a phase is given.

    Attributes:
        stage: index of the stage.
        total: steps of the phase.
        seed: of dropout and of the extra losses' draws.
        example_name: (task id, index) -> the example's name, for messages.
        save_every: steps between two saves of the progress.
        name: of the stage, for messages.
        phase: what the method asks of the phase.
    """

    stage: int
    total: int
    seed: int
    example_name: Callable[[int, int], str]
    save_every: int
    name: str = ""
    phase: Phase = Phase()


def train_phase(
    *, plan: PhasePlan, state: PhaseState, frozen: PyTree, memory: PyTree, llava: Any, batches: Any,
    step_function: Callable, method: Method, train: TrainSettings, mesh: Mesh, logger: RunLogger, stop: StopSignal,
    save: Callable[[PhaseState], None],
) -> PhaseState:
    """Runs the steps of a phase that are not done yet.

    Args:
        plan: what the phase is given.
        state: where it begins (or goes on).
        frozen, memory, llava: on the mesh; what the steps read.
        batches: a `data.pipeline.TrainIterator`: global batches, or this process's rows of them, from step `state.step` on.
        step_function: from `step.make_train_step`.
        save: writes the progress; called every `plan.save_every` steps and before a stop.

    Returns:
        The state after the last step.

    Raises:
        UserError: "loss is nan at step <n> of the stage <name>; the batch held ..." with the examples' names; and what `batches` raises,
            after the steps done so far are saved.
        Stopped: after a stop signal, when the progress is saved.
    """
    key = jax.random.key(plan.seed)
    waiting: collections.deque = collections.deque()
    tokens, first, told, parts = 0, state.step, Round(stop), meshes.row_share(mesh)[1]

    def settle(most: int) -> None:
        """Reads losses until at most so many steps are in flight, and logs those steps that are due."""
        nonlocal tokens
        while len(waiting) > most:
            done, metrics, rate, read, *rows = waiting.popleft()
            if told.hear(metrics):
                waiting.clear()  # the steps behind it changed nothing either
                state.step = done - 1
                if state.step > first:
                    save(state)
                raise told.failure()
            state.loss = float(metrics["loss"])
            if not math.isfinite(state.loss):
                raise UserError(_not_finite(plan, done, state.loss, *rows))
            tokens += read
            if logger.due(done):
                numbers = {name: float(value) for name, value in metrics.items()}
                logger.step(done, numbers | {"lr": rate}, tokens=tokens, memory_peak=memory_peak())
                tokens = 0

    while state.step < plan.total:
        # ---- one step, dispatched without waiting for it
        try:
            batch = told.next(batches, lambda: batches.blank(state.step))
        except UserError:
            settle(0)
            if state.step > first:
                save(state)
            raise
        rates = optim.learning_rates(train, method, state.step, plan.total, plan.phase)
        control = {
            "stage": np.int32(plan.stage), "step": np.int32(state.step), "progress": np.float32(state.step / plan.total),
            "key": key, "rates": {name: np.float32(rate) for name, rate in rates.items()}, "running": state.running,
        }
        state.trainable, state.optimizer, metrics = step_function(
            state.trainable, state.optimizer, frozen, memory, llava, meshes.put_batch(batch, mesh), control)
        state.running = metrics.pop("running", state.running)
        state.step += 1
        read = int(batch["length"].sum()) * parts
        waiting.append((state.step, metrics, rates[ADAPTER], read, batch["task_id"], batch["example"]))

        # ---- losses of the steps that have finished, a little behind; a line that is due is written while the next step runs
        saving = state.step % plan.save_every == 0
        behind = 1 if logger.due(state.step - 1) else IN_FLIGHT
        settle(0 if saving or state.step == plan.total else behind)
        stopping = told.stopping  # read once: a signal may come at any line, and what the message says must be so
        if stopping:  # several processes hear of it from the steps that have just been read
            settle(0)

        # ---- progress
        if (saving or stopping) and state.step < plan.total:
            save(state)
        if stopping:
            if state.step == plan.total:
                save(state)
            raise Stopped(f"stopped after step {state.step} of {plan.total} of the stage {plan.name}; the progress is saved")
    return state


def start_phase(trainable: PyTree, train: TrainSettings, mesh: Mesh, running: PyTree | None = None) -> PhaseState:
    """A phase's state at its beginning: a fresh optimizer (no optimizer state crosses a stage)."""
    optimizer = optim.transform(train).init(trainable)
    # A copy, because the step donates these arrays, and every stage of an isolated run begins with the same ones.
    own = jax.tree.map(jnp.copy, meshes.put_replicated(trainable, mesh))
    return PhaseState(own, meshes.put_replicated(optimizer, mesh), running=meshes.put_replicated(running or {}, mesh))


def memory_peak() -> int | None:
    """Peak bytes in use on the first device; on CPU, where the device has no count of its own, of this process."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def _not_finite(plan: PhasePlan, step: int, loss: float, task_id: np.ndarray, example: np.ndarray) -> str:
    names = [plan.example_name(int(task), int(index)) for task, index in zip(task_id, example)]
    return (
        f"loss is {loss} at step {step} of the stage {plan.name}; the batch held {', '.join(names[:8])}"
        f"{' ...' if len(names) > 8 else ''}; lower config.train.learning_rate or look at these examples. The last saved progress is kept"
    )
