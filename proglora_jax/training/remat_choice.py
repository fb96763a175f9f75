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
from proglora_jax.training.settings import Settings
from proglora_jax.training.shapes import StageShapes
from proglora_jax.training.step import Remat

KEEPS_MOST_FIRST = ("none", "qkvo_mlp", "qkvo", "full")
"""What "auto" chooses from; "dots" computes more again than "qkvo_mlp" and keeps more."""
UNKNOWN = "qkvo_mlp"
"""Where nobody says how much memory there is: only norms, rotations and activations are computed again."""


def policy_for(settings: Settings, llava: Llava, stage: StageShapes, load: Load, mesh: Any, limit: float) -> str:
    """The policy for one padded length; what the config names stays.

    Args:
        settings: the config.
        llava: from `shapes.abstract_backbone`.
        stage: the largest stage.
        load: what a device computes at once.
        mesh: any mesh.
        limit: bytes of a device, 0 where unknown.
    """
    if settings.model.remat != "auto":
        return settings.model.remat
    if not limit:
        return UNKNOWN
    need = lambda policy: memory.total(memory.training_memory(with_policy(settings, policy), llava, stage, load, mesh))
    fitting = (policy for policy in KEEPS_MOST_FIRST if need(policy) <= memory.USABLE * limit)
    return next(fitting, KEEPS_MOST_FIRST[-1])


def with_policy(settings: Settings, policy: str) -> Settings:
    """The settings with another policy."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat=policy))


def choose_remat(settings: Settings, config: LlavaConfig, stages: Sequence[str], batch: int, mesh: Any, limit: float) -> Remat:
    """The policies of a run by padded length, or the one that the config names.

    Args:
        settings: the config, attention chosen.
        config: sizes of the backbone.
        stages: names of the stages of one sequence.
        batch: rows of the largest step.
        mesh: of the run.
        limit: bytes of a device, the same in all processes; 0 where unknown.
    """
    if settings.model.remat != "auto":
        return settings.model.remat
    llava = shapes.abstract_backbone(config, settings.model)
    *_, stage = shapes.abstract_stages(settings.method, llava, stages, [1000] * len(stages), mesh)
    own = [phase.batch_size for phase in settings.method.phases(stage.info) if not phase.features]
    rows = -(-max([*own, batch]) // (settings.train.micro_batches * meshes.batch_ways(mesh)))
    return {bucket[0]: policy_for(settings, llava, stage, Load(rows, *bucket), mesh, limit) for bucket in settings.data.buckets}


def in_words(remat: Remat) -> str:
    """"qkvo", or "none at 704, full at 2048 positions"."""
    if isinstance(remat, str):
        return remat
    return f"{', '.join(f'{policy} at {positions}' for positions, policy in remat.items())} positions"


def device_limit() -> int:
    """Bytes of the first device as it says itself, by process 0 for all of them; 0 where it does not say (a CPU)."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if jax.process_count() == 1:
        return limit
    from jax.experimental import multihost_utils

    # Processes that chose differently would run different programs, and wait for each other for ever.
    return int(multihost_utils.broadcast_one_to_all(np.int32(limit >> 20))) << 20
