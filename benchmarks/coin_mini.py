"""Runs methods and variants on the embedded benchmark over seeds, and writes their tables (python benchmarks/coin_mini.py --help).

    python benchmarks/coin_mini.py --set headline --seeds 0 1 2
    python benchmarks/coin_mini.py --set gates --seeds 0 1 2 --jobs 2

Each run is the project's main job in a process of its own, under runs/benchmark/; a run that is finished is not repeated, and results
of other seeds and variants that an earlier call wrote for the same base model stay in the tables. A run that the other set has at the same
commit is taken from there.
The results go to benchmarks/results/coin_mini_<set>.md (the table) and coin_mini_<set>.json (every number behind it).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Set -> variant -> (method, overrides of config.method).
_PAPER = {"match_weight": 0.0, "gate_bonus": 0.0, "gate_lr_multiplier": 1.0, "key_scale": 1.0}
SETS = {
    "headline": {
        "lora": ("lora", {}),
        "proglora_dynamic": ("proglora_dynamic", {}),
        "proglora_static": ("proglora_static", {}),
    },
    "gates": {
        "the default: matching loss 1, learning rate x3": ("proglora_dynamic", {}),
        "the paper's literal setting": ("proglora_dynamic", _PAPER),
        "learning rate x3": ("proglora_dynamic", _PAPER | {"gate_lr_multiplier": 3.0}),
        "bonus 5 over 70 %, learning rate x3, keys x3": (
            "proglora_dynamic", _PAPER | {"gate_bonus": 5.0, "gate_bonus_fraction": 0.7, "gate_lr_multiplier": 3.0, "key_scale": 3.0}),
        "matching loss 1": ("proglora_dynamic", _PAPER | {"match_weight": 1.0}),
        "matching loss 0.1, learning rate x3": ("proglora_dynamic", _PAPER | {"match_weight": 0.1, "gate_lr_multiplier": 3.0}),
    },
}


def main() -> None:
    """Runs a set and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="headline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each when more than one")
    parser.add_argument("--variants", nargs="+", help="only these variants of the set")
    arguments = parser.parse_args()
    whole = SETS[arguments.set]
    variants = {name: value for name, value in whole.items() if not arguments.variants or name in arguments.variants}
    jobs = [(name, *variants[name], seed) for seed in arguments.seeds for name in variants]
    records = kept(arguments.set, jobs)
    shared = [record for job in jobs for record in known(arguments.set, *job)]
    jobs = [job for job in jobs if (job[0], job[-1]) not in {(record["variant"], record["seed"]) for record in shared}]
    records, failed = records + shared, []
    table = write(arguments.set, records, [*whole]) if records else ""
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        started = {pool.submit(run, *job, threads=0 if arguments.jobs == 1 else 1): job for job in jobs}
        for done in concurrent.futures.as_completed(started):
            if done.exception() is not None:
                failed.append(f"{started[done][0]}, seed {started[done][-1]}: {done.exception()}")
                continue
            records.append(done.result())
            table = write(arguments.set, records, [*whole])
    print(table)
    if failed:
        raise SystemExit("\n".join(["these runs failed, their console.log says why:", *failed]))


def base_model() -> str:
    """Short hash of the weights that every run starts from."""
    return hashlib.sha256((ROOT / "proglora_jax/assets/coin_mini_base/model.safetensors").read_bytes()).hexdigest()[:12]


def commit() -> str:
    """The checkout's commit; "" where there is none, or where files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return "" if changed.returncode or changed.stdout.strip() else git("rev-parse", "HEAD").stdout.strip()


def kept(name: str, jobs: list[tuple]) -> list[dict]:
    """Records of earlier calls that this one does not replace."""
    path = ROOT / "benchmarks" / "results" / f"coin_mini_{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else []
    asked = {(variant, seed) for variant, *_, seed in jobs}
    return [r for r in earlier if (r["variant"], r["seed"]) not in asked and r["variant"] in SETS[name] and r["base_model"] == base_model()]


def known(name: str, variant: str, method: str, overrides: dict[str, float], seed: int) -> list[dict]:
    """The record of the same run in another set's results, if it is there and of this very commit: the next one may differ in last bits."""
    found, here = [], commit()
    for other, variants in SETS.items():
        path = ROOT / "benchmarks" / "results" / f"coin_mini_{other}.json"
        same = [title for title, value in variants.items() if value == (method, overrides)] if other != name and path.exists() else []
        found += [record | {"variant": variant} for record in (json.loads(path.read_text()) if same else [])
                  if record["variant"] in same and record["seed"] == seed and record["base_model"] == base_model()
                  and here and record.get("commit") == here]
    return found[:1]


