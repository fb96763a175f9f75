"""Reads a trace of jax.profiler: which operations of a device a step spends its time in."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import jax

TOP = 16
_AROUND = ("while", "call", "conditional")  # their time is that of what they run


def costliest(folder: Path, steps: int, top: int = TOP) -> list[dict[str, Any]]:
    """The costliest kernels (on a CPU: operations) of a traced program, all devices together.

    Args:
        folder: what `jax.profiler.trace` wrote to.
        steps: that were traced.
        top: how many.

    Returns:
        [{"kernel": name, "operation": the HLO operation or "", "ms": a step, "share": of all of them, "calls": a step}, ...].
    """
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for path in sorted(folder.rglob("*.xplane.pb")):
        for name, operation, ms in _events(jax.profiler.ProfileData.from_file(str(path))):
            times[name, operation].append(ms)
    total = sum(map(sum, times.values()))
    found = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {"kernel": name, "operation": operation, "ms": sum(ms) / steps, "share": sum(ms) / total, "calls": len(ms) / steps}
        for (name, operation), ms in found
    ]


def _events(profile: Any):
    """(kernel, HLO operation, milliseconds) of what ran on devices; on a CPU of what its threads ran for a program."""
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or list(profile.planes):
        streams = [line for line in plane.lines if line.name.startswith("Stream")]  # a GPU's other lines sum these up again
        for line in streams or plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                operation = str(stats.get("hlo_op", ""))
                if (operation or streams) and not operation.startswith(_AROUND):
                    yield _short(event.name), _short(operation), event.duration_ns / 1e6


def _short(name: str) -> str:
    """Without the number that makes an operation's name its own: the same kernel of every layer counts together."""
    return re.sub(r"[._]\d+$", "", name)[:120]
