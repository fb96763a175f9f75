"""Compiles LLaVA-1.5 7B and 13B at full size for TPUs and GPUs that need not be there; one JSON per slice and model, and two tables.

    python benchmarks/compile_ahead.py                    # all of TPUs that are missing; minutes each, no TPU, no weights, no data
    python benchmarks/compile_ahead.py --kind gpu         # all of GPUs that are missing, without a GPU
    python benchmarks/compile_ahead.py --only v6e-8_13b   # one of them, again
    python benchmarks/compile_ahead.py --only v6e-8_13b --program answer      # one of its programs, again; the others stay

Each is one command of `tools compile`, which the JSON holds. TPUs need the extra "aot" (libtpu), GPUs "cuda13" or "cuda12". At the end
the kind's table is written again, from the JSONs that are there.
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
# Kind -> name -> topology, sizes of the mesh's axes data and fsdp, micro-batches of a step of 64 rows, remat.
SLICES = {
    "tpu": {
        "v5e-16_7b": ("v5e:4x4", 1, 16, 2, "qkvo_mlp"), "v5e-16_13b": ("v5e:4x4", 1, 16, 4, "qkvo_mlp"),
        "v5p-8_7b": ("v5p:2x2x1", 4, 1, 1, "qkvo_mlp"), "v5p-8_13b": ("v5p:2x2x1", 4, 1, 2, "qkvo_mlp"),
        "v6e-8_7b": ("v6e:2x4", 8, 1, 2, "qkvo_mlp"), "v6e-8_13b": ("v6e:2x4", 1, 8, 2, "qkvo_mlp"),
    },
    "gpu": {"h100-1_7b": ("h100", 1, 1, 4, "auto"), "h100-8_13b": ("h100:8", 8, 1, 1, "auto")},
}  # fmt: skip
# Kind -> title of its table, and what is to be said of it besides.
TITLES = {
    "tpu": ("Full-size programs compiled for TPU slices, without a TPU", ""),
    "gpu": ("Full-size programs compiled for NVIDIA GPUs, without a GPU",
            " HBM is what a run may take, 94 % of the memory. A compile on the machine chooses kernels by timing them and asks cuDNN for "
            "its workspace: its temporaries differ somewhat."),
}  # fmt: skip


def command(name: str) -> list[str]:
    """The command of one of SLICES: ProgLoRA (dynamic), eight blocks of rank 16, the bucket of 704 positions."""
    topology, data, fsdp, parts, remat = SLICES[kind_of(name)][name]
    return [
        "python", "-m", "proglora_jax.tools", "compile", "--topology", topology,
        "--config", f"configs/coin.py:backbone=llava15_{name.rpartition('_')[2]},batches=mcitlib64", "--positions", "704",
        f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.train.micro_batches={parts}",
        f"--config.model.remat={remat}",
    ]  # fmt: skip


def kind_of(name: str) -> str:
    """The key of SLICES under which a name stands."""
    return next(kind for kind, slices in SLICES.items() if name in slices)


def path_of(name: str) -> Path:
    """Where the JSON of one of SLICES lies."""
    return RESULTS / f"{kind_of(name)}_compile" / f"{name}.json"


def compile_one(name: str, program: str = "all") -> None:
    """Runs the command of one of SLICES and keeps its JSON; a program that does not fit is a result too.

    Args:
        name: which.
        program: "all", or one whose result takes the place of the one that is there.
    """
    path, wanted = path_of(name), command(name)
    fresh = path.with_suffix(".new")
    path.parent.mkdir(parents=True, exist_ok=True)
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


def write_table(kind: str) -> Path:
    """The table of all results of a kind that are there, with each one's text below."""
    from proglora_jax.continual.compile_table import compile_text, summary_table
    from proglora_jax.continual.report_page import Table

    reports = [json.loads(path.read_text(encoding="utf-8")) for path in map(path_of, SLICES[kind]) if path.exists()]
    table: Table = summary_table(reports)
    title, besides = TITLES[kind]
    row = lambda cells: f"| {' | '.join(cells)} |"
    lines = [
        f"# {title}", "",
        f"Made by `python benchmarks/compile_ahead.py --kind {kind}`. Memory is what the compiler plans for one chip (arguments, results, "
        "temporaries, code); FLOPs are those of the traced program's matmuls; bytes sent are estimated from the compiled program's "
        f"collectives by a ring. Nothing was run and nothing was timed.{besides}", "",
        row(table.head), row(["---"] * len(table.head)), *(row(cells) for cells in table.rows), "",
    ]
    for report in reports:
        lines += [f"`{report['command']}`", "", "```", compile_text(report), "```", ""]
    path = RESULTS / f"{kind}_compile.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Compiles what was asked for, or what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for slices in SLICES.values() for name in slices]
    parser.add_argument("--kind", choices=tuple(SLICES), default="tpu", help="compile what is missing of these")
    parser.add_argument("--only", nargs="+", choices=names, default=(), help="compile these, whether they are there or not")
    parser.add_argument("--program", choices=("all", "train", "answer", "answer_late"), default="all", help="only this program of them")
    arguments = parser.parse_args()
    for name in arguments.only or [name for name in SLICES[arguments.kind] if not path_of(name).exists()]:
        compile_one(name, arguments.program)
        write_table(kind_of(name))
    print(write_table(kind_of(arguments.only[0]) if arguments.only else arguments.kind))


if __name__ == "__main__":
    main()
