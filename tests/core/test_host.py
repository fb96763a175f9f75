"""What a process settles with its host, shown in processes of their own where need be: freed memory, a quiet libtpu, no torch, and more."""

from __future__ import annotations

import contextlib
import gc
import glob
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from proglora_jax import tools
from proglora_jax.core import host

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("named", ["", *host._MEMORY_NAMES])
def test_a_run_takes_most_of_a_gpu_unless_someone_says_how_much(monkeypatch, named):
    for name in host._MEMORY_NAMES:
        monkeypatch.setenv(name, "0.5")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if named:
        monkeypatch.setenv(named, "0.5")
    before = dict(os.environ)
    host.claim_gpu_memory()
    assert dict(os.environ) == before | ({} if named else {"XLA_CLIENT_MEM_FRACTION": "0.94"})


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_imports_are_kept_from_the_garbage_collector(monkeypatch, ends):
    frozen = []
    monkeypatch.setattr(host.gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with contextlib.suppress(ImportError), host.kept_for_good():
        assert not gc.isenabled()
        if ends != "well":
            raise ImportError
    assert frozen == [False] and gc.isenabled()


# ------------------------------------------------------------------------------------------------------------------------- without torch


def test_a_process_does_without_torch_unless_it_has_it_already(monkeypatch):
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "torch"})
    assert host.leave_torch_out() and host.leave_torch_out()
    assert importlib.util.find_spec("torch") is None
    sys.modules["torch"] = torch = types.ModuleType("torch")
    assert not host.leave_torch_out() and sys.modules["torch"] is torch


@pytest.mark.parametrize("command, expected", [("check-data root", True), ("convert from-hf folder", True), ("convert to-hf run", False)])
def test_only_the_export_keeps_torch(monkeypatch, command, expected):
    left_out = []
    monkeypatch.setattr(tools, "claim_gpu_memory", lambda: None)
    monkeypatch.setattr(tools, "settle_on_cpu", lambda: None)
    monkeypatch.setattr(tools, "leave_torch_out", lambda: left_out.append(True))
    monkeypatch.setattr(tools, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["tools", *command.split()])
    with pytest.raises(SystemExit):
        tools.entry()
    assert bool(left_out) is expected


# ------------------------------------------------------------------------------------------------------- where JAX looks for devices


def quiet(*names: str) -> dict[str, str]:
    """This process's environment without what names a platform."""
    return {name: value for name, value in os.environ.items() if name not in host._NAMED} | dict.fromkeys(names, "1")


def test_a_libtpu_without_a_tpu_prints_nothing():
    pytest.importorskip("libtpu")
    if any(map(glob.glob, host._ACCELERATORS)):
        pytest.skip("this host has an accelerator")
    # Two processes may look at once; libtpu then prints what it always prints, and not that it is locked.
    environment = quiet() | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = lambda code: subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    looked = run("import jax; print(jax.devices()[0].platform)")
    if not looked.stderr:
        pytest.skip("this libtpu keeps quiet by itself")
    assert looked.stdout == "cpu\n"
    done = run("from proglora_jax.core.host import settle_on_cpu\nprint(settle_on_cpu())\n"
               "import jax\nprint(jax.devices()[0].platform, settle_on_cpu())")
    assert done.stdout.split() == ["True", "cpu", "False"] and done.stderr == ""
    doctor = [sys.executable, "-m", "proglora_jax.tools", "doctor", "--config", "configs/coin_mini.py", "--devices=1"]
    done = subprocess.run(doctor, env=environment, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert "(cpu)" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("what", ["nothing", "a device file", "a plugin", "no libtpu", *host._NAMED])
def test_a_real_accelerator_is_never_hidden(monkeypatch, what):
    """Whatever may stand for one: nothing is changed."""
    monkeypatch.setenv("JAX_PLATFORMS", "")  # so that it is put back afterwards
    for name in host._NAMED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host.sys, "modules", {name: module for name, module in sys.modules.items() if name != "jax"})
    monkeypatch.setattr(host, "_ACCELERATORS", ("/dev/nul*",) if what == "a device file" else ())
    found = {"libtpu": what != "no libtpu", "jax_plugins": what == "a plugin"}
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: found[name] or None)
    monkeypatch.setattr(host.importlib.metadata, "entry_points", lambda group: ())
    if what in host._NAMED:
        monkeypatch.setenv(what, "tpu")
    before = dict(os.environ)
    assert host.settle_on_cpu() is (what == "nothing")
    assert (dict(os.environ) == before) == (what != "nothing")
