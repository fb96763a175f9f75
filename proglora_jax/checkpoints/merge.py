"""Merges a low-rank adapter and a projector into a model's weights: the sum in f32, one cast, and how much of the signal that cast cost.

A merged weight is W' = round(W + dW) in the format of the folder. Where dW is small beside W, most of it can fall below the last bit of
W: the table that `Merge.report` makes says how much was lost.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from proglora_jax.core.types import PyTree

_LINEAR = re.compile(r"language_model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight")
_PROJECTOR = re.compile(r"multi_modal_projector\.(\w+)\.(weight|bias)")


@dataclasses.dataclass
class Signal:
    """Sums over the elements of some weights.

    Attributes:
        weight: of W squared.
        delta: of dW squared.
        error: of (round(W + dW) - (W + dW)) squared.
        moved: number of elements with dW != 0.
        unchanged: number of those that are the same as in W after rounding.
    """

    weight: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    moved: int = 0
    unchanged: int = 0

    def __add__(self, other: Signal) -> Signal:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Signal(*(mine + theirs for mine, theirs in pairs))

    @property
    def relative(self) -> float:
        """norm(dW) / norm(W)."""
        return (self.delta / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def lost(self) -> float:
        """Norm of the rounding error over norm(dW), 0 for no change at all."""
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0

    @property
    def unchanged_share(self) -> float:
        """Share of the elements that were to change and did not."""
        return self.unchanged / self.moved if self.moved else 0.0


class Merge:
    """The change that `hf_export.save_source` takes; remembers what was lost.

    Args:
        adapter: {linear: {"a": [L, d_in, R], "b": [L, R, d_out]}}, scale and gates folded into b.
        projector: {"linear_1": {"kernel": [d_in, d_out], "bias": [d_out]}, "linear_2": ...}, in the place of the model's.
    """

    def __init__(self, adapter: PyTree, projector: PyTree):
        self.adapter, self.projector = adapter, projector
        self.signals: dict[str, Signal] = {}

    def __call__(self, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The merged values of a tensor, in `dtype`; other tensors are only cast."""
        linear, projector = _LINEAR.fullmatch(name), _PROJECTOR.fullmatch(name)
        if linear and linear[2] in self.adapter:
            leaf, layer = self.adapter[linear[2]], int(linear[1])
            delta = np.asarray(leaf["a"][layer], np.float32) @ np.asarray(leaf["b"][layer], np.float32)
            return self._cast(linear[2], array, delta.T, dtype)
        if projector:
            leaves = self.projector[projector[1]]
            new = np.asarray(leaves["kernel"] if projector[2] == "weight" else leaves["bias"], np.float32)
            return self._cast("mm_projector", array, new.T - array.astype(np.float32), dtype)
        return array.astype(dtype)

    def _cast(self, group: str, array: np.ndarray, delta: np.ndarray, dtype: np.dtype) -> np.ndarray:
        whole = array.astype(np.float32)
        weight = float(np.vdot(whole, whole))
        whole += delta
        merged = whole.astype(dtype)
        whole -= merged.astype(np.float32)
        moved = delta != 0
        same = int(np.count_nonzero((merged == array.astype(dtype)) & moved))
        found = Signal(weight, float(np.vdot(delta, delta)), float(np.vdot(whole, whole)), int(np.count_nonzero(moved)), same)
        self.signals[group] = self.signals.get(group, Signal()) + found
        return merged

    def report(self) -> str:
        """A table of what the cast cost, by linear and for all of them."""
        rows = [*sorted(self.signals.items())]
        if len(rows) > 1:
            rows.append(("all", sum(self.signals.values(), Signal())))
        lines = [f"{'merged weight':<14} {'norm(dW)/norm(W)':>17} {'signal lost':>12} {'elements unchanged':>19}"]
        lines += [f"{name:<14} {s.relative:>17.3%} {s.lost:>12.3%} {s.unchanged_share:>19.3%}" for name, s in rows]
        return "\n".join(lines)
