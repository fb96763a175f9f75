"""Memory, operations and time of a training step against the number of tasks, for every method (python benchmarks/growth.py --help).

    python benchmarks/growth.py             everything
    python benchmarks/growth.py --no-time   memory and operations only, which do not depend on what else the machine does
    python benchmarks/growth.py --draw      tables and figure again, from the numbers that are there

The model is the embedded one with the settings of configs/coin_mini.py. For a sequence of 1, 2, 4 ... 32 tasks the step of the last stage
is compiled from shapes. Bytes are the compiler's own plan (arguments and temporaries), operations those of the step's matmuls. Times are
ratios: each method's step, that of LoRA with the config's rank, and that of LoRA with as many ranks as the method's adapter has in all, frozen
ones included, take turns. Results: benchmarks/results/growth.json, growth.md and growth.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shared import RESULTS, ROOT, read
from shared import write as write_files

from proglora_jax.checkpoints.sources import read_config
from proglora_jax.continual.compare_figures import line_style
from proglora_jax.continual.report_figures import png
from proglora_jax.continual.session import model_folder
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.methods.base import Phase
from proglora_jax.methods.registry import METHODS, NAMES
from proglora_jax.training import optim, shapes
from proglora_jax.training.config_file import load_config
from proglora_jax.training.flops import matmul_work
from proglora_jax.training.programs import place_backbone, placed
from proglora_jax.training.settings import Settings, from_config
from proglora_jax.training.step import make_train_step

TASKS, ROWS_OF_TASK = (1, 2, 4, 8, 16, 32), 1600
ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of one phase in the last stage that has it, as shapes of its arguments; `ranks` of its adapter in all, `stage` from 0."""

    name: str
    phase: Phase
    step: object
    arguments: tuple
    ranks: int
    stage: int


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-time", action="store_true", help="leave the times out")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=[name for name in NAMES if not METHODS[name].joint])
    parser.add_argument("--tasks", nargs="+", type=int, default=TASKS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        return write(**read(RESULTS, "growth"))
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    rows: list[dict] = []
    known: dict = {}
    baseline = None if arguments.no_time else Timed(next(programs("lora", 1, mesh)))
    for count in arguments.tasks:
        for method in arguments.methods:
            for program in programs(method, count, mesh):
                rows.append({"method": program.name, "tasks": count} | costs(program, known) | timed(program, baseline, mesh))
                print(json.dumps(rows[-1]), flush=True)
    write(rows, {"jax": jax.__version__, "platform": jax.devices()[0].platform})


def programs(method: str, count: int, mesh, *overrides: str) -> Iterator[Program]:
    """The steps of a method at the end of a sequence of so many tasks, one per phase that runs the language model."""
    settings = from_config(load_config(str(ROOT / f"configs/coin_mini.py:method={method}"), ["--config.data.root=unused", *overrides]))
    llava = shapes.abstract_backbone(read_config(Path(model_folder("embedded")), None), settings.model)
    tasks, found = [f"task{index}" for index in range(count)], {}
    for stage in shapes.abstract_stages(settings.method, llava, tasks, [ROWS_OF_TASK] * count, mesh):
        for place, one in enumerate(stage.phases):
            if not one.phase.features:
                cost = settings.method.cost(one.state.params, one.info, one.phase)
                found[one.phase.name] = (place, one, cost.frozen + cost.up)
    for place, one, ranks in found.values():
        yield _program(settings, llava, f"{method}, {one.phase.name}" if place else method, one, ranks, mesh)


def _program(settings: Settings, llava, name: str, one: shapes.StageShapes, ranks: int, mesh) -> Program:
    same, train, phase, state = meshes.replicated(mesh), settings.train, one.phase, one.state
    trainable, frozen = trees.partition(state.params, one.mask)
    moments = jax.eval_shape(optim.transform(train).init, trainable)
    batch = shapes.abstract_batch(train.batch_size, settings.data.buckets[0], llava.config.vision_config.image_size)
    number = lambda kind: jax.ShapeDtypeStruct((), kind)
    control = {
        "stage": number(jnp.int32), "step": number(jnp.int32), "progress": number(jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
        "rates": {group: number(jnp.float32) for group in optim.learning_rates(train, settings.method, 0, 1, phase)},
        "running": state.carry.get("running", {}),
    }
    held = [placed(part, same) for part in (trainable, moments, frozen, state.memory)]
    step = make_train_step(settings.method, train, settings.model.remat, False, mesh, phase.program())
    given = place_backbone(llava, mesh), placed(batch, meshes.batch_sharding(mesh)), placed(control, same)
    return Program(name, phase.program(), step, (*held, *given), ranks, one.info.index)


def costs(program: Program, known: dict) -> dict[str, float]:
    """What the compiler plans for a step, bytes, and the operations of its matmuls.

    A step depends on its method, its phase and the shapes of its arguments: where these are as with fewer tasks, so are the costs.
    """
    shape = (program.name, str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), program.arguments[:4])), program.phase)
    if shape not in known:
        known[shape] = _costs(program)
    return known[shape]