def run(variant: str, method: str, overrides: dict[str, float], seed: int, threads: int) -> dict:
    """Runs one variant and seed, and returns its results."""
    slug = "_".join([method, *(f"{name}-{value}" for name, value in overrides.items())])
    workdir = ROOT / "runs" / "benchmark" / f"{slug}_seed{seed}"
    command = [sys.executable, "-m", "proglora_jax.main", "--config", f"configs/coin_mini.py:method={method},seed={seed}"]
    command += [f"--config.method.{name}={value}" for name, value in overrides.items()] + ["--workdir", str(workdir)]
    environment = dict(os.environ)
    if threads:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    began = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "console.log", "a", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    print(f"{variant}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    record = json.loads((workdir / "results.json").read_text())
    command[-1] = str(workdir.relative_to(ROOT))
    return record | {"variant": variant, "base_model": base_model(), "commit": commit(), "command": " ".join(["python", *command[1:]])}


def summary(record: dict) -> dict[str, float]:
    """ACC, mean right after training, BWT, and for how many tasks the own block has the largest mean gate at the end."""
    matrix = record["scoring"]["coin"]
    count = len(matrix)
    final, diagonal = matrix[-1], [matrix[i][i] for i in range(count)]
    gates = record["gates"].get(str(count - 1), {})
    own = [max(range(len(gate)), key=gate.__getitem__) == record["tasks"].index(task) for task, gate in gates.items()]
    clean = record["scoring"]["clean"]
    return {
        "ACC": statistics.fmean(final), "right after": statistics.fmean(diagonal),
        "BWT": statistics.fmean(f - d for f, d in zip(final, diagonal)), "ACC clean": statistics.fmean(clean[-1]),
        "BWT clean": statistics.fmean(clean[-1][i] - clean[i][i] for i in range(count)), "own block largest": sum(own) if own else float("nan"),
    }


def write(name: str, records: list[dict], order: list[str]) -> str:
    """Writes the table and the numbers of a set, its variants in that order, and returns the table."""
    records = sorted(records, key=lambda record: (order.index(record["variant"]), record["seed"]))
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"coin_mini_{name}.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [f"# coin_mini: {name}", "", f"`python benchmarks/coin_mini.py --set {name} --seeds {' '.join(sorted({str(r['seed']) for r in records}))}`", "",
             "Means over seeds (each seed's value in brackets), accuracies in %, 200 questions a task. Own block largest: for how many",
             "of the eight tasks the own block has the largest mean gate after the last task (by construction for static). Clean: scores without the benchmark's quirks.", ""]
    variants = list(dict.fromkeys(record["variant"] for record in records))
    columns = list(summary(records[0]))
    lines += ["| variant | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for variant in variants:
        values = [summary(record) for record in records if record["variant"] == variant]
        cells = [f"{statistics.fmean(v[c] for v in values):.1f} ({', '.join(f'{v[c]:.1f}' for v in values)})" for c in columns]
        cells = ["no gates" if cell.startswith("nan") else cell for cell in cells]
        seeds = ", ".join(str(record["seed"]) for record in records if record["variant"] == variant)
        lines.append(f"| {variant} | {seeds} | " + " | ".join(cells) + " |")
    tasks = records[0]["tasks"]
    for title, pick in (("Right after training", lambda m, i: m[i][i]), ("After the last task", lambda m, i: m[-1][i])):
        lines += ["", f"## {title}", "", "| variant | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
        for variant in variants:
            chosen = [record["scoring"]["coin"] for record in records if record["variant"] == variant]
            lines.append(f"| {variant} | " + " | ".join(f"{statistics.fmean(pick(m, i) for m in chosen):.1f}" for i in range(len(tasks))) + " |")
    gated = [record for record in records if record["gates"]]
    for variant in dict.fromkeys(record["variant"] for record in gated):
        chosen = [record["gates"][str(len(tasks) - 1)] for record in gated if record["variant"] == variant]
        lines += ["", f"## Mean gates after the last task: {variant}", "", "| task | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
        for task in tasks:
            lines.append(f"| {task} | " + " | ".join(f"{statistics.fmean(g[task][i] for g in chosen):.2f}" for i in range(len(tasks))) + " |")
    versions = records[0]["versions"]
    lines += ["", f"jax {versions.get('jax')}, Python {versions.get('python')}, CPU; base model {base_model()}."]
    (folder / f"coin_mini_{name}.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
