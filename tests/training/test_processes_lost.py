"""How a process of several ends: with a code that tells an error of the run from the loss of another process."""

from __future__ import annotations

import jax
import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.training import processes

LOST = [jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset by peer"), jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed")]
FAILED = [UserError("config.method.rank=0: must be at least 1"), KeyError("block"),
          jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")]  # fmt: skip


@pytest.fixture(autouse=True)
def several(monkeypatch):
    """A run of two processes whose end can be watched."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(processes.os, "_exit", leave)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)


@pytest.mark.parametrize("error, code", [*((error, processes.LOST) for error in LOST), *((error, 1) for error in FAILED)])
def test_what_would_fail_again_has_another_exit_code_than_a_lost_process(error, code, capsys):
    with pytest.raises(SystemExit) as end, processes.leave_together():
        raise error
    assert end.value.code == code
    assert ("left by another one" in capsys.readouterr().err) == (code == processes.LOST)


def test_processes_that_do_not_come_are_lost_too(monkeypatch, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nDetails")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(SystemExit) as end:
        processes.join("localhost:1", 2, 1, False)
    assert end.value.code == processes.LOST and "did not come (DEADLINE_EXCEEDED: Barrier timed out.)" in capsys.readouterr().err
