"""On CPU hosts freed memory stays with the process, and XLA compiles quickly: processes of their own show it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from proglora_jax.core import host

CODE = """
import resource, sys
import numpy as np
from proglora_jax.core.host import keep_freed_memory
made = keep_freed_memory() if {keep} else None
for round in range(20):
    if round == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16 << 20, np.float32)
print(made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, platforms: str = "cpu") -> tuple[str, int]:
    """(what the call returned, page faults of 16 rounds of a 64 MiB array)."""
    # numpy asks for huge pages, which would hide the faults
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", CODE.format(keep=keep)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    made, count = done.stdout.split()
    return made, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_buffer_that_comes_back_costs_no_page_faults():
    made, kept = faults(True)
    if made == "False":
        pytest.skip("the C library is not glibc")
    _, given_back = faults(False)
    assert given_back > 16 * 10_000 and kept < given_back / 100


def test_hosts_of_accelerators_are_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert host.keep_freed_memory() is False
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host, "_ACCELERATORS", ("/dev/nul*",))
    assert host.keep_freed_memory() is False


def test_flags_that_are_there_stay(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert host.compile_quickly() is True
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_force_host_platform_device_count=2", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"]
    assert host.compile_quickly() is False and os.environ["XLA_FLAGS"].split() == flags
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=mine")
    assert host.compile_quickly() is False and os.environ["XLA_FLAGS"] == "--xla_backend_extra_options=mine"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert host.compile_quickly() is False and os.environ["XLA_FLAGS"] == ""


def test_xla_takes_the_flag():
    """A flag that XLA does not know would end the process."""
    code = "import jax, os; from proglora_jax.core import host; print(host.compile_quickly(), jax.jit(lambda x: x + 1)(1))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "2"]
