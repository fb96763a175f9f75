"""What a process settles with its host: how much of a GPU it takes, what it does without, where devices and programs are sought."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator

# mallopt's parameters (malloc.h) and what each is set to.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -8, -4, -1, -2
_SETTINGS = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 1 << 26))
# Device files of NVIDIA and AMD GPUs and of TPUs.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
# Any of these says that somebody has settled where JAX runs, or where its TPU is.
_NAMED = ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "TPU_LIBRARY_PATH")
# The second name is the former one; JAX refuses to have both.
_MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_MEMORY_SHARE = "0.94"


def claim_gpu_memory() -> None:
    """Lets JAX take 94 % of a GPU's memory instead of 75 %, unless the environment says how much; call it before JAX makes a device.

    What remains, 4.8 GB of 80, is for CUDA, its libraries and NCCL.
    """
    if not any(name in os.environ for name in _MEMORY_NAMES):
        os.environ[_MEMORY_NAMES[0]] = _MEMORY_SHARE


def gpu_memory_share() -> float:
    """Share of a GPU's memory that a run lets JAX take: what the environment says, or what `claim_gpu_memory` would put there.

    Raises:
        ValueError: "XLA_CLIENT_MEM_FRACTION=<value>: must be a number"
    """
    name = next((name for name in _MEMORY_NAMES if name in os.environ), "")
    try:
        return float(os.environ[name]) if name else float(_MEMORY_SHARE)
    except ValueError as error:
        raise ValueError(f"{name}={os.environ[name]}: must be a number, the share of a GPU's memory that JAX may take") from error


def settle_on_cpu() -> bool:
    """Lets JAX take the CPU at once where libtpu is installed but no accelerator is there; call it before JAX is imported.

    libtpu is also the compiler of `tools compile` and of the tests. Without a TPU each start would print its errors (accelerator type and
    worker hostnames could not be determined) and go on with the CPU. A host counts as one without accelerator if it has no device file of
    any, no plugin of JAX for another kind is installed, and no variable of the environment names a platform or a TPU.

    Returns:
        Whether that was done; False elsewhere, where nothing is changed.
    """
    if "jax" in sys.modules or any(name in os.environ for name in _NAMED) or importlib.util.find_spec("libtpu") is None:
        return False
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if plugins or not _cpu_only():
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"  # processes that this one starts need not look either
    return True


def leave_torch_out() -> bool:
    """Makes this process do without torch; call it before transformers is imported.

    transformers imports torch for a tokenizer, too, where it is installed; a run has no other use for it. Without, a run starts with a
    third less CPU time (5.3 s became 3.7 s until the report of a finished run of coin_mini; transformers 5.24, torch 2.13).

    Returns:
        Whether that was done; False where torch is imported already, where nothing is changed.
    """
    if sys.modules.get("torch") is not None:
        return False
    sys.modules["torch"] = None  # Python's way to say that a module cannot be imported
    return True


@contextlib.contextmanager
def kept_for_good() -> Iterator[None]:
    """What is made within, as by imports, is never looked at by Python's garbage collector, now or later; nothing large may be made there.

    Imports make a million objects, nearly all of which stay: to look for those that do not took a second of the four of CPU time that it
    took to go through a finished run of coin_mini.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> bool:
    """On a CPU-only host with glibc, stops malloc from returning freed memory to the kernel; call it before JAX makes a device.

    A step on the CPU takes its buffers by malloc and frees them at its end. By default glibc maps and unmaps them each time, so that
    every page is cleared and faulted in again in every step. One arena that grows and never shrinks ends that: a scan of 8 matmuls with
    its gradient went from 46,900 page faults a step and 20 % of the CPU time in the kernel to 9,300-14,000 and 5 % (jax 0.10.2, glibc
    2.36; benchmarks/host_memory.py). The price is memory that lies idle between two steps: the embedded benchmark's peak went from 1.48 to
    1.64 GB.

    Returns:
        Whether the settings were made; False elsewhere, where nothing is changed.
    """
    if not sys.platform.startswith("linux") or not _cpu_only():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all([mallopt(parameter, value) == 1 for parameter, value in _SETTINGS])


def compiled_folder(stated: str, platform: str) -> str:
    """Folder of the persistent compile cache; "" for none.

    Args:
        stated: what the config says: a folder, "" or "auto". That is a folder of the user's cache on accelerators, where a large model's
            step compiles for minutes, and none on CPUs: a program from there could ask for instructions that another host does not have.
        platform: of the devices, as JAX calls it.
    """
    if stated != "auto":
        return os.path.abspath(os.path.expanduser(stated)) if stated else ""
    # JAX has read its own variable already, and it names what someone wants.
    if platform == "cpu" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return ""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "proglora_jax", "compiled")


def _cpu_only() -> bool:
    named = os.environ.get("JAX_PLATFORMS", "")
    if named:
        return named == "cpu"
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
