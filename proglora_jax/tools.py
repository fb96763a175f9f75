"""Verbs for people: report, compare, check-data, doctor, compile, convert, predict, make-benchmark, make-instructions, make-base.

Each explains itself: python -m proglora_jax.tools VERB --help.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from proglora_jax.core.host import claim_gpu_memory, leave_torch_out, settle_on_cpu
from proglora_jax.data.errors import UserError, disk_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, or 1 after an error of the user's, whose sentence is printed, and where check-data finds something wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m proglora_jax.tools", description="Tools around proglora_jax.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (_add_report, _add_compare, _add_check_data, _add_doctor, _add_compile, _add_convert, _add_predict, _add_make_benchmark,
                _add_make_instructions, _add_make_base):
        add(verbs)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides, arguments.argv = rest, list(sys.argv[1:] if argv is None else argv)
    try:
        with disk_errors(f"tools {arguments.argv[0]}", "make room or choose another place, and run it again"):
            return arguments.run(arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def entry() -> None:
    """The console script proglora-tools."""
    claim_gpu_memory()  # what doctor plans with is what a run has
    if "to-hf" not in sys.argv:  # which compares what it wrote with torch
        leave_torch_out()
    settle_on_cpu()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # "tools ... | head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


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
    summary = "Compare methods over seeds: print a table of finished runs, or with --config run methods x seeds and write a report."
    parser = _verb(verbs, "compare", summary, _compare)
    parser.set_defaults(overrides=[])
    parser.add_argument("workdirs", nargs="*", help="folders of runs; LABEL=FOLDER names a variant")
    parser.add_argument("--config", help="run this config, without method and seed; --config.section.field=value overrides a field")
    parser.add_argument("--methods", nargs="+", default=[], help="with --config: names with commas or blanks between, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="with --config: seeds of each method")
    parser.add_argument("--out", help="with --config: folder of the runs and of compare.html; the same folder again goes on")
    parser.add_argument("--jobs", type=int, default=1, help="with --config: runs at the same time")
    parser.add_argument("--isolated", action="store_true", help="with --config: also each task alone, shared by families, for FWT")


def _compare(arguments) -> int | None:
    # argparse takes an override with a blank in it, "--config.data.buckets=((92, 24),)", for a folder.
    arguments.overrides += [item for item in arguments.workdirs if item.startswith("--")]
    arguments.workdirs = [item for item in arguments.workdirs if not item.startswith("--")]
    if arguments.config:
        return _compare_config(arguments)
    from proglora_jax.continual.report import compare_runs

    if arguments.overrides or arguments.methods or arguments.out or arguments.isolated:
        raise UserError("compare: --methods, --out, --isolated and overrides of fields go with --config FILE")
    named = [item.partition("=") if "=" in item else ("", "", item) for item in arguments.workdirs]
    labels = [label for label, _, _ in named] if any(label for label, _, _ in named) else None
    print(compare_runs([folder for _, _, folder in named], labels))
    return None


def _compare_config(arguments) -> int:
    from proglora_jax.continual.compare_report import run_comparison
    from proglora_jax.methods.registry import NAMES

    if arguments.workdirs:
        raise UserError(f"compare: {arguments.workdirs[0]}: give folders of finished runs, or --config FILE, not both")
    methods = list(NAMES) if arguments.methods == ["all"] else _names(",".join(arguments.methods))
    command = " ".join(map(shlex.quote, ["python", "-m", "proglora_jax.tools", *arguments.argv]))
    out = pathlib.Path(arguments.out) if arguments.out else None
    return run_comparison(
        arguments.config, arguments.overrides, methods, arguments.seeds, out, arguments.jobs, arguments.isolated, command)


def _add_check_data(verbs) -> None:
    parser = _verb(verbs, "check-data", "Walk a data root before a run: records, images, counts, lengths, leaks.", _check_data)
    parser.add_argument("root", help="data root; holds playground/ and cl_dataset/")
    parser.add_argument("--tasks", default="coin", help="a named order, or task names with commas between")
    parser.add_argument("--instruction-set", default="Original",
                        help="Original, Diverse, 10Type, slim, slim_0.1 ..., several with commas between, or all (the first three)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="LLaVA or Vicuna folder, or 'embedded': checks lengths with its tokenizer and image size")
    source.add_argument("--tokenizer", help="folder of a tokenizer: checks lengths with it")
    parser.add_argument("--vision", help="folder of the CLIP, for a --model without a vision tower (Vicuna)")
    parser.add_argument("--image-tokens", type=int, default=576, help="positions of an image, with --tokenizer (LLaVA-1.5: 576)")
    parser.add_argument("--template", default="vicuna_v1", help="conversation template")
    parser.add_argument("--max-length", type=int, default=2048, help="positions of a record, image included")
    parser.add_argument("--batch-rows", type=int, default=64, help="rows of a batch, for the share of padding")
    parser.add_argument("--buckets", type=int, nargs="+", default=(), metavar="LENGTH",
                        help="padded lengths to measure with; default: the configs' own")
    parser.add_argument("--policy", choices=("stop", "skip_and_count"), default="stop",
                        help="exit status where something is wrong: 1, or 0 after counting it")
    parser.add_argument("--counts", choices=("published", "any"), default="published",
                        help="compare record counts with the published files, or accept any (for a set of your own)")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode images; 0 for one per core")
    parser.add_argument("--fill-image-cache", metavar="FOLDER",
                        help="with --model: keep all whole images prepared there, for runs with config.data.image_cache_dir=FOLDER")
    parser.add_argument("--show", type=int, default=10, help="problems spelled out per kind; the JSON file has them all")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found to this file")


def _check_data(arguments) -> int:
    from proglora_jax.continual.check_command import images_to_fill, measuring_encoder
    from proglora_jax.data.check import Batching, check_data
    from proglora_jax.data.tasks import ORDERS
    from proglora_jax.data.templates import INSTRUCTION_SETS
    from proglora_jax.evaluation.evaluator import reference_problems

    sets = INSTRUCTION_SETS if arguments.instruction_set == "all" else _names(arguments.instruction_set)
    tasks = arguments.tasks if arguments.tasks in ORDERS else _names(arguments.tasks)
    findings = check_data(
        arguments.root, tasks, sets, encoder=measuring_encoder(arguments), references=reference_problems, counts=arguments.counts,
        workers=arguments.workers, fill=images_to_fill(arguments), batching=Batching.stated(arguments.batch_rows, arguments.buckets))
    for line in findings.lines(arguments.policy, arguments.show):
        print(line)
    if arguments.json:
        findings.write_json(arguments.json, arguments.policy)
    return findings.exit_status(arguments.policy)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_doctor(verbs) -> None:
    summary = "Say what a config would do and need: stages, steps, hours, parameters, memory of a device; nothing is loaded."
    parser = _verb(verbs, "doctor", summary, _doctor)
    parser.set_defaults(overrides=[])
    parser.add_argument("--config", required=True, help="as for the main job; --config.section.field=value overrides a field")
    parser.add_argument("--devices", type=int, help="plan for so many; default: those that are there")
    parser.add_argument("--memory-gb", type=float, help="memory of a device; default: what it says")
    parser.add_argument("--peak-tflops", type=float, help="peak of a device in the compute dtype, for hours by roofline")
    parser.add_argument("--utilization", type=float, default=0.45, help="share of the peak that is assumed")
    parser.add_argument("--step-seconds", type=float, help="measured seconds of a training step, for hours by measurement")
    parser.add_argument("--step-rows", type=int, help="rows of the measured step; default: config.train.batch_size")
    parser.add_argument("--positions", type=int, help="mean positions of a row; default: the first bucket with an image")
    parser.add_argument("--compile", action="store_true", help="also compile the training step and read what it needs; minutes")


def _doctor(arguments) -> None:
    from proglora_jax.continual.doctor import Machine, diagnose
    from proglora_jax.training.config_file import load_config

    machine = Machine.stated(vars(arguments))
    print(diagnose(load_config(arguments.config, arguments.overrides), machine, compile_step=arguments.compile))


def _add_compile(verbs) -> None:
    summary = "Compile a config's programs for TPUs or GPUs that need not be there: memory of a chip, FLOPs, collectives."
    parser = _verb(verbs, "compile", summary, _compile)
    parser.set_defaults(overrides=[])
    parser.add_argument("--topology", required=True,
                        help="a TPU slice (v5e:4x4, v5p:2x2x1, v6e:2x4) or GPUs (h100, h100:8 on one host, a100-80gb:2x8 on two)")
    parser.add_argument("--config", required=True, help="as for the main job; --config.section.field=value overrides a field")
    parser.add_argument("--program", choices=("all", "train", "answer", "answer_late", "answer_shared"), default="all",
                        help="answer: prefill and decoding; answer_late: where longer answers are asked for again; answer_shared: "
                             "where two questions share an image")
    parser.add_argument("--positions", type=int, nargs="+", default=(), help="padded lengths, of the config's; default: its largest")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found to this file")
    parser.add_argument("--hlo", metavar="FOLDER", default="", help="keep the compiled programs' text there")


def _compile(arguments) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever is not compiled for the slice is computed here
    from proglora_jax.continual.compile_ahead import PROGRAMS, Order, compile_ahead, compile_text, write_report
    from proglora_jax.training.config_file import load_config

    programs = PROGRAMS if arguments.program == "all" else (arguments.program,)
    order = Order(arguments.topology, programs, tuple(arguments.positions), arguments.hlo)
    report = compile_ahead(load_config(arguments.config, arguments.overrides), order)
    print(compile_text(report))
    if arguments.json:
        write_report(report, arguments.json)
    return 0 if report["fits"] else 1


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

    way = _verb(ways, "to-hf", "Write a trained stage as a PEFT adapter, merged into a LLaVA folder, or all blocks with gates.", _to_hf)
    way.add_argument("workdir", help="folder of the run")
    way.add_argument("--out", required=True, help="folder to write; must be empty or absent")
    way.add_argument("--kind", choices=("adapter", "merged", "dynamic"), default="adapter",
                     help="dynamic: every block as a PEFT adapter, what gates them, and a torch module that puts them together")
    way.add_argument("--stage", help="number as in the stage's folder, or the task's name; default: the last one that is trained")
    way.add_argument("--task", help="whose fused block, for methods that fuse by task; default: the stage's own")
    way.add_argument("--block", type=int, help="one block as it was trained, without gates, counted from 0 (adapter only)")
    _add_places(way)
    way.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights; default: the backbone's formats")
    way.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None,
                     help="reload it with torch (and peft) in f32 and compare with our model before it is done; default: where torch is")
    way.add_argument("--tolerance", type=float, default=1e-4,
                     help="how far a logit may be from ours (default 1e-4); large models have longer sums and larger logits (both are "
                          "printed), whose rounding alone may be more")


def _to_hf(arguments) -> None:
    from proglora_jax.continual.export_command import export_command

    export_command(arguments)


def _add_places(parser) -> None:
    parser.add_argument("--base", help="folder of the backbone, where it is not where the run found it")
    parser.add_argument("--vision", help="folder of its CLIP, for a backbone in the layout of original LLaVA that has moved")
    parser.add_argument("--projector", help="its projector's file or folder; as --vision")


def _from_hf(arguments) -> None:
    from proglora_jax.checkpoints.hf_convert import convert_from_hf

    places = {"vision_folder": arguments.vision, "projector_file": arguments.projector}
    convert_from_hf(arguments.folder, arguments.out, **places, style=arguments.style, dtype=arguments.dtype)


def _add_predict(verbs) -> None:
    parser = _verb(verbs, "predict", "Ask a trained stage: an image and a question in, answer and gates out.", _predict)
    parser.add_argument("workdir", help="folder of the run")
    parser.add_argument("--image", help="an image file; without it the question is about text alone")
    parser.add_argument("--question", help="the whole question; the run's own questions end with an instruction, see --instruction")
    parser.add_argument("--questions", metavar="FILE", help='JSONL, one {"question": ..., "image": ...} a line')
    parser.add_argument("--instruction", default="", metavar="TASK", help="put the instruction of this task to the question")
    parser.add_argument("--stage", help="number as in the stage's folder, or the task's name; default: the last one that is trained")
    parser.add_argument("--task", help="whose block answers, for methods that are told; default: the stage's own")
    _add_places(parser)
    parser.add_argument("--image-mode", choices=("pad", "crop"), default="pad", help="pad to a square as in training, or crop its centre")
    parser.add_argument("--max-new-tokens", type=int, default=0,
                        help="cap on an answer; default: config.evaluate.max_new_tokens of the run, or 128 where that is left to the task")
    parser.add_argument("--json", action="store_true", help="one line of JSON per question instead of text")


def _predict(arguments) -> None:
    from proglora_jax.continual.predict import answer_command

    answer_command(arguments)


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


def _add_make_instructions(verbs) -> None:
    summary = "Make the files of another instruction set from those that are there; only the instruction in each record is exchanged."
    parser = _verb(verbs, "make-instructions", summary, _make_instructions)
    parser.add_argument("root", help="data root; holds playground/ and cl_dataset/")
    parser.add_argument("--set", required=True, help="the set to make: Diverse, 10Type or Original")
    parser.add_argument("--from", dest="source", default="Original", help="the set that the files are of (Original)")
    parser.add_argument("--tasks", default="coin", help="a named order, or task names with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among several instructions")


def _make_instructions(arguments) -> None:
    from proglora_jax.checkpoints.hf_convert import whole_folder
    from proglora_jax.data.retemplate import target_folder, write_set
    from proglora_jax.data.tasks import ORDERS

    tasks = arguments.tasks if arguments.tasks in ORDERS else _names(arguments.tasks)
    with whole_folder(target_folder(arguments.root, arguments.set, arguments.source, tasks)) as partial:
        write_set(arguments.root, partial, arguments.set, arguments.source, tasks, arguments.seed)


def _add_make_base(verbs) -> None:
    parser = _verb(verbs, "make-base", "Train the embedded base model from nothing and write it as a Hugging Face folder.", _make_base)
    parser.add_argument("--out", required=True, help="folder to write; must be empty or absent")
    parser.add_argument("--seed", type=int, default=0)


def _make_base(arguments) -> None:
    from proglora_jax.training.base_recipe import make_base

    make_base(arguments.out, arguments.seed)


if __name__ == "__main__":
    entry()
