"""Remat "auto": by memory and length, the same in every place that asks, and a step that takes its policy from a batch's length."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_memory import GB, last_stage, settings_of
from test_shapes import backbone

from proglora_jax.continual.doctor_memory import MemoryPlan
from proglora_jax.continual.doctor_plan import planned_stages
from proglora_jax.core import mesh as meshes
from proglora_jax.models.presets import PRESETS
from proglora_jax.training import memory, remat_choice, step
from proglora_jax.training.memory import Load
from proglora_jax.training.remat_choice import choose_remat, in_words, policy_for, with_policy

TASKS = tuple("abcdefgh")
MESH = meshes.abstract_mesh({"data": 1}, 1)


def chosen(limit_gb: float, rows: int = 16, **changes) -> dict[int, str]:
    settings = settings_of(model__remat="auto", train__batch_size=rows, train__batch_sizes={}, **changes)
    return choose_remat(settings, PRESETS["llava15_7b"](), TASKS, MESH, limit_gb * GB)


def test_more_memory_keeps_more_and_longer_rows_less():
    by_memory = [chosen(limit)[704] for limit in (24, 48, 80, 141)]
    order = remat_choice.KEEPS_MOST_FIRST[::-1]
    places = [order.index(policy) for policy in by_memory]
    assert places == sorted(places) and by_memory[0] == "full" and len(set(by_memory)) >= 3, by_memory
    by_length = [order.index(policy) for policy in chosen(141).values()]
    assert by_length == sorted(by_length, reverse=True) and by_length[0] > by_length[-1]


def test_what_is_chosen_fits_and_what_keeps_more_does_not():
    settings, llava = settings_of(model__remat="auto"), backbone("llava15_7b")
    stage, load = last_stage(settings_of(), llava), Load(16, 704, 128)
    policy = policy_for(settings, llava, [(stage, 16), (stage, 8)], (704, 128), MESH, 80 * GB)
    need = lambda name: memory.total(memory.training_memory(with_policy(settings, name), llava, stage, load, MESH))
    kept = remat_choice.KEEPS_MOST_FIRST
    assert need(policy) <= memory.USABLE * 80 * GB < need(kept[kept.index(policy) - 1])


def test_a_named_policy_stays_and_unknown_memory_recomputes_no_matmul():
    assert choose_remat(settings_of(model__remat="qkvo"), PRESETS["llava15_7b"](), TASKS, MESH, 1.0) == "qkvo" == in_words("qkvo")
    assert set(chosen(0).values()) == {"qkvo_mlp"}
    assert chosen(1)[704] == "full", "where nothing fits, the run may still: the estimate is one"
    assert in_words({704: "none", 2048: "full"}) == "none at 704, full at 2048 positions"
    assert in_words({320: "none", 640: "none", 704: "none", 960: "qkvo", 2048: "full"}) == (
        "none at 320 to 704, qkvo at 960, full at 2048 positions")


def test_micro_batches_and_devices_share_the_rows():
    parts = lambda batch: settings_of(model__remat="auto", train__micro_batches=4, train__batch_size=batch, train__batch_sizes={})
    four = choose_remat(parts(64), PRESETS["llava15_7b"](), TASKS, MESH, 80 * GB)
    # The parts' gradients are summed, which takes those of a block and the projector, 63 million in float32, a second time.
    assert four == chosen(80 - 4 * 0.0631 / memory.USABLE) != chosen(80, rows=64)
    assert choose_remat(parts(256), PRESETS["llava15_7b"](), TASKS, meshes.abstract_mesh({"data": 4}, 4), 80 * GB) == four
    alone = choose_remat(parts(64), PRESETS["llava15_7b"](), TASKS, MESH, 80 * GB, fresh=True)
    order = remat_choice.KEEPS_MOST_FIRST.index
    assert all(order(alone[length]) <= order(four[length]) for length in four), "one stage alone has no pool"


def test_the_plan_of_doctor_says_what_a_run_does():
    settings, llava = settings_of(model__remat="auto", train__batch_size=16, train__batch_sizes={}), backbone("llava15_7b")
    plan = MemoryPlan.of(settings, llava, planned_stages(settings, llava, MESH), MESH, 80 * GB)
    wanted = chosen(80)
    assert {bucket[0]: plan.settled(bucket).model.remat for bucket in settings.data.buckets} == wanted
    assert f"remat auto, by memory: {in_words(wanted)}" in plan.text()
    assert plan.peak() == max(memory.total(plan.training(bucket)) for bucket in settings.data.buckets)


def test_a_step_takes_the_policy_of_its_length():
    batch = lambda positions: {"tokens": np.zeros((2, positions), np.int32)}
    assert [step.policy_at({8: "none", 12: "full"}, batch(length)) for length in (8, 12)] == ["none", "full"]
    assert step.policy_at("dots", batch(3)) == "dots"
    with pytest.raises(KeyError):
        step.policy_at({8: "none"}, batch(9))


def test_what_a_device_says_is_beside_what_the_runtime_takes(monkeypatch):
    """At every limit that just holds a policy without the runtime, that policy is chosen."""
    settings, llava = settings_of(model__remat="auto"), backbone("llava15_7b")
    stage, load = last_stage(settings_of(), llava), Load(16, 704, 128)
    for policy in remat_choice.KEEPS_MOST_FIRST[1:]:
        parts = memory.training_memory(with_policy(settings, policy), llava, stage, load, MESH)
        need = sum(part.bytes for part in parts if part.name != "runtime") / memory.USABLE
        assert need < memory.total(parts) / memory.USABLE
        device = type("Device", (), {"memory_stats": lambda self, need=need: {"bytes_limit": int(need) + 2}})()
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert policy_for(settings, llava, [(stage, 16)], (704, 128), MESH, remat_choice.device_limit()) == policy


def test_a_device_that_does_not_say_has_no_limit():
    assert jax.default_backend() == "cpu" and remat_choice.device_limit() == 0
