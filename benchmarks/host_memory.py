"""Page faults and kernel time of a jitted step, with malloc as it is and with `core.host.keep_freed_memory`.

    python benchmarks/host_memory.py

Each variant runs in a process of its own, three times in turn; the table gives medians. Results: benchmarks/results/host_memory.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
        _, ys = jax.lax.scan(body, x, None, length=8)
        return (ys * ys).sum()
    return jax.grad(loss)(w)

x, w = jnp.ones((2560, 256)), jnp.full((256, 512), 0.01)
step(x, w).block_until_ready()
a = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(20):
    step(x, w).block_until_ready()
b = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(dict(made=made, faults_per_step=(b.ru_minflt - a.ru_minflt) / 20, user_s=b.ru_utime - a.ru_utime,
                      kernel_s=b.ru_stime - a.ru_stime, peak_mib=b.ru_maxrss / 1024)))
"""


def main() -> None:
    """Runs both variants and writes their medians."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    runs: dict[str, list[dict]] = {"as it is": [], "freed memory kept": []}
    for _ in range(3):
        for name, keep in (("as it is", False), ("freed memory kept", True)):
            command = [sys.executable, "-c", CODE.format(keep=keep)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    table = {name: {key: statistics.median(run[key] for run in made) for key in made[0]} for name, made in runs.items()}
    (ROOT / "benchmarks" / "results" / "host_memory.json").write_text(json.dumps(table, indent=1) + "\n")
    print("| malloc | page faults a step | user s | kernel s | peak MiB |\n|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['faults_per_step']:.0f} | {row['user_s']:.2f} | {row['kernel_s']:.2f} | {row['peak_mib']:.0f} |")


if __name__ == "__main__":
    main()
