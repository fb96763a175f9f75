"""Verbs for people: report, compare, doctor, make-benchmark, make-base (python -m proglora_jax.tools VERB --help)."""

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
    for add in (_add_report, _add_compare, _add_doctor, _add_make_benchmark, _add_make_base):
        add(verbs)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
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


def _add_doctor(verbs) -> None:
    summary = "Say what a config would do and need: stages, steps, hours, parameters, memory of a device; nothing is loaded."
    parser = _verb(verbs, "doctor", summary, _doctor)
    parser.set_defaults(overrides=[])
    parser.add_argument("--config", required=True, help="as for the main job; --config.section.field=value overrides a field")
    parser.add_argument("--devices", type=int, default=0, help="plan for so many; default: those that are there")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="memory of a device; default: what it says")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="peak of a device in the compute dtype, for hours by roofline")
    parser.add_argument("--utilization", type=float, default=0.45, help="share of the peak that is assumed")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="measured seconds of a training step, for hours by measurement")
    parser.add_argument("--step-rows", type=int, default=0, help="rows of the measured step; default: config.train.batch_size")
    parser.add_argument("--positions", type=int, default=0, help="mean positions of a row; default: the smallest bucket")
    parser.add_argument("--compile", action="store_true", help="also compile the training step and read what it needs; minutes")


def _doctor(arguments) -> None:
    from proglora_jax.continual.doctor import Machine, diagnose
    from proglora_jax.training.config_file import load_config

    machine = Machine(arguments.devices, arguments.memory_gb, arguments.peak_tflops, arguments.utilization, arguments.step_seconds,
                      arguments.step_rows, arguments.positions)
    print(diagnose(load_config(arguments.config, arguments.overrides), machine, compile_step=arguments.compile))


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
