"""Compiles LLaVA-1.5 7B and 13B at full size for TPU slices that need not be there; one JSON per slice and model, and a table.

    python benchmarks/tpu_compile.py                    # all that are missing; minutes each, no TPU, no weights, no data
    python benchmarks/tpu_compile.py --only v6e-8_13b   # one of them, again
    python benchmarks/tpu_compile.py --only v6e-8_13b --program answer      # one of its programs, again; the other stays

Each is one command of `tools compile`, which the JSON holds. It needs the extra "aot" (libtpu).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = RESULTS / "tpu_compile"
# Name -> topology, sizes of the mesh's axes data and fsdp, micro-batches of a step of 64 rows.
SLICES = {
    "v5e-16_7b": ("v5e:4x4", 1, 16, 2), "v5e-16_13b": ("v5e:4x4", 1, 16, 4),
    "v5p-8_7b": ("v5p:2x2x1", 4, 1, 1), "v5p-8_13b": ("v5p:2x2x1", 4, 1, 2),
    "v6e-8_7b": ("v6e:2x4", 8, 1, 2), "v6e-8_13b": ("v6e:2x4", 1, 8, 2),
}  # fmt: skip


def command(name: str) -> list[str]:
    """The command of one of SLICES: ProgLoRA (dynamic), eight blocks of rank 16, the main bucket of 704 positions."""
    topology, data, fsdp, parts = SLICES[name]
    return [
        "python", "-m", "proglora_jax.tools", "compile", "--topology", topology,
        "--config", f"configs/coin.py:backbone=llava15_{name.rpartition('_')[2]},batches=mcitlib64", "--positions", "704",
        f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.train.micro_batches={parts}",
        "--config.model.remat=qkvo_mlp",
    ]  # fmt: skip


def compile_one(name: str, program: str = "all") -> None:
    """Runs the command of one of SLICES and keeps its JSON; a program that does not fit is a result too.

    Args:
        name: which.
        program: "all", or one whose result takes the place of the one that is there.
    """
    path, fresh, wanted = FOLDER / f"{name}.json", FOLDER / f"{name}.new", command(name)
    fresh.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, *wanted[1:], "--program", program, "--json", str(fresh)], cwd=ROOT, check=False)
    if done.returncode not in (0, 1) or not fresh.exists():
        raise SystemExit(f"{name}: {shlex.join(wanted)} ended with {done.returncode}")
    report = {"command": shlex.join(wanted), **json.loads(fresh.read_text(encoding="utf-8"))}
    if path.exists() and program != "all":
        others = [one for one in json.loads(path.read_text(encoding="utf-8"))["programs"] if one["program"] != program]
        report["programs"] = sorted([*others, *report["programs"]], key=lambda one: one["program"], reverse=True)
        report["fits"] = all(one["fits"] for one in report["programs"])
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    fresh.unlink()


def write_table() -> Path:
    """The table of all results that are there, with each one's text below."""
    from proglora_jax.continual.compile_table import compile_text, summary_table
    from proglora_jax.continual.report_page import Table

    reports = [json.loads(path.read_text(encoding="utf-8")) for name in SLICES if (path := FOLDER / f"{name}.json").exists()]
    table: Table = summary_table(reports)
    row = lambda cells: f"| {' | '.join(cells)} |"
    lines = [
        "# Full-size programs compiled for TPU slices, without a TPU", "",
        "Made by `python benchmarks/tpu_compile.py`. Memory is what the compiler plans for one chip (arguments, results, temporaries, code); "
        "FLOPs are those of the traced program's matmuls; bytes sent are estimated from the compiled program's collectives by a ring. "
        "Nothing was run and nothing was timed.", "",
        row(table.head), row(["---"] * len(table.head)), *(row(cells) for cells in table.rows), "",
    ]
    for report in reports:
        lines += [f"`{report['command']}`", "", "```", compile_text(report), "```", ""]
    path = RESULTS / "tpu_compile.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Compiles what was asked for, or what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(SLICES), default=(), help="compile these, whether they are there or not")
    parser.add_argument("--program", choices=("all", "train", "answer"), default="all", help="only this program of them")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or [name for name in SLICES if not (FOLDER / f"{name}.json").exists()]:
        compile_one(name, arguments.program)
        print(write_table())


if __name__ == "__main__":
    main()
