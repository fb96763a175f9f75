"""The pool itself: matmuls and CPU time of one adapted linear, and how long a decoder's training step takes to compile.

    python benchmarks/pool.py          two to three minutes
    python benchmarks/pool.py --draw   tables and figure again, from the numbers that are there

One linear with one block of rank 16, and with eight: fused along rank with the product's VJP, the same fused form by plain autodiff, and
a loop over blocks as the published code has it. Matmuls are counted in the optimised program at LLaVA-1.5 7B's sizes, which is compiled
only. Times are CPU time by that of the frozen linear alone, on one core with one thread, forms in turns; so is the time to compile.
Results: benchmarks/results/pool.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_ours
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import Case, Sizes, sizes_of
from shared import BESIDE, OURS, RESULTS, ROOT, THEIRS, Bar, bars, conditions, hold, in_turns, load_of, ratio, read
from shared import write as write_files
from sides.ours import DEVIATION, Ours, looped_delta

from proglora_jax.adapters.lowrank import Pair, pooled_low_rank_group
from proglora_jax.models.presets import llava15_7b
from proglora_jax.training.flops import matmul_work

sys.path.append(str(ROOT / "tests"))

from hlo_dots import compiled_text, dots  # noqa: E402

RANK, SCALE = 16, 2.0
THREADS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def fused(x: jax.Array, pair: Pair, group: Callable = pooled_low_rank_group) -> jax.Array:
    """The product's primitive."""
    return group(x, (pair,), SCALE, "delta")[0]


def looped(x: jax.Array, pair: Pair) -> jax.Array:
    """The loop over blocks that the GPU benchmark compares with."""
    leaves = {"pool_a": pair.pool_a, "pool_b": pair.pool_b, "a": pair.a, "b": pair.b}
    return looped_delta("", leaves, None, {"pool": pair.pool_gate, "new": pair.gate}, x, scale=SCALE, rank=RANK)


