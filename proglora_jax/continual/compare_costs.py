"""What a run of a comparison cost, from the files that it left: parameters, seconds per step, memory."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from proglora_jax.checkpoints.integrity import read_json
from proglora_jax.continual.run_record import RunRecord
from proglora_jax.continual.stages import FINAL
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method
from proglora_jax.methods.registry import METHODS
from proglora_jax.training.log import RECORD


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of one run; None where its files do not say.

    Attributes:
        trainable: parameters that train in the stage where most do, the mm_projector included.
        stored: parameters in the checkpoints of all stages together, one that a later stage replaces counted once.
        beside: other numbers that are stored: features, statistics, a teacher.
        seconds: median seconds of a training step that runs the model; steps on stored features do not count.
        memory: peak memory of the device (of the process, where the device is a CPU), bytes.
    """

    trainable: int | None
    stored: int | None
    beside: int | None
    seconds: float | None
    memory: int | None


def cost_of(record: RunRecord, workdir: Path) -> Cost:
    """The costs of a run."""
    trainable = max((sum(counts.values()) for counts in record.counts if counts), default=0 if record.finished else None)
    stored, beside = _stored(workdir, METHODS.get(record.method, Method).stored_beside)
    seconds, memory = _steps(workdir / RECORD)
    return Cost(trainable, stored, beside, seconds, memory)


def _stored(workdir: Path, other: tuple[str, ...]) -> tuple[int | None, int | None]:
    """(parameters, other numbers) that the checkpoints hold, from the shapes that they state; `other` is `Method.stored_beside`."""
    sizes: dict[str, int] = {}
    for path in sorted((workdir / "stages").glob(f"*/{FINAL}/trees.json")):
        try:
            leaves: dict[str, Any] = read_json(path)["adapter"]
            sizes |= {name: math.prod(leaf["shape"]) for name, leaf in leaves.items() if "shape" in leaf}
        except (UserError, KeyError, TypeError):
            return None, None
    # A task's embedding serves the similarity of tasks, not the model.
    kept = {name: size for name, size in sizes.items() if not name.startswith("embedding/")}
    beside = sum(size for name, size in kept.items() if name.split("/")[0] in other)
    return (sum(kept.values()) - beside, beside) if sizes else (None, None)


def _steps(path: Path) -> tuple[float | None, int | None]:
    """(median seconds per step, largest memory peak) of a run's record.

    The first interval of each phase, which compiles, is left out, and so are phases that train on features, not on tokens.
    """
    seconds, peaks, seen = [], [], set()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None, None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or entry.get("kind") != "step":
            continue
        phase = (entry.get("stage"), entry.get("phase"))
        if phase in seen and "seconds_per_step" in entry and "supervised_tokens" in entry:
            seconds.append(entry["seconds_per_step"])
        seen.add(phase)
        peaks += [entry["memory_peak_bytes"]] if "memory_peak_bytes" in entry else []
    return (statistics.median(seconds) if seconds else None), max(peaks, default=None)
