"""The processes of a run: how they find each other, agree on stopping with every batch, and leave when one of them is lost.

Processes of one run must run the same programs in the same order, or they wait for each other for ever. So what one of them learns alone
(a signal to stop, an image that cannot be read) travels as a flag with its rows of the next batch; the program takes the largest flag of
all devices, and every process reads it from the results of the same step. That costs no message of its own, and nobody acts alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from proglora_jax.core.mesh import FLAG
from proglora_jax.data.errors import UserError

GO_ON, STOP, FAILED = 0, 1, 2
# A process that is silent for so long is given up, and the others end; the machine's own limit is 100 s.
HEARTBEAT_SECONDS = 30
_PATIENCE_SECONDS = 10
LOST = 76
"""Exit code where another process, or this one's devices, are lost: started again, the run goes on. Where JAX notices first, it aborts."""


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Around the wait for the other processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        print(f"error: the other processes did not come ({_first_line(error)}); start the run again", file=sys.stderr, flush=True)
        os._exit(LOST)


@_waiting()
def join(address: str, count: int, number: int, auto: bool) -> None:
    """Connects the processes of a run of several; nothing to do for a run of one.

    Args:
        address: host:port of process 0.
        count: how many processes there are; 0 where it is not said.
        number: which of them this one is.
        auto: JAX finds the others by itself, as on Cloud TPU slices and under SLURM or Open MPI.

    Raises:
        UserError: for arguments that do not fit together, and where JAX cannot tell the other processes.
    """
    if count > 1 and not (address and 0 <= number < count):
        raise UserError(f"--num_processes={count}: needs --coordinator_address=host:port and --process_id from 0 to {count - 1}, "
                        f"got '{address}' and {number}")
    if count > 1:
        # JAX would still look for a scheduler, and under SLURM take one device: the one with this process's number on its node.
        jax.distributed.initialize(address, count, number, cluster_detection_method="deactivate",
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif auto:
        # The same guess is right for a process per device, and wrong for a single one on its node; an empty list means all devices.
        single = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        try:
            jax.distributed.initialize(local_device_ids=[] if single else None, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except ValueError as error:
            raise UserError(f"--distributed: JAX finds no other processes here ({str(error).strip().splitlines()[0]}); give "
                            "--coordinator_address, --num_processes and --process_id instead") from error


@contextlib.contextmanager
def leave_together() -> Iterator[None]:
    """Around a run: an error in one of several processes ends this one at once, so that the others notice; alone it changes nothing.

    Python's own end would wait for the other processes, which wait for this one in a program that it will never join. The exit code is 1
    for what would fail again, LOST for what another process, or a device, has done.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, GeneratorExit):
            raise
        logging.flush()
        _say(error)
        if isinstance(error, UserError):  # where all have agreed on the error, all come here, and leave in good order
            waiting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            waiting.start()
            waiting.join(_PATIENCE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST if _is_lost(error) else 1)


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(error: BaseException) -> None:
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif _is_lost(error):
        print(f"error: process {jax.process_index()} of {jax.process_count()} was left by another one, or lost its devices "
              f"({_first_line(error)}); the "
              "log of the process that ended first says why. Start the run again: it goes on from what was saved", file=sys.stderr)
    else:
        traceback.print_exception(error)


class Round:
    """What this process says and hears while batches are worked through; in a run of one process it adds nothing to the batches."""

    def __init__(self, stop: Any):
        """Args: stop: the run's `loop.StopSignal`."""
        self._stop, self._error, self._heard = stop, None, GO_ON
        self._alone = jax.process_count() == 1

    def next(self, batches: Iterator[Mapping[str, np.ndarray]], blank: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch, with this process's flag.

        Args:
            batches: where it comes from.
            blank: makes one of the same shapes to stand in for a batch that cannot be read.

        Raises:
            UserError: in a run of one process, what reading raised; in others that is raised by `failed`, in all of them.
        """
        if self._alone:
            return dict(next(batches))
        batch = None
        try:
            batch = next(batches) if self._error is None else None
        except UserError as error:
            self._error = error
        flag = FAILED if self._error else STOP if self._stop.requested else GO_ON
        batch = blank() if batch is None else batch
        return {**batch, FLAG: np.full(len(next(iter(batch.values()))), flag, np.int32)}

    def hear(self, results: dict[str, Any]) -> bool:
        """Takes the flag out of the results of a step; True if some process could not read its rows, and the step changed nothing."""
        self._heard = max(self._heard, int(results.pop(FLAG, GO_ON)))
        return self._heard == FAILED

    @property
    def stopping(self) -> bool:
        """Whether the run is to stop: as all processes have heard it."""
        return self._stop.requested if self._alone else self._heard == STOP

    def failure(self) -> UserError:
        """The error of the process that could not read its rows; in the others a sentence that points there."""
        return self._error or UserError("another process of the run could not read its rows; its log says which. The progress is saved")


def asked_to_stop(stop: Any) -> bool:
    """Whether any process was asked to stop; all processes must ask at the same point."""
    return bool(in_any_process(np.asarray(stop.requested)))


def from_chief(value: Any) -> Any:
    """What process 0 gives, in all processes; theirs is not looked at. All processes must ask at the same point.

    Args:
        value: anything that JSON gives back as it was.
    """
    if jax.process_count() == 1:
        return value
    chief = jax.process_index() == 0
    text = json.dumps(value).encode() if chief else b""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    sent = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)  # few shapes: each is compiled
    sent[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8)[:size].tobytes())


def in_any_process(holds: np.ndarray) -> np.ndarray:
    """bool[...] whether something holds in any process, element by element; all processes must ask at the same point."""
    if jax.process_count() == 1:
        return holds
    return np.any(multihost_utils.process_allgather(holds), axis=0)
