"""GPUs that are only described: names, numbers against NVIDIA's data sheets, what the plugin is asked for, and what is said without it."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from proglora_jax.core import gpus, host
from proglora_jax.core.mesh import described_devices
from proglora_jax.training.roofline import CHIPS

# Multiprocessors, GB of memory (GiB, in truth), TB/s, MB of L2, KiB of shared memory of a multiprocessor and of a block, clock in GHz.
DATA_SHEETS = {
    "a100-40gb": (108, 40, 1.555, 40, 164, 163, 1.41),
    "a100-80gb": (108, 80, 2.039, 40, 164, 163, 1.41),
    "h100": (132, 80, 3.35, 50, 228, 227, 1.98),
    "h100-pcie": (114, 80, 2.04, 50, 228, 227, 1.755),
    "h200": (132, 141, 4.8, 50, 228, 227, 1.98),
}
INSTALLED = {
    "jax-cuda13-plugin": "0.11.2", "nvidia-cuda-runtime": "13.0.96", "nvidia-cudnn-cu13": "9.24.0.43", "nvidia-cuda-nvcc": "13.5.37",
    "jax-cuda12-plugin": "0.11.2", "nvidia-cuda-runtime-cu12": "12.9.79", "nvidia-cudnn-cu12": "9.10.2.21",
    "nvidia-cuda-nvcc-cu12": "12.9.86",
}  # fmt: skip


def install(monkeypatch, packages: dict[str, str]) -> None:
    def version(package: str) -> str:
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(gpus.importlib.metadata, "version", version)


def field(config: str, name: str) -> str:
    return re.search(rf"\b{name}: (\S+)", config)[1]


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_a_gpu_is_as_its_data_sheet_says(name):
    cores, memory, bandwidth, l2, core, block, clock = DATA_SHEETS[name]
    config = gpus.target_config(gpus.GPUS[name], (13, 0), (9, 24, 0))
    assert set(DATA_SHEETS) == set(gpus.GPUS) and CHIPS[gpus.GPUS[name].kind].hbm == gpus.GPUS[name].memory
    assert int(field(config, "core_count")) == cores and float(field(config, "clock_rate_ghz")) == clock
    assert 0.98 * memory < int(field(config, "device_memory_size")) / 2**30 < memory, "what is left for programs"
    assert int(field(config, "memory_bandwidth")) == pytest.approx(bandwidth * 1e12, rel=0.002)
    assert int(field(config, "l2_cache_size")) == l2 * 2**20
    assert (int(field(config, "shared_memory_per_core")), int(field(config, "shared_memory_per_block_optin"))) == (core << 10, block << 10)
    hopper = "major: 9 feature_extension: ACCELERATED_FEATURES" in config
    assert hopper == (not name.startswith("a100")) and ("major: 8 feature_extension: NONE" in config) != hopper
    assert "dnn_version_info { major: 9 minor: 24 patch: 0 }" in config and "runtime_version { major: 13 minor: 0 patch: 0 }" in config
    assert config.count("{") == config.count("}") and f'device_description_str: "{gpus.GPUS[name].kind}"' in config


@pytest.mark.parametrize("topology, name, count", [
    ("h100", "h100", "1x1x1"), ("h100:8", "h100", "1x1x8"), ("A100-80GB:2x8", "a100-80gb", "2x1x8"), ("h200:1x4", "h200", "1x1x4"),
])  # fmt: skip
def test_hosts_without_nvlink_between_them_are_domains_of_their_own(topology, name, count):
    assert gpus.parsed(topology) == (gpus.GPUS[name], count)


@pytest.mark.parametrize("topology, sentence", [
    ("h900:8", "no such GPU is known, only a100-40gb, a100-80gb, h100, h100-pcie, h200"),
    ("gpu", "no such GPU is known, only "), ("h100-sxm", "no such GPU is known, only "),
    ("h100:", "write h100 for one GPU, h100:8 for eight of one host, h100:2x8 for two hosts with eight each"),
    ("h100:0", "write h100 for one GPU"), ("h100:2x8x3", "write h100 for one GPU"), ("h100:x8", "write h100 for one GPU"),
    ("h100:08", "write h100 for one GPU"), ("a100-80gb:8 ", "write a100-80gb for one GPU"),
])  # fmt: skip
def test_names_and_numbers_that_mean_nothing_are_one_sentence(topology, sentence):
    with pytest.raises(ValueError) as refused:
        described_devices(topology)
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


def test_names_of_gpus_and_of_tpus_are_told_apart():
    assert all(gpus.names_gpus(name) for name in (*gpus.GPUS, "H100:8", "b200", "gb200:4", "gh200", "l40s", "t4", "rtx6000", "cuda", "gpu"))
    assert not any(gpus.names_gpus(name) for name in ("v5e:4x4", "v5p:2x2x1", "v6e:2x4", "v4:2x2x1", "tpu7x:2x2x1", "v9:2x2"))


def test_the_versions_are_those_of_what_is_installed_the_newer_cuda_first(monkeypatch):
    install(monkeypatch, INSTALLED)
    assert list(gpus.compiler_versions()) == list(INSTALLED)[:4]
    options = gpus.plugin_options("h100:2x4")
    assert options["topology"] == "2x1x4"
    assert "dnn_version_info { major: 9 minor: 24 patch: 0 }" in options["target_config"]
    assert "runtime_version { major: 13 minor: 0 patch: 0 }" in options["target_config"]
    install(monkeypatch, {name: version for name, version in INSTALLED.items() if "13" not in name})
    assert "dnn_version_info { major: 9 minor: 10 patch: 2 }" in gpus.plugin_options("h100")["target_config"]
    assert "runtime_version { major: 12 minor: 9 patch: 0 }" in gpus.plugin_options("h100")["target_config"]


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
    install(monkeypatch, {})
    with pytest.raises(ValueError, match=r"CUDA plugin, which is not installed: pip install 'proglora-jax\[cuda13\]', or '.*\[cuda12\]'"):
        described_devices("h100")
    install(monkeypatch, {name: version for name, version in INSTALLED.items() if name != "nvidia-cudnn-cu13"})
    with pytest.raises(ValueError, match=r"^nvidia-cudnn-cu13 is not installed beside jax-cuda13-plugin: pip install '.*\[cuda13\]'$"):
        gpus.plugin_options("h100")


def test_the_share_of_a_gpu_is_that_of_a_run(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert host.gpu_memory_share() == 0.94
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    assert host.gpu_memory_share() == 0.8
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ValueError, match="^XLA_CLIENT_MEM_FRACTION=most: must be a number"):
        host.gpu_memory_share()
