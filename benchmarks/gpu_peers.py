"""The GPU benchmark's cases of transformers and PEFT in torch, batches growing until one does not fit or is no quicker."""

from __future__ import annotations

import gc
import time
from typing import Any

import gpu_cases
import torch
from gpu_cases import Case, Sizes
from gpu_child import NOT_TRIED, Lines, Order, attempt, speed, timed
from sides import peers
from sides.rows import random_batch

RATE = 2e-4
GAIN = 1.02
"""By what factor more rows must raise samples a second for still more to be tried."""


class Growth:
    """Which kinds of cases need not be tried with more rows, from what was found with fewer."""

    def __init__(self, cases: list[Case], known: dict[str, float | None]):
        """Args: cases: all, fewer rows first; known: as in `Order`."""
        self._best: dict[tuple, float] = {}
        self._enough: dict[tuple, str] = {}
        for case in cases:
            if case.name in known and not self.enough(case):
                self.note(case, known[case.name])

    def enough(self, case: Case) -> str:
        """Why a case need not be tried; "" where it must."""
        return self._enough.get(self._kind(case), "")

    def note(self, case: Case, speed: float | None) -> None:
        """Takes what was found: samples a second, None for a failure."""
        kind = self._kind(case)
        if speed is None:
            self._enough[kind] = "fewer rows failed"
        elif speed < GAIN * self._best.get(kind, 0.0):
            self._enough[kind] = f"fewer rows gained less than {GAIN - 1:.0%} over still fewer"
        self._best[kind] = max(speed or 0.0, self._best.get(kind, 0.0))

    @staticmethod
    def _kind(case: Case) -> tuple:
        return case.what, case.blocks, case.rank, case.remat, case.compiled


def run(cases: list[Case], sizes: Sizes, lines: Lines, order: Order) -> None:
    """Times cases on one model; where more rows fail or are no quicker, still more are not tried."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, made = None, None
    growth = Growth([case for series in gpu_cases.series(sizes.tiny) for case in series if case.side == "peers"], order.known)
    for case in cases:
        if order.over:
            return
        if why := growth.enough(case):
            lines.write("result", case, error=f"{NOT_TRIED}: {why}")
            continue
        if made != (case.blocks, case.rank):
            model = None
            _clear(device)
            model, made = _model(case, sizes, device), (case.blocks, case.rank)
        found = attempt(lines, case, lambda case=case, model=model: _measured(case, sizes, model, device))
        growth.note(case, found and found["samples_per_s"])
        for leaf in model.parameters():
            leaf.grad = None
        _clear(device)


def _model(case: Case, sizes: Sizes, device: str) -> Any:
    model = peers.random_model(sizes.config.to_hf(), sizes.dtype, device)
    return peers.attach(model, case.blocks, case.rank, 2.0 * case.rank, case.dropout)


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measured(case: Case, sizes: Sizes, model: Any, device: str) -> dict[str, Any]:
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    peers.set_checkpointing(model, case.what == "train" and case.remat == "full")
    side, dtype = peers.Trainer(model, RATE), getattr(torch, sizes.dtype)
    labels = sizes.labels if case.what == "train" else 0
    batch = peers.tensors(random_batch(sizes.config, case.rows, case.positions, labels), labels, device, dtype)
    known: dict[str, Any] = {"attention": "sdpa", "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    began = time.perf_counter()
    peers.compile_layers(model, case.compiled)
    if case.what == "train":
        call = lambda: side.train(batch)
        known["loss"] = float(call())
    else:
        call = lambda: side.generate(batch, sizes.new_tokens)
    if case.compiled:
        known["compile_s"] = time.perf_counter() - began
    times = timed(call, wait, sizes)
    if device == "cuda":
        known["peak_bytes"] = torch.cuda.max_memory_allocated()
    return known | speed(case, times)
