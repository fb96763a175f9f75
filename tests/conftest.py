"""Every test runs on eight simulated CPU devices with full matmul precision, parsed flags and programs compiled once per session."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from proglora_jax.core import host

# The imports and the tracing below make objects by the million, nearly all of which stay; the collector would look at them all the time.
gc.set_threshold(100_000, 50, 50)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_extra_options" not in os.environ["XLA_FLAGS"] and os.environ.get("TESTS_WITH_EMITTERS") != "newer":
    # The tests compile more than they compute, and the newer emitters of fusions take more than half of XLA's time on a CPU. With the older
    # ones two programs that have a computation in common may differ in its last bit; tests/methods/test_first_stage.py asks for the newer.
    os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    # A program in one part: to cut it into 32, which threads compile, takes a sixth of the compiler's time.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if "xla_disable_hlo_passes" not in os.environ["XLA_FLAGS"]:
    # XLA checks its own work after each of its passes, which takes another sixth.
    os.environ["XLA_FLAGS"] += " --xla_disable_hlo_passes=hlo-verifier"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Without the costly optimisations programs compile in half the time; they are run a few times only. On a GPU they are what is tested.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
host.keep_freed_memory()
# Compiled programs of the session: the first process makes the folder; workers and the runs that tests start find its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="proglora_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.03")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from absl import flags

import jax
from jax._src.interpreters import mlir

jax.config.update("jax_default_matmul_precision", "highest")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

# Files that take longest, which begin first, so that no worker has one left when the others are done.
_LONG = (
    "test_resume", "test_runner", "test_processes", "test_resume_phases", "test_literal_pclr", "test_expert_invariants",
    "test_routing_places", "test_battery_programs", "test_first_stage", "test_compile_ahead", "test_battery",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Files go to the workers in the order below, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files in front."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there before the first test stays; the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """name -> a module of benchmarks/, which finds those beside it as when it is run."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _one_context_lowers_a_file():
    """JAX makes a context of MLIR for each program, which takes a quarter of the time that a single operation takes to compile."""
    make = getattr(mlir, "make_ir_context", None)  # not public: without it the tests are slower
    if make is not None:
        mlir.make_ir_context = functools.cache(make)
    yield
    if make is not None:
        mlir.make_ir_context = make


@pytest.fixture(autouse=True, scope="module")
def _programs_leave_with_their_file():
    """A compiled program holds memory maps, of which a process may have 65,530; files share few programs, but many small operations."""
    yield
    if _crowded():
        jax.clear_caches()


def _crowded() -> bool:
    """Whether this process has 20,000 memory maps or 3 GB; true where nobody can say."""
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/self/statm", encoding="ascii") as sizes:
            return sum(1 for _ in maps) > 20_000 or int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 3e9
    except OSError:
        return True