def _costs(program: Program) -> dict[str, float]:
    traced = program.step.trace(*program.arguments)
    plan = traced.lower().compile().memory_analysis()
    trainable, moments, frozen, memory = program.arguments[:4]
    return {
        "held_bytes": sum(map(trees.count_bytes, (trainable, moments, frozen, memory))),
        "argument_bytes": plan.argument_size_in_bytes, "temporary_bytes": plan.temp_size_in_bytes, "flops": matmul_work(traced.jaxpr).total,
        "trainable": trees.count_parameters(trainable), "frozen": trees.count_parameters(frozen), "memory_bytes": trees.count_bytes(memory),
    }


# ----------------------------------------------------------------------------------------------------------------- times


class Timed:
    """A step on arrays: small random parameters, and a batch whose rows have an image, an instruction and an answer."""

    def __init__(self, program: Program):
        rng = np.random.default_rng(0)
        filled = [jax.tree.map(lambda leaf: _filled(rng, leaf), part) for part in program.arguments]
        self.llava, self.step = filled[4], program.step
        stage = program.arguments[6]["stage"]  # LwF asks its teacher in later stages only
        filled[6] |= {"stage": jax.device_put(np.full(stage.shape, program.stage, stage.dtype), stage.sharding)}
        # Where a run puts them: a step on arrays that lie elsewhere would compile again for its own results.
        batch = {name: jax.device_put(value, program.arguments[5][name].sharding)
                 for name, value in _batch(rng, program.arguments[5], self.llava.config).items()}
        self.state, self.rest = filled[:2], [*filled[2:5], batch, filled[6]]
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        """One step, to its end."""
        began = time.perf_counter()
        *self.state, metrics = self.step(*self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began

    def compiles(self) -> int:
        """How many programs the step was compiled to."""
        return self.step._cache_size()


def _filled(rng: np.random.Generator, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), leaf.sharding)
    normal = jnp.issubdtype(leaf.dtype, jnp.floating)
    values = 0.02 * rng.standard_normal(leaf.shape) if normal else np.zeros(leaf.shape)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)


def _batch(rng: np.random.Generator, like, config) -> dict:
    """Rows that fill the batch's shape."""
    (count, positions), labels, side = like["tokens"].shape, like["labels"].shape[1], config.vision_config.image_size
    answer, patches = min(2, labels), config.image_tokens
    kinds = [(1, codes.TEMPLATE), (patches, codes.IMAGE), (positions - patches - answer - 1, codes.INSTRUCTION), (answer, codes.ANSWER)]
    segments = np.concatenate([np.full(size, code, np.int8) for size, code in kinds])
    rows = []
    for index in range(count):
        tokens = rng.integers(3, config.text_config.vocab_size, positions).astype(np.int32)
        tokens[segments == codes.IMAGE] = config.image_token_id
        rows.append(codes.BatchRow(tokens, segments, rng.standard_normal((side, side, 3)).astype(np.float32), 0, index))
    return codes.collate(rows, (positions, labels), config.pad_token_id, (side, side))


