"""Published parameter counts of MoELoRA, BranchLoRA, SEMA and PCLR, from the hooks on the shapes of the 7B model; no array is made."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.methods.registry import METHODS
from proglora_jax.models.presets import llava15_7b, llava15_13b
from proglora_jax.training import shapes
from proglora_jax.training.settings import ModelSettings

PROJECTOR, PER_RANK = 20_979_712, 2_498_560


@functools.cache
def stages(name: str, total: int = 8, large: bool = False) -> list[shapes.StageShapes]:
    """All stages of a method with the papers' hyper-parameters."""
    llava = shapes.abstract_backbone(llava15_13b() if large else llava15_7b(), ModelSettings(dtype="bfloat16", param_dtype="bfloat16"))
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    return list(shapes.abstract_stages(METHODS[name](), llava, [f"task{i}" for i in range(total)], [1000] * total, mesh))


def trains(name: str, stage: int = 0, phase: int = 0, **how) -> dict[str, int]:
    """{group: parameters} of what trains in a phase."""
    found = stages(name, **how)[stage]
    method = METHODS[name]()
    mask = method.phase_mask(found.state, found.info, method.phases(found.info)[phase])
    return shapes.trainable_counts(method, found.state, mask)


def test_moelora():
    """"320M" are the experts, "350M" all that trains; the 13B model's experts are 500.7 M."""
    assert trains("moelora", total=1) == {"block": 319_815_680, "router": 9_109_504, "mm_projector": PROJECTOR}
    assert sum(trains("moelora", total=1).values()) == 349_904_896
    assert trains("moelora", total=1, large=True)["block"] == 500_695_040


def test_branchlora():
    """The published "222M"; what a task adds is a router and two keys."""
    first = trains("branchlora")
    keys = {"text_key": 4_096, "image_key": 1_024}
    assert first == {"trunk": 18_219_008, "branches": 174_063_616, "router": 9_109_504, "mm_projector": PROJECTOR} | keys
    assert sum(first.values()) - sum(keys.values()) == 222_371_840
    assert trees.count_parameters(stages("branchlora")[7].state.params["routers"]) == 8 * 9_109_504
    assert trains("branchlora", stage=7) == first  # of shapes it is not known which branches are frozen


def test_sema():
    """A block of rank 16, a row and a bias per layer; in the second phase the descriptors of the last eight layers."""
    assert trains("sema") == {"block": 39_976_960, "row": 32 * 4_096, "row_bias": 32, "mm_projector": PROJECTOR}
    assert trains("sema", phase=1) == {"descriptor": 8 * 1_052_800}
    memory = stages("sema")[3].state.memory
    assert memory["modules"].shape == (32, 8) and memory["mean"].shape == (8, 8)


def test_pclr():
    """171.6 M in learning; in integration 192 or 224 kept ranks with the 32 shared ones: 562.7 M and 643.0 M."""
    learning = trains("pclr")
    assert learning == {"block": 64 * PER_RANK, "projector_block": 851_968, "new_keys": 33 * 64 * (4_096 + 1_024)}
    assert round(sum(learning.values()) / 1e6, 1) == 171.6
    integration = trains("pclr", stage=3, phase=1)
    assert set(integration) == {"pool", "shared", "projector_pool", "projector_shared"}
    assert integration["shared"] == 32 * PER_RANK and integration["projector_shared"] == 32 * 13_312
    for kept, millions in ((192, 562.7), (224, 643.0)):
        part = sum(count for name, count in integration.items() if "pool" in name) * kept / 256
        assert round((part + 32 * (PER_RANK + 13_312)) / 1e6, 1) == millions
    found = stages("pclr")[5]
    assert found.state.params["pool"]["q_proj"]["a"].shape == (32, 4_096, 256)
    assert "teacher" not in found.state.memory


@pytest.mark.parametrize("name", ["moelora", "branchlora", "sema", "pclr"])
def test_stages_have_one_shape(name):
    """The step of a kind of phase is compiled once: parameters and memory keep their paths, shapes and dtypes over all tasks."""
    like = lambda tree: {path: (np.shape(leaf), leaf.dtype) for path, leaf in trees.flatten(tree).items()}
    first = stages(name)[0].state
    for stage in stages(name)[1:]:
        assert like(stage.state.params) == like(first.params) and like(stage.state.memory) == like(first.memory)
