"""Every test runs on eight simulated CPU devices with full matmul precision, parsed flags and programs compiled once per session."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # The tests compile more than they compute, and the newer emitters of fusions take more than half of XLA's time on a CPU.
    _FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# Compiled programs of the session: the first process makes the folder; workers and the runs that tests start find its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="proglora_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from absl import flags

import jax

from proglora_jax.core.host import keep_freed_memory

keep_freed_memory()  # before the first device is made
jax.config.update("jax_default_matmul_precision", "highest")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _programs_leave_with_their_file():
    """A compiled program holds some memory maps, of which a process may have 65,530; files share few programs."""
    yield
    jax.clear_caches()
