"""Chooses what the backward pass computes again where the config says "auto": for each length the policy that keeps most and fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from proglora_jax.core import mesh as meshes
from proglora_jax.models.llava import Llava
from proglora_jax.models.presets import LlavaConfig
from proglora_jax.training import memory, shapes
from proglora_jax.training.memory import Load
from proglora_jax.training.settings import Settings, batch_size_of
from proglora_jax.training.shapes import StageShapes
from proglora_jax.training.step import Remat

KEEPS_MOST_FIRST = ("none", "qkvo_mlp", "qkvo", "full")
"""What "auto" chooses from; "dots" computes more again than "qkvo_mlp" and keeps more."""
UNKNOWN = "qkvo_mlp"
"""Where nobody says how much memory there is: norms, rotations and activations are computed again, of the matmuls at most XLA's scores."""


def policy_for(
    settings: Settings, llava: Llava, phases: Sequence[tuple[StageShapes, int]], bucket: tuple[int, int], mesh: Any, limit: float
) -> str:
    """The policy for one padded length; what the config names stays.

    Args:
        settings: the config.
        llava: from `shapes.abstract_backbone`.
        phases: those that train the language model, each with its rows that a device computes at once.
        bucket: (positions, label slots).
        mesh: any mesh.
        limit: bytes of a device, 0 where unknown.
    """
    if settings.model.remat != "auto":
        return settings.model.remat
    if not limit or not phases:
        return UNKNOWN

    def fits(policy: str) -> bool:
        own = with_policy(settings, policy)
        held = (memory.training_memory(own, llava, phase, Load(rows, *bucket), mesh) for phase, rows in phases)
        return max(map(memory.total, held)) <= memory.USABLE * limit

    return next(filter(fits, KEEPS_MOST_FIRST), KEEPS_MOST_FIRST[-1])


def with_policy(settings: Settings, policy: str) -> Settings:
    """The settings with another policy."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat=policy))


def choose_remat(
    settings: Settings, config: LlavaConfig, stages: Sequence[str], mesh: Any, limit: float, *, fresh: bool = False
) -> Remat:
    """The policies of a run by padded length, or the one that the config names.

    Args:
        settings: the config, attention chosen.
        config: sizes of the backbone.
        stages: names of the stages in order.
        mesh: of the run.
        limit: bytes of a device, the same in all processes; 0 where unknown.
        fresh: whether each stage is a sequence of its own.
    """
    if settings.model.remat != "auto":
        return settings.model.remat
    llava, ways = shapes.abstract_backbone(config, settings.model), settings.train.micro_batches * meshes.batch_ways(mesh)
    names = stages[:1] if fresh else stages  # what a stage holds does not depend on its task
    begun = shapes.abstract_stages(settings.method, llava, names, [1000] * len(names), mesh)
    phases = [phase for stage in begun for phase in stage.phases if not phase.phase.features]
    batch = max(batch_size_of(settings.train, name) for name in stages)
    rows = [(phase, -(-(phase.phase.batch_size or batch) // ways)) for phase in phases]
    return {bucket[0]: policy_for(settings, llava, rows, bucket, mesh, limit) for bucket in settings.data.buckets}


def in_words(remat: Remat) -> str:
    """"qkvo", or "none at 320 to 704, full at 2048 positions"."""
    if isinstance(remat, str):
        return remat
    runs: list[tuple[str, list[int]]] = []
    for positions, policy in remat.items():
        if not runs or runs[-1][0] != policy:
            runs.append((policy, []))
        runs[-1][1].append(positions)
    spans = (f"{policy} at {' to '.join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))}" for policy, lengths in runs)
    return f"{', '.join(spans)} positions"


def planning_limit(allowed: int) -> int:
    """Bytes of a device to plan with, from those that a program may use.

    These are what is left beside the runtime, which plans count as their own part: it is added here.
    """
    return allowed + int(memory.RUNTIME / memory.USABLE) if allowed else 0


def device_limit() -> int:
    """Bytes of the first device by what it says itself, by process 0 for all of them; 0 where it does not say (a CPU)."""
    limit = planning_limit((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))
    if jax.process_count() == 1:
        return limit
    from jax.experimental import multihost_utils

    # Processes that chose differently would run different programs, and wait for each other for ever.
    return int(multihost_utils.broadcast_one_to_all(np.int32(limit >> 20))) << 20