# Name -> (blocks, the low-rank term, colour). The wrapped function is what the VJP belongs to.
FORMS = {
    "N=1": (1, fused, BESIDE),
    "N=8, fused": (8, fused, OURS),
    "N=8, fused, plain autodiff": (8, partial(fused, group=pooled_low_rank_group.__wrapped__), THEIRS),
    "N=8, loop over blocks": (8, looped, THEIRS),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: (rows, positions, d_in, d_out) of the linears that are counted and timed, rounds, models and layers to compile."""

    counted: tuple = ((8, 704, 4096, 4096), (8, 704, 4096, 11008))
    timed: tuple = ((1, 704, 1024, 1024), (1, 704, 1024, 2752))
    rounds: int = 25
    sizes: Sizes = Sizes(llava15_7b(), dtype="float32")
    layers: tuple = (2, 8, 32)


TINY = Plan(((2, 8, 16, 24),), ((2, 8, 16, 24),), 2, sizes_of(True), (2,))


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        return write(read(arguments.out, "pool"), arguments.out)
    # Before the first program: it makes XLA's threads.
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {THREADS}"
    found = conditions() | {"jax": jax.__version__}
    hold(1)
    write(found | measure(TINY if arguments.tiny else Plan()), arguments.out)


def measure(plan: Plan) -> dict[str, Any]:
    """All of it; each row is also printed as it comes."""
    rows: dict[str, list[dict]] = {"counted": [], "timed": [], "compiled": []}

    def note(kind: str, row: dict[str, Any]) -> None:
        rows[kind].append(row)
        print(json.dumps(row), flush=True)

    for shape in plan.counted:
        for name in FORMS:
            note("counted", count(shape, name))
    for shape in plan.timed:
        for row in timed(shape, plan.rounds):
            note("timed", row)
    for layers in plan.layers:
        for in_loop in (True, False):
            note("compiled", compile_step(plan.sizes, layers, in_loop))
    return {"rank": RANK, "rounds": plan.rounds} | rows


# ------------------------------------------------------------------------------------------------------------------ programs


def arguments_of(shape: tuple[int, int, int, int], blocks: int, dtype: str) -> dict[str, Any]:
    """Abstract input, cotangent, kernel and pair of a linear; one block has an empty pool."""
    rows, positions, d_in, d_out = shape
    array, frozen = jax.ShapeDtypeStruct, (blocks - 1) * RANK
    f32 = lambda *shape: array(shape, jnp.float32)
    pair = Pair(f32(d_in, frozen), f32(frozen, d_out), f32(rows, 1, frozen), f32(d_in, RANK), f32(RANK, d_out), f32(rows, 1, RANK))
    return {"x": array((rows, positions, d_in), dtype), "dy": array((rows, positions, d_out), dtype), "kernel": array((d_in, d_out), dtype),
            "pair": pair}


def forward(delta: Callable | None, x: jax.Array, kernel: jax.Array, pair: Pair) -> jax.Array:
    """The frozen linear, and the low-rank term if there is one."""
    y = x @ kernel
    return y if delta is None else y + delta(x, pair)


def both(delta: Callable | None, x: jax.Array, dy: jax.Array, kernel: jax.Array, pair: Pair) -> tuple:
    """Forward, and backward to x, to the trainable factors and to all gates; kernel and frozen factors get no gradient."""

    def function(x, trained):
        return forward(delta, x, kernel, dataclasses.replace(pair, **trained))

    y, pull = jax.vjp(function, x, {name: getattr(pair, name) for name in ("a", "b", "gate", "pool_gate")})
    return y, pull(dy) if delta is not None else pull(dy)[0]


def ideal(shape: tuple[int, int, int, int], blocks: int) -> tuple[int, int]:
    """Operations that are needed, forward and with backward: of backward, no gradient of what is frozen."""
    rows, positions, d_in, d_out = shape
    tokens, ends = 2 * rows * positions, d_in + d_out
    once = tokens * (d_in * d_out + blocks * RANK * ends)
    return once, 2 * once + tokens * RANK * ends


def count(shape: tuple[int, int, int, int], name: str) -> dict[str, Any]:
    """Matmuls of the compiled programs of one form in bfloat16, and their operations by the ideal's; `traced` is what XLA was given."""
    blocks, delta, _ = FORMS[name]
    given = arguments_of(shape, blocks, "bfloat16")
    once = {key: given[key] for key in ("x", "kernel", "pair")}
    row: dict[str, Any] = {"form": name, "shape": shape}
    for when, function, own, least in zip(("forward", "both"), (forward, both), (once, given), ideal(shape, blocks), strict=True):
        run = partial(function, delta)
        found = dots(compiled_text(run, *own.values()))
        row |= {f"{when}_matmuls": len(found), f"{when}_flops": sum(found), f"{when}_by_ideal": sum(found) / least,
                f"{when}_traced": matmul_work(jax.make_jaxpr(run)(*own.values())).total}
    return row | {"by_frozen": row["both_flops"] / (2 * 2 * np.prod(shape).item())}


# --------------------------------------------------------------------------------------------------------------------- times


def timed(shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    """CPU time of each form's forward and backward by that of the frozen linear, in float32, all in turns."""
    rng, calls = np.random.default_rng(0), {}
    for name, (blocks, delta, _) in {"frozen linear alone": (1, None, ""), **FORMS}.items():
        given = jax.tree.map(lambda leaf: jnp.asarray(DEVIATION * rng.standard_normal(leaf.shape), leaf.dtype),
                             arguments_of(shape, blocks, "float32"))
        calls[name] = partial(_finished, jax.jit(partial(both, delta)), given)
    seconds = in_turns(calls, rounds, clock=time.process_time)
    base = seconds["frozen linear alone"]
    least = ideal(shape, 0)[0] * 2
    return [{"form": name, "shape": shape, "ms": 1e3 * statistics.median(own), "operations": ideal(shape, FORMS[name][0])[1] / least}
            | ratio(own, base) for name, own in seconds.items() if name in FORMS]


def _finished(function: Callable, given: dict[str, Any]) -> None:
    jax.block_until_ready(function(**given))


def compile_step(sizes: Sizes, layers: int, in_loop: bool) -> dict[str, Any]:
    """CPU seconds to trace and compile the last step of ProgLoRA (dynamic) over eight tasks, with a loop over layers or without."""
    text = dataclasses.replace(sizes.config.text_config, num_hidden_layers=layers)
    sizes = dataclasses.replace(sizes, config=dataclasses.replace(sizes.config, text_config=text))
    case = Case("ours", "train", 4, 44 if sizes.tiny else 704, unroll=1 if in_loop else layers)
    side = Ours(gpu_ours.settings_of(case, sizes), sizes.config, case.blocks)
    began, cpu = time.perf_counter(), time.process_time()
    program = side.compile_step(case.rows, (case.positions, sizes.labels))
    took = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began}
    return {"layers": layers, "in_loop": in_loop, "width": text.hidden_size} | took | {"lines": program.as_text().count("\n")}


# ------------------------------------------------------------------------------------------------------------------- results


def write(found: dict[str, Any], folder: Path) -> None:
    """The numbers, the tables and the figure."""
    shape = lambda row: "{2} to {3}".format(*row["shape"])
    (rows, positions, *_), (few, short, *_) = found["counted"][0]["shape"], found["timed"][0]["shape"]
    lines = [
        "# The pool of one linear", "",
        f"`python benchmarks/pool.py`, jax {found['jax']}, one core of {found['cores']}, one thread{load_of(found)}. Rank {found['rank']}; "
        "N=8: seven frozen blocks and one that trains, a gate for each block and row. Fused is what a run does; plain autodiff is the same "
        "forward without its own VJP; the loop has a pair of matmuls for each block, as the published code.", "",
        "![Operations, CPU time and time to compile](pool.png)", "",
        "## Matmuls, counted in the compiled program", "",
        f"{rows} rows of {positions} positions, bfloat16, compiled for a CPU and not run. Backward is to the input, to the factors of the "
        "block that trains and to all gates; the kernel is frozen. Needed: without any gradient of what is frozen. By the frozen linear: "
        "operations by those of its own forward and backward to the input.", "",
        "| linear | form | matmuls, forward | with backward | operations by what is needed, forward | with backward | "
        "by the frozen linear |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(f"| {shape(row)} | {row['form']} | {row['forward_matmuls']} | {row['both_matmuls']} | {row['forward_by_ideal']:.4f} | "
          f"{row['both_by_ideal']:.4f} | {row['by_frozen']:.4f} |" for row in found["counted"]),
        "", "## CPU time, measured", "",
        f"Forward and backward by those of the frozen linear alone, {few * short} positions, float32; median of {found['rounds']} rounds "
        "in which all forms took turns (lowest and highest round). CPU time of the process: other programs disturb it through caches and "
        "memory only. The last column is what the needed operations alone would give. Ratios of a CPU say nothing of an accelerator's: "
        "[gpu.md](gpu.md).", "",
        "| linear | form | ms | by the frozen linear | needed operations |", "|---|---|---:|---:|---:|",
        *(f"| {shape(row)} | {row['form']} | {row['ms']:.1f} | {row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f}) | "
          f"{row['operations']:.2f} |" for row in found["timed"]),
        "", "## Time to compile", "",
        f"A training step of ProgLoRA (dynamic), eight tasks, decoder layers of width {found['compiled'][0]['width']}; CPU seconds of "
        "tracing and compiling on one core, once each, the first with what Python does once. `config.model.unroll` takes the loop away: on "
        "GPUs that is the default.", "",
        "| layers | loop over layers, s | no loop, s | lines of the program | no loop |", "|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for layers in dict.fromkeys(row["layers"] for row in found["compiled"]):
        loop, none = (next(row for row in found["compiled"] if (row["layers"], row["in_loop"]) == (layers, in_loop))
                      for in_loop in (True, False))
        lines.append(f"| {layers} | {loop['cpu_s']:.1f} | {none['cpu_s']:.1f} | {loop['lines']:,} | {none['lines']:,} |")
    write_files(folder, "pool", found, lines, figure(found))


def figure(found: dict[str, Any]) -> bytes:
    """A panel for the operations, one for the times, one for the compiler."""
    def bar(row, value, lowest=0.0, highest=0.0):
        return Bar(f"{row['shape'][2]} to {row['shape'][3]}, {row['form']}", value, lowest, highest, FORMS[row["form"]][2])

    steps = [Bar(f"{row['layers']} layers, {'loop' if row['in_loop'] else 'no loop'}", row["cpu_s"],
                 colour=OURS if row["in_loop"] else THEIRS) for row in found["compiled"]]
    return bars({
        "Matmuls of forward and backward, the frozen linear's two among them, counted": [
            bar(row, row["both_matmuls"]) for row in found["counted"][: len(FORMS)]],
        "Operations added to the frozen linear's forward and backward, %, counted": [
            bar(row, 100 * (row["by_frozen"] - 1)) for row in found["counted"]],
        "CPU time of forward and backward by the frozen linear's, measured (line: lowest to highest round)": [
            bar(row, row["ratio"], row["lowest"], row["highest"]) for row in found["timed"]],
        "CPU seconds to trace and compile a training step": steps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
