"""Runs methods and variants on the embedded benchmark over seeds, and writes their tables (python benchmarks/coin_mini.py --help).

    python benchmarks/coin_mini.py --set headline --seeds 0 1 2
    python benchmarks/coin_mini.py --set gates --seeds 0 1 2 --jobs 2
    python benchmarks/coin_mini.py --set time      how long the default run takes: seed 0, in a fresh folder, alone
    python benchmarks/coin_mini.py --set time --draw     table and figure again, from the numbers that are there

Each run is the project's main job in a process of its own, under runs/benchmark/; a run that is finished is not repeated, and results
of other seeds and variants that an earlier call wrote for the same base model stay in the tables. A run that the other set has at the same
commit is taken from there.
The results go to benchmarks/results/coin_mini_<set>.md (the table) and coin_mini_<set>.json (every number behind it); pictures of the
default's run with seed 0 to coin_mini_dynamic_accuracy.png and coin_mini_dynamic_gates.png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import BESIDE, ROOT, Bar, bars, conditions, load_of, read
from shared import write as write_files

DEFAULT = ("proglora_dynamic", {}, 0)
PICTURES = {"report_accuracy_coin.png": "coin_mini_dynamic_accuracy.png", "report_gates.png": "coin_mini_dynamic_gates.png"}
COSTS = "costs.json"
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
    parser.add_argument("--set", choices=(*SETS, "time"), default="headline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each when more than one")
    parser.add_argument("--variants", nargs="+", help="only these variants of the set")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.set == "time":
        folder = ROOT / "benchmarks" / "results"
        return write_time(read(folder, "coin_mini_time") if arguments.draw else time_default(), folder)
    whole = SETS[arguments.set]
    variants = {name: value for name, value in whole.items() if not arguments.variants or name in arguments.variants}
    jobs = [(name, *variants[name], seed) for seed in arguments.seeds for name in variants]
    if arguments.draw:
        print(write(arguments.set, kept(arguments.set, []), [*whole]))
        return
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
    flags = [f"--config.method.{name}={value}" for name, value in overrides.items()]
    environment = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"} if threads else {}
    record = run_in(workdir, [f"configs/coin_mini.py:method={method},seed={seed}", *flags], environment)
    if (method, overrides, seed) == DEFAULT:
        copy_pictures(workdir)
    print(f"{variant}, seed {seed}: {record['costs'].get('wall_s', 0):.0f} s", flush=True)
    return record | {"variant": variant}


def run_in(workdir: Path, config: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs the main job in a folder, and returns its results; `costs` is empty of a run that an earlier call began."""
    fresh = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "proglora_jax.main", "--config", *config, "--workdir"]
    costs = measured([*command, str(workdir)], workdir / "console.log", environment)
    if fresh:
        (workdir / COSTS).write_text(json.dumps(costs))
    record = json.loads((workdir / "results.json").read_text())
    known = json.loads((workdir / COSTS).read_text()) if (workdir / COSTS).exists() else {}
    command = " ".join(["python", *command[1:], str(workdir.relative_to(ROOT))])
    return record | {"base_model": base_model(), "commit": commit(), "command": command, "costs": known}


