"""Freed memory stays with the process on CPU hosts: page faults of a repeated allocation; and where compiled programs are kept."""

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


def test_compiled_programs_are_kept_on_accelerators(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host.compiled_folder("auto", "cpu") == "" == host.compiled_folder("", "gpu")
    assert host.compiled_folder("auto", "gpu") == host.compiled_folder("auto", "tpu") == str(tmp_path / "proglora_jax" / "compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert host.compiled_folder("auto", "gpu") == str(tmp_path / ".cache" / "proglora_jax" / "compiled")
    assert host.compiled_folder("~/programs", "cpu") == str(tmp_path / "programs")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert host.compiled_folder("auto", "gpu") == "", "JAX's own variable goes before the default"
    assert host.compiled_folder("here", "gpu").endswith("/here")
