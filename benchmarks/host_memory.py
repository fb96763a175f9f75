"""Page faults and kernel time of a jitted step, with malloc as it is and with `core.host.keep_freed_memory`.

    python benchmarks/host_memory.py           half a minute
    python benchmarks/host_memory.py --draw    table and figure again, from the numbers that are there

Each variant runs in a process of its own, three times in turn; medians. Results: benchmarks/results/host_memory.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared import BESIDE, OURS, RESULTS, ROOT, Bar, bars, conditions, load_of, read
from shared import write as write_files

SIZES = {"rows": 2560, "width": 256, "inner": 512, "turns": 8, "steps": 20}
TINY = SIZES | {"rows": 64, "steps": 2}
# Field -> title of its column, how it is written.
QUANTITIES = {"faults_per_step": ("page faults a step", ",.0f"), "user_s": ("CPU time of the program, s", ".2f"),
              "kernel_s": ("CPU time of the kernel, s", ".2f"), "peak_mib": ("peak memory, MiB", ".0f")}
CODE = """
import json, resource
from proglora_jax.core.host import keep_freed_memory
made = keep_freed_memory() if {keep} else False
import jax, jax.numpy as jnp

@jax.jit
def step(x, w):
    def loss(w):
        def body(c, _):
            y = jnp.tanh(c @ w)
            return y @ w.T, y
        _, ys = jax.lax.scan(body, x, None, length={turns})
        return (ys * ys).sum()
    return jax.grad(loss)(w)

x, w = jnp.ones(({rows}, {width})), jnp.full(({width}, {inner}), 0.01)
step(x, w).block_until_ready()
a = resource.getrusage(resource.RUSAGE_SELF)
for _ in range({steps}):
    step(x, w).block_until_ready()
b = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(dict(made=made, faults_per_step=(b.ru_minflt - a.ru_minflt) / {steps}, user_s=b.ru_utime - a.ru_utime,
                      kernel_s=b.ru_stime - a.ru_stime, peak_mib=b.ru_maxrss / 1024)))
"""


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="processes of each variant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    write(read(arguments.out, "host_memory") if arguments.draw else measure(arguments.runs, SIZES), arguments.out)


def measure(runs: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Runs both variants in turn; their medians."""
    found, environment = conditions(), {**os.environ, "JAX_PLATFORMS": "cpu"}
    made: dict[str, list[dict]] = {"as it is": [], "freed memory kept": []}
    for _ in range(runs):
        for name, keep in (("as it is", False), ("freed memory kept", True)):
            command = [sys.executable, "-c", CODE.format(keep=keep, **sizes)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            made[name].append(json.loads(done.stdout))
    medians = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in made.items()}
    return found | {"runs": runs, "sizes": sizes, "variants": medians}


def write(found: dict[str, Any], folder: Path) -> None:
    """The numbers, the table and the figure."""
    sizes = found["sizes"]
    lines = [
        "# What malloc costs a step on the CPU", "",
        f"`python benchmarks/host_memory.py`, {found['cores']} cores{load_of(found)}; medians of {found['runs']} processes each, in turns. "
        f"A scan of {sizes['turns']} turns of two matmuls ({sizes['rows']} rows, {sizes['width']} to {sizes['inner']} and back) with its "
        f"gradient; seconds are of CPU time, of {sizes['steps']} steps. Freed memory kept: `core.host.keep_freed_memory`, which runs use. "
        "Its price is the peak: memory that lies idle between two steps.", "",
        "![Page faults, kernel time, peak](host_memory.png)", "",
        f"| malloc | {' | '.join(title for title, _ in QUANTITIES.values())} |", f"|---|{'---:|' * len(QUANTITIES)}",
        *(f"| {name} | {' | '.join(format(row[key], form) for key, (_, form) in QUANTITIES.items())} |"
          for name, row in found["variants"].items()),
    ]  # fmt: skip
    colours = {"as it is": BESIDE, "freed memory kept": OURS}
    panels = {title: [Bar(name, row[key], colour=colours[name]) for name, row in found["variants"].items()]
              for key, (title, _) in QUANTITIES.items()}
    write_files(folder, "host_memory", found, lines, bars(panels))


if __name__ == "__main__":
    main()
