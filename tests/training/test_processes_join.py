"""How the processes of a run find each other, and which devices each of them takes."""

from __future__ import annotations

import types

import jax
import pytest
from jax._src import distributed

from proglora_jax.training.processes import join

# What SLURM tells the second of two processes, each alone on a node with eight GPUs.
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.fixture
def joined(monkeypatch):
    """(arguments of `join`, tasks per node) -> (address of process 0, number of processes, this one's, devices it sees), under SLURM."""
    state, client = distributed.State(), types.SimpleNamespace(connect=lambda: None)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", state.initialize)
    monkeypatch.setattr(state, "initialize_preemption_sync_manager", lambda: None)
    seen, chosen = [], {"jax_cuda_visible_devices": "all"}
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_client", lambda *call, **options: seen.append(call) or client)
    monkeypatch.setattr(distributed.config, "update", chosen.__setitem__)

    def run(*arguments, tasks: str) -> tuple:
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        join(*arguments)
        return *seen[0][:2], state.num_processes, chosen["jax_cuda_visible_devices"]

    return run


@pytest.mark.parametrize("arguments, tasks, devices", [
    (("here:1234", 2, 1, False), "1(x2)", "all"), (("here:1234", 2, 1, False), "2", "all"),
    (("", 0, -1, True), "1(x2)", "all"), (("", 0, -1, True), "2", "0"),
])  # fmt: skip
def test_a_process_takes_all_devices_unless_there_are_several_on_its_node(joined, arguments, tasks, devices):
    address, number, count, seen = joined(*arguments, tasks=tasks)
    assert (address.partition(":")[0], number, count, seen) == (arguments[0].partition(":")[0] or "n1", 1, 2, devices)
