"""Parameter counts of the papers from real shapes, stage by stage and without an array, and the table that a stage begins with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.methods.registry import METHODS
from proglora_jax.models.presets import PRESETS
from proglora_jax.training import shapes
from proglora_jax.training.settings import ModelSettings

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
BACKBONES = {}
BLOCK, PROJECTOR, KEY = 39_976_960, 20_979_712, 4_096


def backbone(preset: str):
    """The published model in bfloat16, as shapes."""
    if preset not in BACKBONES:
        BACKBONES[preset] = shapes.abstract_backbone(PRESETS[preset](), ModelSettings(dtype="bfloat16", param_dtype="bfloat16"))
    return BACKBONES[preset]


def stages(name: str, preset: str = "llava15_7b", tasks=TASKS, **fields) -> list[shapes.StageShapes]:
    """All stages of a method with its default hyper-parameters."""
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    return list(shapes.abstract_stages(METHODS[name](**fields), backbone(preset), tasks, [1000] * len(tasks), mesh))


def counts(stage: shapes.StageShapes) -> tuple[dict[str, int], dict[str, int]]:
    """{group: parameters} of what trains, and of what rests."""
    _, frozen = trees.partition(stage.state.params, stage.mask)
    train = shapes.trainable_counts(METHODS["zero_shot"](), stage.state, stage.mask)  # no method holds entries of shapes still
    return train, {name: trees.count_parameters(part) for name, part in frozen.items()}


UPPER = {"block": 36_229_120, "query_projector": 2_109_696, "key": KEY}  # of the light variant: 29 of 32 layers, "38M"

# method, changes -> what trains in every stage but the mm_projector, 7B
TRAINS = [
    ("lora", {}, {"block": 319_815_680}),
    ("multi_task", {}, {"block": 319_815_680}),
    ("proglora_static", {}, {"block": BLOCK}),
    ("proglora_dynamic", {}, {"block": BLOCK, "query_projector": 2_109_696, "key": KEY}),
    ("proglora_dynamic", {"rank": 64, "alpha": 128.0}, {"block": 159_907_840, "query_projector": 2_109_696, "key": KEY}),
    ("proglora_dynamic", {"rank": 128, "alpha": 256.0}, {"block": 319_815_680, "query_projector": 2_109_696, "key": KEY}),
    ("proglora_dynamic", {"proj_width": 100}, {"block": BLOCK, "query_projector": 831_588, "key": KEY}),
    ("proglora_dynamic", {"proj_width": 100, "proj_variant": "code"}, {"block": BLOCK, "query_projector": 827_392, "key": KEY}),
    ("proglora_light", {}, UPPER | {"shared": 3_747_840}),
    ("proglora_light", {"bottom": "none"}, UPPER),
    ("proglora_light", {"tie_bottom_layers": True}, UPPER | {"shared": 3_747_840 // 3}),
    ("proglora_light", {"shared_layers": 6}, UPPER | {"block": 26 * BLOCK // 32, "shared": 6 * BLOCK // 32}),
    ("lwf", {}, {"block": 319_815_680}),
    ("ewc", {}, {"block": 319_815_680}),
    ("olora", {}, {"block": BLOCK}),
    ("mocl", {}, {"block": BLOCK, "key": KEY}),
]


@pytest.mark.parametrize("name, fields, expected", TRAINS)
def test_what_trains_is_what_the_papers_count(name, fields, expected):
    for stage in stages(name, tasks=TASKS[:3], **fields):
        assert counts(stage)[0] == expected | {"mm_projector": PROJECTOR}


def test_every_method_that_trains_is_counted():
    mine = {"lora", "multi_task", "lwf", "ewc", "olora", "mocl", "proglora_static", "proglora_dynamic", "proglora_light"}
    assert {name for name, _, _ in TRAINS} >= mine
    assert counts(stages("zero_shot", tasks=TASKS[:1])[0]) == ({}, {"mm_projector": PROJECTOR})


def test_the_papers_own_sums():
    last = stages("proglora_dynamic")[-1]
    trains, rests = counts(last)
    assert sum(trains.values()) - trains["mm_projector"] == 42_090_752  # "42M"
    assert round(sum(trains.values()) / 1e6, 2) == 63.07
    assert rests == {"pool": 7 * BLOCK, "keys": 8 * KEY}
    assert rests["pool"] + trains["block"] == 319_815_680  # after eight tasks as many as MoELoRA's experts, "320M"
    assert sum(counts(stages("lora", tasks=TASKS[:1])[0])[0].values()) == 340_795_392
    assert sum(counts(stages("proglora_static", tasks=TASKS[:1])[0])[0].values()) == 60_956_672


def test_the_light_variant_stores_no_pool_below():
    trains, rests = counts(stages("proglora_light")[-1])
    assert rests == {"pool": 7 * 36_229_120, "keys": 8 * KEY}
    assert sum(trains.values()) - trains["mm_projector"] - trains["shared"] == 38_342_912  # "38M": the published count has no shared block
    assert rests["pool"] + trains["block"] == 289_832_960
    stage = stages("proglora_light")[-1]
    stored = METHODS["proglora_light"]().stored_parameters(stage.state, stage.info)
    assert stored == 289_832_960 + 3_747_840, "the shared block is stored once"
    first, second = stages("proglora_light", tasks=TASKS[:2], bottom="shared_frozen_after_first")
    assert "shared" in counts(first)[0] and counts(second)[1]["shared"] == 3_747_840


@pytest.mark.parametrize("name, copies", [("lwf", 1), ("ewc", 2)])
def test_what_is_held_beside_the_parameters(name, copies):
    """A teacher, or one information and one anchor, however many tasks there were."""
    sizes = {trees.count_parameters(stage.state.memory) for stage in stages(name)}
    assert sizes == {copies * (319_815_680 + PROJECTOR) + (name == "ewc")}


def test_13b():
    trains, rests = counts(stages("proglora_dynamic", "llava15_13b")[-1])
    assert (trains["block"], trains["mm_projector"], rests["pool"]) == (62_586_880, 31_467_520, 7 * 62_586_880)
    assert counts(stages("lora", "llava15_13b", TASKS[:1])[0])[0]["block"] == 500_695_040


CHUNKS = [({}, [7] * 8), ({"pool_chunk": 1}, list(range(8))), ({"pool_chunk": 3}, [0, 3, 3, 3, 6, 6, 6, 9])]


@pytest.mark.parametrize("fields, slots", CHUNKS)
def test_the_pool_grows_as_the_method_says(fields, slots):
    sizes = [counts(stage)[1].get("pool", 0) // BLOCK for stage in stages("proglora_static", **fields)]
    assert sizes == slots


@pytest.mark.parametrize("fields", [{"key_init": "mean_feature", "recall_targets": "recompute"}, {"routing_scope": "per_layer"}])
def test_hooks_that_look_at_samples_have_shapes_too(fields):
    found = stages("proglora_dynamic", tasks=TASKS[:3], **fields)
    layers = (32,) if "routing_scope" in fields else ()
    assert found[-1].state.params["key"].shape == (*layers, 4096)
    assert found[-1].state.memory["features"].shape == (3, 200, *layers, 4096)


def test_nothing_is_allocated_and_all_that_trains_is_float32():
    for stage in stages("proglora_dynamic", tasks=TASKS[:2]):
        leaves = trees.flatten(stage.state.params)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
        assert {leaf.dtype for path, leaf in leaves.items() if stage.mask[path]} == {jnp.dtype("float32")}  # the backbone is bfloat16


def test_shapes_are_those_of_a_real_state():
    """The same hooks with a real seed give the same paths, shapes and dtypes."""
    method, targets = METHODS["proglora_dynamic"](rank=2, recall_per_task=3), backbone("llava15_7b").targets()
    small = type(targets)(2, {"q_proj": (8, 8), "up_proj": (8, 12)}, 8, 4)
    projector = {"linear_1": {"kernel": np.ones((4, 8), jnp.bfloat16)}}
    real = method.init(small, projector, 3, 0)
    planned = jax.eval_shape(lambda: method.init(small, projector, 3, trees.SHAPES_ONLY))
    like = lambda state: {path: (np.shape(leaf), jnp.result_type(leaf)) for path, leaf in trees.flatten(vars(state)).items()}
    assert like(real) == like(planned)


def test_a_batch_has_the_fields_of_a_real_one():
    batch = shapes.abstract_batch(3, (704, 128), 336)
    assert {name: leaf.shape for name, leaf in batch.items() if leaf.ndim > 1} == {
        "tokens": (3, 704), "segments": (3, 704), "label_index": (3, 128), "labels": (3, 128), "label_mask": (3, 128),
        "image": (3, 336, 336, 3)}
    assert all(leaf.shape[0] == 3 for leaf in batch.values()) and batch["segments"].dtype == np.int8


def test_the_table_of_a_stage():
    stage = stages("proglora_dynamic")[2]
    text = shapes.describe_parameters(METHODS["proglora_dynamic"](), stage, backbone("llava15_7b").to_tree())
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["block"][1:3] == ["14", "39,976,960"] and lines["block"][-1] == "yes"
    assert lines["pool, 2 of 7 slots filled"][-1] == "no" and "279,838,720" in lines["pool, 2 of 7 slots filled"]
    assert lines["backbone/language"][2] == "6,738,939,904"
    assert text.endswith("42,090,752 train (42.1 M); blocks learned so far and now: 119,930,880 (119.9 M)")
