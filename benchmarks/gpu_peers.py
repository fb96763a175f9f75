"""The GPU benchmark's cases of transformers and PEFT in torch; one that does not fit leaves a row and the next one begins."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from gpu_cases import Case, Sizes
from gpu_child import Lines, Order, attempt, speed, timed
from sides import peers
from sides.rows import random_batch

RATE = 2e-4


def run(cases: list[Case], sizes: Sizes, lines: Lines, order: Order) -> None:
    """Times cases on one model; after one that does not fit, larger ones of its kind are not tried."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, made, full = None, None, set()
    for case in cases:
        kind = (case.what, case.blocks, case.rank, case.remat, case.compiled)
        if order.over:
            return
        if kind in full:
            lines.write("result", case, error="not tried: fewer rows failed")
            continue
        if made != (case.blocks, case.rank):
            model = None
            _clear(device)
            model, made = _model(case, sizes, device), (case.blocks, case.rank)
        if not attempt(lines, case, lambda case=case, model=model: _measured(case, sizes, model, device)):
            full.add(kind)
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
    if case.compiled:
        side.forward = torch.compile(model)
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
