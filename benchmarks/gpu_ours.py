"""The GPU benchmark's cases of our side: programs of a run, compiled a few at a time, then timed one after the other."""

from __future__ import annotations

import concurrent.futures
import gc
import time
from pathlib import Path
from typing import Any

import jax
from gpu_cases import Case, Sizes
from gpu_child import Lines, Order, attempt, speed, timed
from gpu_trace import costliest
from sides import ours
from sides.ours import Ours
from sides.rows import random_batch

from proglora_jax.training.attention_choice import choose_attention
from proglora_jax.training.loop_choice import choose_unroll
from proglora_jax.training.roofline import chip_of, training_work
from proglora_jax.training.settings import Settings, from_config

PROFILED_STEPS = 2


def run(cases: list[Case], sizes: Sizes, lines: Lines, order: Order) -> None:
    """Compiles and times cases, as many at once as there are threads to compile; one that is looked into is compiled alone."""
    llava = ours.device_llava(sizes.config, settings_of(cases[0], sizes))
    jax.block_until_ready(llava)
    waiting = list(cases)
    with concurrent.futures.ThreadPoolExecutor(order.threads) as pool:
        while waiting and not order.over:
            # its time to compile is one of the goals
            alone = [place for place, case in enumerate(waiting) if case.name in order.profile]
            most = min([order.threads, len(waiting), *(max(1, place) for place in alone)])
            batch = [waiting.pop(0) for _ in range(most)]
            jobs = [(case, pool.submit(_compiled, case, sizes, lines)) for case in batch]
            concurrent.futures.wait([job for _, job in jobs])
            while jobs:
                case, job = jobs.pop(0)  # so that what a case holds goes before the next one comes
                if not order.over:
                    _attempted(case, sizes, lines, llava, job, order)
                del job
                gc.collect()


def settings_of(case: Case, sizes: Sizes) -> Settings:
    """The settings of a run for a case; attention as it is chosen here."""
    method = {"name": "lora" if case.blocks == 1 else "proglora_dynamic", "rank": case.rank, "alpha": 2.0 * case.rank,
              "dropout": case.dropout, "a_init": "normal001"}
    model = {"dtype": sizes.dtype, "param_dtype": sizes.dtype, "attention": case.attention, "remat": case.remat, "unroll": case.unroll}
    settings = from_config({"method": method, "model": model, "data": {"root": "unused"}, "train": {"loss_norm": "global_token_mean"}})
    if case.pool == "loop":
        settings = ours.with_loop(settings)
    return choose_attention(choose_unroll(settings, jax.default_backend(), {}), jax.default_backend())[0]


def _compiled(case: Case, sizes: Sizes, lines: Lines | None = None) -> tuple[Ours, Any, float]:
    """(the side, its program, seconds); a second time the program comes from the cache on the disk."""
    if lines is not None:
        lines.write("compile", case)
    side, began = Ours(settings_of(case, sizes), sizes.config, case.blocks), time.perf_counter()
    if case.what == "train":
        program = side.compile_step(case.rows, (case.positions, sizes.labels))
    else:
        program = side.compile_generator(case.rows, case.positions, sizes.new_tokens)
    if lines is not None:
        lines.write("compiled", case)
    return side, program, time.perf_counter() - began


def _attempted(case: Case, sizes: Sizes, lines: Lines, llava: Any, job: concurrent.futures.Future, order: Order) -> None:
    """Times a case, and looks into it where that is asked for, when its result is safe."""
    calls: list[Any] = []

    def measure() -> dict[str, Any]:
        found, call = _measured(case, sizes, llava, job)
        calls.append(call)
        return found

    more = {"compile_cached_s": lambda: _compiled(case, sizes)[2], "costliest": lambda: _profiled(calls[0], order.folder)}
    attempt(lines, case, measure, more if case.name in order.profile else {})


def _measured(case: Case, sizes: Sizes, llava: Any, job: concurrent.futures.Future) -> tuple[dict[str, Any], Any]:
    """(the result, the call that was timed)."""
    side, program, compile_s = job.result()
    side.load(llava, ours.device_normal)
    batch = side.place(random_batch(sizes.config, case.rows, case.positions, sizes.labels if case.what == "train" else 0))
    if case.what == "train":
        call = lambda: side.train(program, batch)
        losses = [float(call()) for _ in range(4)]  # two programs of the same function agree in all of them
        first = {"loss": losses[0], "loss_later": losses[-1]}
    else:
        call, first = lambda: side.generate(program, batch), {}
    times = timed(call, jax.block_until_ready, sizes)
    plan, device = program.memory_analysis(), jax.devices()[0]
    known = {"attention": side.settings.model.attention, "compile_s": compile_s, "device": device.device_kind, **first}
    if plan is not None:
        parts = (plan.argument_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes, plan.temp_size_in_bytes)
        known["planned_bytes"] = sum(parts)
    # Of the process so far: of this case alone where it is the first, or the largest so far.
    known["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if case.what == "train":
        known |= _mfu(case, sizes, side, times["ms"], chip_of(device.device_kind).peak)
    return known | speed(case, times), call


def _mfu(case: Case, sizes: Sizes, side: Ours, ms: float, peak: float) -> dict[str, float]:
    """Work of a step by `roofline.training_work`, credited and in all, and the share of the chip's peak that the credited part is."""
    stage = side.stage
    cost = side.settings.method.cost(stage.state.params, stage.info, stage.phases[0].phase)
    attention = side.settings.model.attention
    work = training_work(sizes.config, side.llava.targets(), case.positions, sizes.labels, case.remat, cost, attention)
    known = {"model_flops": case.rows * work.model, "total_flops": case.rows * work.total}
    return known | ({"mfu": case.rows * work.model / (ms / 1e3) / peak, "of_peak": case.rows * work.total / (ms / 1e3) / peak}
                    if peak else {})


def _profiled(call: Any, folder: Path) -> list[dict[str, Any]]:
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED_STEPS):
            jax.block_until_ready(call())
    return costliest(folder, PROFILED_STEPS)
