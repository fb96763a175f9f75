"""What the benchmarks share: which cores they run on, turns, their files, and a figure of bars."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, THEIRS, BESIDE = "#2a6fbb", "#c8792b", "#8a97a6"
"""Colours: what is measured, what it is compared with, and what is neither."""


# ------------------------------------------------------------------------------------------------------------- the machine


def hold(cores: int = 0) -> int:
    """Keeps this process to its first so many cores (0: all it has), the threads that imports have started too, and says how many.

    Pools that are made later have a thread a core of these: XLA's and torch's ask the system how many a process may use.
    """
    kept = sorted(os.sched_getaffinity(0))[: cores or None]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), kept)
    return len(kept)


def conditions() -> dict[str, Any]:
    """Cores that the process may use and the machine's load average of the last minute; call it before anything is measured."""
    return {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}


def load_of(found: Mapping[str, Any]) -> str:
    """What a text says of the load; nothing where numbers of an earlier version have none."""
    return f"; load of the machine before: {found['load']:.1f}" if "load" in found else ""


def in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, steps: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, one value a round; another one begins each round, and a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = [*calls]
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            calls[name]()  # wakes its threads, fills the caches
            began = clock()
            for _ in range(steps):
                calls[name]()
            if turn:
                found[name].append((clock() - began) / steps)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median over rounds of the ratio of two that took turns, and the lowest and highest round."""
    each = [one / other for one, other in zip(above, below, strict=True)]
    return {"ratio": statistics.median(each), "lowest": min(each), "highest": max(each)}


# --------------------------------------------------------------------------------------------------------------- the files


def read(folder: Path, name: str) -> dict[str, Any]:
    """The numbers that an earlier call wrote."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def write(folder: Path, name: str, content: Any, lines: Sequence[str], png: bytes | None = None) -> None:
    """Writes NAME.json, NAME.md and NAME.png, and prints the text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if png is not None:
        (folder / f"{name}.png").write_bytes(png)
    print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a panel: its name and value, the lowest and highest round (equal where there is one value), and a colour."""

    name: str
    value: float
    lowest: float = 0.0
    highest: float = 0.0
    colour: str = OURS


def bars(panels: Mapping[str, Sequence[Bar]], mark: float | None = None) -> bytes:
    """Panels of bars under each other, as PNG; {title: bars}, those without bars are left out; `mark` is where a line is drawn."""
    from matplotlib.figure import Figure

    from proglora_jax.continual.report_figures import png

    panels = {title: own for title, own in panels.items() if own}
    drawn = Figure(figsize=(10, 0.6 * len(panels) + 0.3 * sum(map(len, panels.values()))), dpi=110, layout="constrained")
    axes = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=[1 + len(own) for own in panels.values()])[:, 0]
    for panel, (title, own) in zip(axes, panels.items(), strict=True):
        panel.barh(range(len(own)), [bar.value for bar in own], color=[bar.colour for bar in own])
        for place, bar, end in _ends(own):
            if bar.lowest < bar.highest:
                panel.plot((bar.lowest, bar.highest), (place, place), color="#1b1f24", linewidth=1)
            text = format(bar.value, ",.0f" if bar.value >= 100 else ".3g")
            panel.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        if mark is not None:
            panel.axvline(mark, color="#1b1f24", linewidth=0.8, linestyle=":")
        panel.set_xlim(0, 1.1 * max(end for *_, end in _ends(own)))
        panel.set_yticks(range(len(own)), [bar.name for bar in own], fontsize=9)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    return png(drawn)


def _ends(own: Sequence[Bar]) -> Iterator[tuple[int, Bar, float]]:
    """(place, bar, where it and its range end)."""
    yield from ((place, bar, max(bar.value, bar.highest)) for place, bar in enumerate(own))
