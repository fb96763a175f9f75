"""Questions that share images: answers a second with the pass over the image's prompt shared against not, and the work at 7B.

    python benchmarks/prefix.py              a minute or two on two cores
    python benchmarks/prefix.py --rounds 1   a quick look
    python benchmarks/prefix.py --draw       tables and figure again, from the numbers that are there

The embedded model answers the questions of one embedded task, of which every three are made to ask about the same image, by both ways in
turns, in batches of configs/coin_mini.py, images decoded once; what is timed is a whole pass from batches to tokens on the host, and the
answers must be the same. The second table is counted, not measured: matmuls of the traced programs at the sizes of LLaVA-1.5 7B, plain
prompts padded to 704 positions. Results: benchmarks/results/prefix.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from shared import BESIDE, RESULTS, ROOT, Bar, bars, read
from shared import write as write_files

from proglora_jax.continual.session import Session, open_session
from proglora_jax.core import host
from proglora_jax.core import mesh as meshes
from proglora_jax.data.image_groups import GroupedBatches, group_by_image
from proglora_jax.data.pipeline import EvalBatches, eval_batches
from proglora_jax.models.presets import PRESETS
from proglora_jax.training import programs, shapes
from proglora_jax.training.config_file import load_config
from proglora_jax.training.flops import matmul_work
from proglora_jax.training.settings import from_config

TASK, PER_IMAGE, QUESTIONS = "VQAv2", 3, 300
# At 7B: rows of a batch; positions of a whole prompt, of its beginning (BOS, template, 576 of the image) and of the rest; new tokens.
ROWS, WHOLE, START, REST, NEW = 32, 704, 611, 64, 10
IMAGES = {1.6: 20, 3.2: 10, 5.3: 6, 32.0: 1}
"""Questions an image -> images in a batch."""


def main() -> None:
    """Measures and counts, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        return write(read(arguments.out, "prefix"), arguments.out)
    host.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), arguments.questions, arguments.rounds)
    write({"measured": measured, "counted": [counted(asked, images) for asked, images in IMAGES.items()]}, arguments.out)


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns: medians over the rounds of answers a second, and of their ratio."""
    fields = {"data.root": folder / "data", "data.tasks": TASK, "data.embedded_train_size": 20, "data.embedded_test_size": count,
              "run.tensorboard": False}  # fmt: skip
    config = load_config(f"{ROOT / 'configs/coin_mini.py'}:method=lora", [f"--config.{name}={value}" for name, value in fields.items()])
    session = open_session(from_config(config), folder / "run", resumed=False)
    plain, shared = batches_of(session, count)
    state = session.method.init(session.targets, meshes.to_host(session.llava.projector_params()), 1, 0)
    held = meshes.put_replicated((state.params, state.memory), session.mesh)
    times: dict[str, list[float]] = {"plain": [], "shared": []}
    spent: dict[str, list[float]] = {"plain": [], "shared": []}
    for number in range(rounds + 1):
        told = {}
        for name, batches in (("plain", plain), ("shared", shared)):
            began, cpu = time.perf_counter(), time.process_time()
            told[name] = answers(session, held, state.stage, batches)
            if number:  # the first round compiles and decodes
                times[name].append(time.perf_counter() - began)
                spent[name].append(time.process_time() - cpu)
        if told["plain"] != told["shared"]:
            raise SystemExit("error: the two ways gave different answers")
    return {
        "questions": count, "per_image": PER_IMAGE, "rounds": rounds, "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0], "images_a_batch": shared.images, "rows": session.settings.evaluate.batch_size,
        "positions": float(shared.gain), "ratio": _ratio(times), "cpu_ratio": _ratio(spent), "seconds": times, "cpu_seconds": spent,
        **{f"{name}_per_s": count / statistics.median(values) for name, values in times.items()},
    }  # fmt: skip


def _ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(plain / shared for plain, shared in zip(seconds["plain"], seconds["shared"], strict=True))


def batches_of(session: Session, count: int) -> tuple[EvalBatches, GroupedBatches]:
    """The same questions, three in a row about one image, in plain batches and grouped by image."""
    asked, evaluate = session.questions(TASK)[:count], session.settings.evaluate
    asked = [dataclasses.replace(question, image=asked[index - index % PER_IMAGE].image) for index, question in enumerate(asked)]
    plain = eval_batches(
        asked, session.encoder, session.eval_loader("pad"), batch_size=evaluate.batch_size, lengths=evaluate.prompt_lengths)
    return plain, group_by_image(plain, meshes.batch_ways(session.mesh), 0.0)


def answers(session: Session, held: tuple, stage: jax.Array, batches: EvalBatches) -> dict[int, tuple[int, ...]]:
    """The tokens of every answer, by question."""
    found = {}
    for batch in batches.batches(threads=session.settings.data.threads):
        generate = session.generator(session.settings.evaluate.max_new_tokens, by_image="slot" in batch)
        out = generate(*held, session.llava, meshes.put_batch(batch, session.mesh), stage)
        out = {name: np.asarray(value) for name, value in out.items()}
        found |= {int(out["example"][row]): tuple(out["tokens"][row, : out["count"][row]].tolist()) for row in np.flatnonzero(out["valid"])}
    return found


def counted(asked: float, images: int) -> dict[str, float]:
    """Operations of a batch of the 7B model, prompts read and all new tokens made, plain and shared; and what the caches take."""
    flags = ["--config.data.root=data", "--config.model.path=model"]
    settings = from_config(load_config(f"{ROOT / 'configs/coin.py'}:method=lora,backbone=llava15_7b", flags))
    config, mesh = PRESETS["llava15_7b"](), meshes.make_mesh({"data": 1}, jax.devices()[:1])
    llava = shapes.abstract_backbone(config, settings.model)
    *_, stage = shapes.abstract_stages(settings.method, llava, [TASK], [1000], mesh)
    plain = matmul_work(programs.trace_generator(settings, llava, stage, ROWS, WHOLE, NEW, mesh).jaxpr)
    text = config.text_config
    load = programs.Shared(ROWS, images, START, REST)
    shared = matmul_work(programs.trace_prefix_generator(settings, llava, stage, load, NEW, mesh).jaxpr)
    position = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # bytes of its keys and values in bfloat16
    return {
        "per_image": asked, "images": images, "rows": ROWS,
        "plain_tflop": plain.total / 1e12, "shared_tflop": shared.total / 1e12, "token_tflop": plain.turn / 1e12,
        "prompts": plain.total / shared.total,
        "all": (plain.total + (NEW - 1) * plain.turn) / (shared.total + (NEW - 1) * shared.turn),
        "plain_cache_gb": position * ROWS * (WHOLE + NEW) / 1e9,
        "shared_cache_gb": position * (images * START + ROWS * (START + REST + NEW)) / 1e9,
    }  # fmt: skip


def write(found: dict[str, Any], folder: Path) -> None:
    """The numbers, the tables and the figure."""
    one = found["measured"]
    lines = [
        "# Questions that share images", "",
        f"`python benchmarks/prefix.py`, the embedded model, {one['questions']} questions, {one['per_image']} an image, batches of "
        f"{one['rows']}, {one['cores']} cores; medians of {one['rounds']} rounds in turns. The machine's load was {one['load']:.1f}: "
        f"{'it was idle' if one['load'] <= one['cores'] else 'other programs ran, so the rates are low and their ratio is rough'}.", "",
        "![Answers a second, and work at 7B](prefix.png)", "",
        "| answers a second, plain | shared | ratio | ratio of CPU time | positions read, ratio |", "|---:|---:|---:|---:|---:|",
        f"| {one['plain_per_s']:.0f} | {one['shared_per_s']:.0f} | {one['ratio']:.2f} | {one['cpu_ratio']:.2f} | "
        f"{one['positions']:.2f} |", "",
        "CPU time is of all threads of the process and other programs disturb it little. Beside the positions, the vision tower looks at a "
        "third of the images.", "",
        f"Counted, not measured: matmuls of a batch of {ROWS} questions at the sizes of LLaVA-1.5 7B with one LoRA of rank 128; plain "
        f"prompts are padded to {WHOLE} positions, shared ones are {START} and at most {REST} behind them, answers have {NEW} tokens.", "",
        "| questions an image | images a batch | plain, TFLOP | shared, TFLOP | ratio, prompts | ratio, prompts and answers | "
        "caches, GB: plain | shared |", "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {row['per_image']} | {row['images']} | {row['plain_tflop']:.0f} | {row['shared_tflop']:.0f} | {row['prompts']:.2f} | "
              f"{row['all']:.2f} | {row['plain_cache_gb']:.1f} | {row['shared_cache_gb']:.1f} |" for row in found["counted"]]
    write_files(folder, "prefix", found, lines, figure(found))


def figure(found: dict[str, Any]) -> bytes:
    """Answers a second of both ways, and the ratio of their work at 7B."""
    one = found["measured"]
    rates = [Bar("every prompt by itself", one["plain_per_s"], colour=BESIDE), Bar("beginnings shared", one["shared_per_s"])]
    work = [Bar(f"{row['per_image']:g} questions an image", row["all"]) for row in found["counted"]]
    return bars({f"Measured: answers a second, {one['per_image']} questions an image": rates,
                 "Counted at 7B: operations of plain prompts and answers by shared ones": work})


if __name__ == "__main__":
    main()
