"""Verbs for people: report, compare, convert, make-benchmark, make-base (python -m proglora_jax.tools VERB --help)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from proglora_jax.data.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, or 1 after an error of the user's, whose sentence is printed.
    """
    parser = argparse.ArgumentParser(prog="python -m proglora_jax.tools", description="Tools around proglora_jax.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (_add_report, _add_compare, _add_convert, _add_make_benchmark, _add_make_base):
        add(verbs)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def entry() -> None:
    """The console script proglora-tools."""
    sys.exit(main())


def _verb(verbs, name: str, summary: str, run: Callable) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _add_report(verbs) -> None:
    parser = _verb(verbs, "report", "Write report.md and report.html of a run from its results.json.", _report)
    parser.add_argument("workdir", help="folder of the run")
    parser.add_argument("--against", choices=("none", "published"), default="none", help="compare with the papers' numbers")


def _report(arguments) -> None:
    from proglora_jax.continual.report import write_report

    for path in write_report(arguments.workdir, arguments.against):
        print(path)


def _add_compare(verbs) -> None:
    parser = _verb(verbs, "compare", "Print a table of several runs: mean and deviation over seeds, by method.", _compare)
    parser.add_argument("workdirs", nargs="+", help="folders of runs; LABEL=FOLDER names a variant")


def _compare(arguments) -> None:
    from proglora_jax.continual.report import compare_runs

    named = [item.partition("=") if "=" in item else ("", "", item) for item in arguments.workdirs]
    labels = [label for label, _, _ in named] if any(label for label, _, _ in named) else None
    print(compare_runs([folder for _, _, folder in named], labels))


def _add_convert(verbs) -> None:
    parser = verbs.add_parser("convert", help="Weights in and out: any LLaVA to a clean folder, a run's stage to Hugging Face.")
    ways = parser.add_subparsers(title="ways", required=True, metavar="WAY")
    way = _verb(ways, "from-hf", "Read a LLaVA in any published layout and write it as one clean Hugging Face folder.", _from_hf)
    way.add_argument("folder", help="folder of a LLaVA (transformers 4 or 5, original), or of its language model (Vicuna)")
    way.add_argument("--out", required=True, help="folder to write; must be empty or absent")
    way.add_argument("--vision", help="folder of a CLIP, for a folder without a vision tower")
    way.add_argument("--projector", help="the projector's file (pretrain_mm_mlp_adapter, mm_projector.bin) or its folder")
    way.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: each tensor as it is")
    way.add_argument("--style", choices=("hub", "transformers5", "memory", "original"), default="hub", help="of the tensors' names")


    way = _verb(ways, "to-hf", "Write a trained stage as a PEFT adapter, or merged into a LLaVA folder.", _to_hf)
    way.add_argument("workdir", help="folder of the run")
    way.add_argument("--out", required=True, help="folder to write; must be empty or absent")
    way.add_argument("--kind", choices=("adapter", "merged"), default="adapter")
    way.add_argument("--stage", help="number as in the stage's folder, or the task's name; default: the last one that is trained")
    way.add_argument("--task", help="whose fused block, for methods that fuse by task; default: the stage's own")
    way.add_argument("--block", type=int, help="one block as it was trained, without gates, counted from 0 (adapter only)")
    way.add_argument("--base", help="folder of the backbone, where it is not where the run found it")
    way.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights; default: the backbone's formats")
    way.add_argument("--verify", action="store_true", help="reload it with torch (and peft) in f32 and compare logits first")


def _to_hf(arguments) -> None:
    from proglora_jax.continual.export import export_adapter, export_merged

    places = {name: getattr(arguments, name) for name in ("stage", "task", "base", "verify")}
    if arguments.kind == "merged":
        if arguments.block is not None:
            raise UserError("--block: a block alone is an adapter, not a model; use --kind adapter")
        export_merged(arguments.workdir, arguments.out, dtype=arguments.dtype, **places)
    else:
        if arguments.dtype is not None:
            raise UserError("--dtype: adapters are written in float32, as they were trained; use it with --kind merged")
        export_adapter(arguments.workdir, arguments.out, block=arguments.block, **places)


def _from_hf(arguments) -> None:
    from proglora_jax.checkpoints.hf_convert import convert_from_hf

    places = {"vision_folder": arguments.vision, "projector_file": arguments.projector}
    convert_from_hf(arguments.folder, arguments.out, **places, style=arguments.style, dtype=arguments.dtype)


def _add_make_benchmark(verbs) -> None:
    parser = _verb(verbs, "make-benchmark", "Draw the embedded benchmark and print what blind answers score on it.", _make_benchmark)
    parser.add_argument("root", help="folder to write; an existing one of the same sizes is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-size", type=int, default=1600, help="training records a task")
    parser.add_argument("--test-size", type=int, default=200, help="questions a task")


def _make_benchmark(arguments) -> None:
    from proglora_jax.data.synthetic.baselines import baselines
    from proglora_jax.data.synthetic.benchmark import write_benchmark

    write_benchmark(arguments.root, arguments.seed, arguments.train_size, arguments.test_size)
    baselines(arguments.root)


def _add_make_base(verbs) -> None:
    parser = _verb(verbs, "make-base", "Train the embedded base model from nothing and write it as a Hugging Face folder.", _make_base)
    parser.add_argument("--out", required=True, help="folder to write; must be empty or absent")
    parser.add_argument("--seed", type=int, default=0)


def _make_base(arguments) -> None:
    from proglora_jax.training.base_recipe import make_base

    make_base(arguments.out, arguments.seed)


if __name__ == "__main__":
    entry()