def measured(command: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a command: seconds by the clock and of CPU time, peak memory in bytes, cores, and the machine's load before it."""
    found, began = conditions(), time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)
        # What this one process used; Linux takes its peak for at least that of the process that starts it, which is small here.
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found | {"wall_s": time.monotonic() - began, "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss}


def copy_pictures(workdir: Path) -> None:
    """Takes the report's pictures to the results."""
    for name, target in PICTURES.items():
        shutil.copyfile(workdir / name, ROOT / "benchmarks" / "results" / target)


# ------------------------------------------------------------------------------------------------------- how long it takes


def time_default(flags: Sequence[str] = ()) -> dict[str, Any]:
    """What the default run takes, by part; JAX logs what it compiles."""
    workdir = ROOT / "runs" / "benchmark" / "time"
    shutil.rmtree(workdir, ignore_errors=True)
    method, _, seed = DEFAULT
    record = run_in(workdir, [f"configs/coin_mini.py:method={method},seed={seed}", *flags], {"JAX_LOG_COMPILES": "1"})
    if not flags:
        copy_pictures(workdir)
    compiled = compile_seconds((workdir / "console.log").read_text(encoding="utf-8"))
    kept = {name: record[name] for name in ("method", "seed", "tasks", "seconds", "costs", "versions", "command", "commit", "base_model")}
    return kept | {"compiled": compiled, "summary": {name: value for name, value in summary(record).items() if name in ("ACC", "BWT")}}


def compile_seconds(log: str) -> dict[str, float]:
    """How many programs JAX compiled, by its log, and the seconds of tracing, lowering and compiling."""
    parts = {"trace_s": "tracing", "lower_s": "jaxpr to MLIR module conversion", "xla_s": "XLA compilation"}
    found = {name: [float(one) for one in re.findall(rf"Finished {words} .* in ([\d.e+-]+) sec", log)] for name, words in parts.items()}
    return {"programs": len(found["xla_s"])} | {name: sum(each) for name, each in found.items()}


def write_time(found: dict[str, Any], folder: Path) -> None:
    """The numbers, the table and the figure of how long the default run takes."""
    costs, compiled = found["costs"], found["compiled"]
    train, answer = (sum(stage[part] for stage in found["seconds"]) for part in ("train", "evaluate"))
    parts = {"training": train, "answering": answer, "start, data, checkpoints, report": costs["wall_s"] - train - answer}
    lines = [
        "# coin_mini: how long the default run takes", "",
        f"`python benchmarks/coin_mini.py --set time`: {found['method']}, {len(found['tasks'])} tasks, seed {found['seed']}, in a fresh "
        f"folder, nothing compiled before; {costs['cores']} cores{load_of(costs)}.", "",
        f"**{costs['wall_s'] / 60:.1f} minutes** ({costs['wall_s']:.0f} s), {costs['cpu_s']:.0f} s of CPU time, peak memory "
        f"{costs['peak_bytes'] / 2**30:.2f} GiB, ACC {found['summary']['ACC']:.1f}, BWT {found['summary']['BWT']:.1f}.", "",
        "![Seconds by part and by task](coin_mini_time.png)", "",
        "| part | seconds | share |", "|---|---:|---:|",
        *(f"| {name} | {seconds:.1f} | {seconds / costs['wall_s']:.0%} |" for name, seconds in parts.items()), "",
        f"Within these {compiled['programs']} programs were compiled, by JAX's log: {compiled['xla_s']:.1f} s in XLA, "
        f"{compiled['lower_s']:.1f} s of lowering, {compiled['trace_s']:.1f} s of tracing, in which a function within "
        "another counts twice.", "",
        "| task | training, s | answering all tasks so far, s |", "|---|---:|---:|",
        *(f"| {task} | {one['train']:.1f} | {one['evaluate']:.1f} |" for task, one in zip(found["tasks"], found["seconds"], strict=True)),
        "", f"jax {found['versions']['jax']}, Python {found['versions']['python']}, CPU; base model {found['base_model']}, commit "
        f"{found['commit'] or 'with changes'}.",
    ]  # fmt: skip
    stages = list(zip(found["tasks"], found["seconds"], strict=True))
    panels = {"Seconds": [*(Bar(name, seconds) for name, seconds in parts.items()),
                          Bar("compiling in XLA, within these", compiled["xla_s"], colour=BESIDE)],
              "Training, seconds": [Bar(task, one["train"]) for task, one in stages],
              "Answering all tasks so far, seconds": [Bar(task, one["evaluate"]) for task, one in stages]}
    write_files(folder, "coin_mini_time", found, lines, bars(panels))


# ------------------------------------------------------------------------------------------------------------- the results


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
             "of the eight tasks the own block has the largest mean gate after the last task (by construction for static). Clean: scores without the benchmark's quirks."]
    timed = any(record.get("costs") for record in records)
    if timed:
        lines += ["Wall minutes of each seed that was run in one go, with the machine's load before it; runs at the same time slow each other",
                  "down."]
    lines.append("")
    variants = list(dict.fromkeys(record["variant"] for record in records))
    columns = list(summary(records[0]))
    heads = ["variant", "seeds", *columns] + ["wall minutes"] * timed
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for variant in variants:
        values = [summary(record) for record in records if record["variant"] == variant]
        cells = [f"{statistics.fmean(v[c] for v in values):.1f} ({', '.join(f'{v[c]:.1f}' for v in values)})" for c in columns]
        cells = ["no gates" if cell.startswith("nan") else cell for cell in cells]
        seeds = ", ".join(str(record["seed"]) for record in records if record["variant"] == variant)
        took = [record.get("costs", {}) for record in records if record["variant"] == variant]
        minutes = ", ".join(f"{one['wall_s'] / 60:.1f} (load {one['load']:.1f})" if one else "–" for one in took)
        lines.append(f"| {' | '.join([variant, seeds, *cells] + [minutes] * timed)} |")
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
