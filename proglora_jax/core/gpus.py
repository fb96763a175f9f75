"""GPUs to compile for where there is none: what XLA must know of them, how many are asked for, and what compiles for them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re

_LIKE_A_GPU = re.compile(r"(cuda|gpu|nvidia|rtx|[abhlt]\d|g[bh]\d)", re.IGNORECASE)
# CUDA's major version -> packages of JAX's plugin, of the CUDA runtime, of cuDNN and of ptxas; JAX takes the first that is there, too.
_PACKAGES = {
    13: ("jax-cuda13-plugin", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc"),
    12: ("jax-cuda12-plugin", "nvidia-cuda-runtime-cu12", "nvidia-cudnn-cu12", "nvidia-cuda-nvcc-cu12"),
}  # fmt: skip
# The same for all of GPUS. Shared memory: what a block has without asking for more.
_LIMITS = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048, "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64, "shared_memory_per_block": 48 << 10, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as CUDA describes it.

    Attributes:
        kind: JAX's device kind.
        capability: compute capability, whole numbers: 9 is 9.0.
        cores: streaming multiprocessors.
        lanes: float32 units of each.
        clock_ghz: highest clock of the multiprocessors.
        memory: bytes, as CUDA counts them.
        bandwidth: of the memory, bytes per second.
        l2: bytes of the second-level cache.
        shared: bytes of shared memory of a multiprocessor; a block may ask for 1 KiB less.
    """

    kind: str
    capability: int
    cores: int
    lanes: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared: int


# Sources: NVIDIA's data sheets and the CUDA C++ Programming Guide (limits by compute capability); bytes of memory, bandwidth and cache as
# devices report them, from XLA's descriptions (xla/backends/gpu/target_config/specs), the H200's memory from what CUDA's allocator says in
# reports of users. Memory differs by some 0.1 % with driver and ECC.
GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 8, 108, 64, 1.41, 42_331_013_120, 1_555_200_000_000, 40 << 20, 164 << 10),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 40 << 20, 164 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 50 << 20, 228 << 10),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 9, 114, 128, 1.755, 84_942_979_072, 2_039_040_000_000, 50 << 20, 228 << 10),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, int(139.72 * 2**30), 4_800_000_000_000, 50 << 20, 228 << 10),
}
"""By the name that `tools compile --topology` takes."""


def names_gpus(topology: str) -> bool:
    """Whether a topology's name is one of GPUs, known or not, and not of a TPU slice ("v5e:4x4")."""
    return bool(_LIKE_A_GPU.match(topology))


def parsed(topology: str) -> tuple[Gpu, str]:
    """(the GPU, how many in the words of JAX's plugin: NVLink domains x hosts of a domain x GPUs of a host).

    Args:
        topology: "h100" is one GPU, "h100:8" eight of one host, "h100:2x8" two hosts with eight each, without NVLink between them.

    Raises:
        ValueError: for another name or number.
    """
    name, colon, count = topology.lower().partition(":")
    if name not in GPUS:
        raise ValueError(f"no such GPU is known, only {', '.join(GPUS)}")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", count if colon else "1")
    if not match:
        raise ValueError(f"write {name} for one GPU, {name}:8 for eight of one host, {name}:2x8 for two hosts with eight each")
    return GPUS[name], f"{match[1] or 1}x1x{match[2]}"


def target_config(gpu: Gpu, cuda: tuple[int, int], cudnn: tuple[int, int, int]) -> str:
    """What XLA's compiler asks of a GPU, its GpuTargetConfigProto as text.

    Args:
        gpu: one of GPUS.
        cuda: version of the CUDA runtime, major and minor.
        cudnn: version of cuDNN.
    """
    extension = "ACCELERATED_FEATURES" if gpu.capability >= 9 else "NONE"  # sm_90a: wgmma and TMA
    numbers = _LIMITS | {
        "core_count": gpu.cores, "fpus_per_core": gpu.lanes, "clock_rate_ghz": gpu.clock_ghz, "device_memory_size": gpu.memory,
        "memory_bandwidth": gpu.bandwidth, "l2_cache_size": gpu.l2, "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared - 1024,
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in numbers.items())
    version = lambda name, parts: f"{name} {{ " + " ".join(f"{part}: {n}" for part, n in zip(("major", "minor", "patch"), parts)) + " }"
    return "\n".join([
        "gpu_device_info {", fields, f"  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}", "}",
        'platform_name: "CUDA"', version("dnn_version_info", cudnn), version("runtime_version", (*cuda, 0)),
        f'device_description_str: "{gpu.kind}"',
    ])  # fmt: skip


def compiler_versions() -> dict[str, str]:
    """{package: version} of what compiles for GPUs: JAX's CUDA plugin first, then the CUDA runtime, cuDNN and ptxas.

    Raises:
        ValueError: says what to install.
    """
    found = {major: names for major, names in _PACKAGES.items() if _version(names[0])}
    if not found:
        raise ValueError("JAX compiles for GPUs through its CUDA plugin, which is not installed: pip install 'proglora-jax[cuda13]', or "
                         "'proglora-jax[cuda12]'; it needs no GPU")
    major, names = next(iter(found.items()))
    missing = [name for name in names if not _version(name)]
    if missing:
        raise ValueError(f"{missing[0]} is not installed beside {names[0]}: pip install 'proglora-jax[cuda{major}]'")
    return {name: _version(name) for name in names}


def plugin_options(topology: str) -> dict[str, str]:
    """What JAX's plugin is asked to describe a topology of GPUs.

    Raises:
        ValueError: as `parsed` and `compiler_versions`.
    """
    gpu, count = parsed(topology)
    _, runtime, cudnn, _ = (tuple(int(part) for part in version.split(".")[:3]) for version in compiler_versions().values())
    return {"target_config": target_config(gpu, runtime[:2], cudnn), "topology": count}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
