"""The loop saves what is done before it leaves: for a stop signal at any moment, and for a batch that cannot be made."""

from __future__ import annotations

import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.core.mesh import make_mesh
from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import method_class
from proglora_jax.training import optim
from proglora_jax.training.log import RunLogger
from proglora_jax.training.loop import PhasePlan, PhaseState, Stopped, StopSignal, memory_peak, train_phase
from proglora_jax.training.settings import TrainSettings


class Loss:
    """A loss that is being waited for: reading it runs something first."""

    def __init__(self, value: float, before=None):
        self.value, self.before = value, before

    def __float__(self) -> float:
        if self.before:
            self.before()
        return self.value


@pytest.fixture
def run(tmp_path):
    """A function that runs a phase of 20 steps, 1000 between two saves, and returns what ended it and the steps that were saved."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop, saved = StopSignal().install(), []

    def step(trainable, optimizer, frozen, memory, llava, batch, control):
        started.dispatched = int(control["step"]) + 1
        return trainable, optimizer, {"loss": losses.get(started.dispatched, Loss(1.0))}

    def batches(broken: int):
        for number in range(20):
            if number == broken:
                raise UserError("record 7: a.jpg: no such image")
            yield {"length": np.full(8, 1 + number, np.int32), "task_id": np.zeros(8, np.int32), "example": np.arange(8, dtype=np.int32)}

    losses: dict[int, Loss] = {}

    def started(broken: int = -1, log_every: int = 1000, **when: Loss):
        losses.update({int(name[4:]): loss for name, loss in when.items()})
        logger, end = RunLogger(tmp_path, log_every, False, False), None
        logger.start_phase(stage=0, stages=1, task="GQA", phase="train", steps=20, first_step=0, steps_after=0)
        with logger:
            try:
                train_phase(
                    plan=PhasePlan(0, 20, 0, lambda task, index: f"GQA record {index}", 1000, "GQA"),
                    state=PhaseState({"block": jnp.zeros(1)}, {}), frozen={}, memory={}, llava={}, batches=batches(broken),
                    step_function=step, method=method_class("lora")(), train=TrainSettings(),
                    mesh=make_mesh({"data": -1, "fsdp": 1, "model": 1}), logger=logger, stop=stop,
                    save=lambda state: saved.append((state.step, state.loss)),
                )  # fmt: skip
            except (Stopped, UserError) as error:
                end = error
        return end, saved

    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_while_a_loss_is_waited_for_saves_the_step_that_it_names(run):
    end, saved = run(step5=Loss(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert isinstance(end, Stopped) and len(saved) == 1
    assert f"stopped after step {saved[0][0]} of 20" in str(end) and 5 <= saved[0][0] <= 7, "no step is begun after the signal"


def test_a_batch_that_cannot_be_made_loses_no_step(run):
    end, saved = run(broken=9, step9=Loss(0.25))
    assert isinstance(end, UserError) and "no such image" in str(end) and saved == [(9, 0.25)]


def test_nothing_is_saved_before_the_first_step_or_after_a_loss_that_is_not_finite(run):
    end, saved = run(broken=0)
    assert "no such image" in str(end) and saved == []
    end, saved = run(broken=9, step9=Loss(float("nan")))
    assert "loss is nan at step 9" in str(end) and saved == []


def test_a_line_is_written_one_step_behind_with_the_numbers_of_its_own_step(run, tmp_path, monkeypatch):
    """So that the device has a step to do while it is written."""
    behind, tokens, step = {}, [], RunLogger.step

    def note(self, number, numbers, **more):
        tokens.append(more["tokens"])
        step(self, number, numbers, **more)

    monkeypatch.setattr(RunLogger, "step", note)
    read = lambda number: behind.setdefault(number, run.dispatched - number)
    end, saved = run(log_every=6, **{f"step{n}": Loss(n / 2, lambda n=n: read(n)) for n in range(1, 21)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [optim.learning_rates(TrainSettings(), method_class("lora")(), n - 1, 20)["adapter"] for n in (6, 12, 18, 20)]
    assert end is None and [(line["step"], line["loss"], line["lr"]) for line in lines] == [
        (6, 3.0, rates[0]), (12, 6.0, rates[1]), (18, 9.0, rates[2]), (20, 10.0, rates[3])]
    assert tokens == [8 * sum(range(a, b + 1)) for a, b in ((1, 6), (7, 12), (13, 18), (19, 20))]
    assert {n: behind[n] for n in (5, 6, 7, 12, 18, 20)} == {5: 2, 6: 1, 7: 2, 12: 1, 18: 1, 20: 0}


def test_the_peak_of_memory_on_cpu_is_the_process_s_own():
    held = np.ones(64 << 20, np.uint8)
    assert held.nbytes < memory_peak() < 64 << 30