def timed(program: Program, baseline: Timed | None, mesh) -> dict[str, float]:
    """Medians over rounds of the step's seconds by those of LoRA ("time_ratio") and of LoRA with as many ranks; {} without a baseline."""
    if baseline is None:
        return {}
    own, wide = Timed(program), _wide(program.ranks, mesh)
    if own.compiles() > 1:
        raise RuntimeError(f"{program.name}: its step compiled {own.compiles()} times, the ratio would be one of compilers")
    rounds = np.array([[own.seconds(), baseline.seconds(), wide.seconds()] for _ in range(ROUNDS)])
    ratios = np.median(rounds[:, :1] / rounds[:, 1:], axis=0)
    return {"ranks": program.ranks, "time_ratio": float(ratios[0]), "same_ranks_ratio": float(ratios[1])}


@functools.cache
def _wide(ranks: int, mesh) -> Timed:
    """LoRA's step with so many ranks."""
    return Timed(next(programs("lora", 1, mesh, f"--config.method.rank={ranks}", f"--config.method.alpha={2.0 * ranks}")))


# --------------------------------------------------------------------------------------------------------------- results


def write(rows: list[dict], versions: dict[str, str]) -> None:
    """Writes the numbers, the tables and the figure."""
    times = all("time_ratio" in row for row in rows)
    quantities = [("held_bytes", "Held beside the backbone, MiB", 2**20), ("argument_bytes", "Arguments that the step reads, MiB", 2**20),
                  ("temporary_bytes", "Temporaries of the step, MiB", 2**20),
                  ("flops", "Operations of matmuls, 10^9", 1e9)]
    quantities += [("time_ratio", "Time of a step, by LoRA's", 1.0),
                   ("same_ranks_ratio", "Time of a step, by that of LoRA with as many ranks", 1.0)] if times else []
    write_files(RESULTS, "growth", {"versions": versions, "rows": rows}, _text(rows, quantities, times, versions), figure(rows, quantities))


def _text(rows: list[dict], quantities, times: bool, versions) -> list[str]:
    counts, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("tasks", "method"))
    command = f"`python benchmarks/growth.py{'' if times else ' --no-time'}`"
    lines = ["# Growth with the number of tasks", "",
             f"{command}, jax {versions['jax']}, {versions['platform']}, embedded model, settings of configs/coin_mini.py (32 rows of 80",
             "positions, all slots of a pool at once). The step of the last stage of a sequence of so many tasks, and of a second phase that runs",
             "the model. Held: parameters, Adam's moments and what the method keeps; the step need not read all of it (BranchLoRA's old",
             "routers). Each stage of a pool of full size costs the same; with `pool_chunk` it costs what its own slots do.", ""]
    lines += [] if times else ["Times are not measured yet: the machine was busy. `python benchmarks/growth.py` measures them too.", ""]
    lines += ["![Growth](growth.png)", ""]
    for key, title, unit in quantities:
        lines += [f"## {title}", "", "| tasks | " + " | ".join(map(str, counts)) + " |", "|---|" + "---:|" * len(counts)]
        for method in methods:
            known = {row["tasks"]: row[key] / unit for row in rows if row["method"] == method}
            lines.append(f"| {method} | " + " | ".join(f"{known[count]:.2f}" if count in known else "–" for count in counts) + " |")
        lines.append("")
    return lines[:-1]


def figure(rows: list[dict], quantities) -> bytes:
    """One panel per quantity, a line per method, as PNG bytes."""
    methods, counts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "tasks"))
    high = -(-len(quantities) // 3)
    drawn = Figure(figsize=(17.4, 4.8 * high), dpi=100, layout="constrained")
    panels = drawn.subplots(high, 3, squeeze=False).ravel()
    for panel in panels[len(quantities) :]:
        panel.set_axis_off()
    for panel, (key, title, unit) in zip(panels, quantities):
        for order, method in enumerate(methods):
            points = [(row["tasks"], row[key] / unit) for row in rows if row["method"] == method]
            panel.plot(*zip(*points), label=method, **line_style(order))
        panel.set_title(title, fontsize=12, loc="left")
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, map(str, counts))
        panel.set_xlabel("tasks", fontsize=11)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#dfe3e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside right center", frameon=False, fontsize=11, handlelength=3.4)
    return png(drawn)


if __name__ == "__main__":
    main()
