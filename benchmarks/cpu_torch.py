"""Training step and generation against transformers and PEFT in torch: same weights, same shapes, in turns, on the CPU.

    python benchmarks/cpu_torch.py                  everything, minutes on two cores
    python benchmarks/cpu_torch.py --rounds 3       a quick look
    python benchmarks/cpu_torch.py --threads 1      on one core
    python benchmarks/cpu_torch.py --draw           tables and figure again, from the numbers that are there

A random LLaVA is made by transformers, written to a folder and read by both. What is timed is first shown to be the same thing: the
losses of the first steps, and the tokens generated. Then both sides take turns, a few steps each; the result is the median over rounds
of torch's time by ours. PEFT with several active adapters is torch's loop over blocks: it has no gates. Then our sides among themselves:
one block, a pool of eight, and the same eight in a loop. The process is kept to its cores, a thread a core on both sides. Results:
benchmarks/results/cpu_torch.json, .md and .png. Needs the extra "test".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import peft
import torch
import transformers
from shared import OURS, RESULTS, ROOT, THEIRS, Bar, bars, conditions, hold, in_turns, load_of, ratio, read
from shared import write as write_files
from sides import peers
from sides.ours import DEVIATION, Ours, with_loop
from sides.rows import random_batch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.core import host
from proglora_jax.models.llava import Llava
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import Settings, from_config

# Name -> (our method, its fields, blocks, remat).
CASES = {
    "one LoRA": ("lora", {}, 1, "none"),
    "one LoRA, remat": ("lora", {}, 1, "full"),
    "pool of 8, summed": ("olora", {"orthogonal_weight": 0.0, "norm_weight": 0.0}, 8, "none"),
    "pool of 8, summed, remat": ("olora", {"orthogonal_weight": 0.0, "norm_weight": 0.0}, 8, "full"),
    "pool of 8, ProgLoRA's gates and recall": ("proglora_dynamic", {"proj_width": 64}, 8, "none"),
}
SAME_FUNCTION = ("lora", "olora")
# Our sides that take turns with one another: name -> (case, whether its blocks are in a loop); and what is compared with what.
ALONE = {"one LoRA": ("one LoRA", False), "pool of 8, summed": ("pool of 8, summed", False),
         "pool of 8": ("pool of 8, ProgLoRA's gates and recall", False),
         "loop over 8 blocks": ("pool of 8, ProgLoRA's gates and recall", True)}
PAIRS = (("pool of 8, summed", "one LoRA"), ("pool of 8", "one LoRA"), ("loop over 8 blocks", "pool of 8"))
RANK, ALPHA, RATE = 16, 32.0, 1e-3
IMAGE_ID, LABELS = 3, 8  # the image's id; supervised tokens a row


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark: decoder layers, width, inner width, heads, vocabulary, rows, positions, new tokens."""

    layers: int = 4
    width: int = 256
    inner: int = 688
    heads: int = 8
    vocabulary: int = 2048
    rows: int = 4
    positions: int = 128
    new_tokens: int = 16

    @property
    def image_tokens(self) -> int:
        """Positions of an image: 112 pixels in squares of 14."""
        return 64


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=0, help="and as many cores; 0: all that the process may use")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        return write(read(arguments.out, "cpu_torch"), arguments.out)
    found = conditions()
    host.keep_freed_memory()  # as the main job does
    jax.config.update("jax_platforms", "cpu")
    threads = hold(arguments.threads)  # XLA makes its threads with the first program, and as many
    torch.set_num_threads(threads)
    shape = Shape(layers=2, width=32, inner=48, heads=2, vocabulary=128, positions=80, new_tokens=3) if arguments.tiny else Shape()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random(shape, folder)
        for name in arguments.cases:
            rows += compare(name, shape, folder, arguments.rounds, arguments.steps)
            print(json.dumps(rows[-2:]), flush=True)
        alone = compare_ours(shape, folder, arguments.rounds, arguments.steps)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    write(found | {"shape": dataclasses.asdict(shape), "rank": RANK, "threads": threads, "versions": versions, "rows": rows,
                   "ours_alone": alone}, arguments.out)


def save_random(shape: Shape, folder: str) -> None:
    """A random LLaVA of transformers, in its own format."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=2048, rms_norm_eps=1e-5)
    vision = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14,
        projection_dim=64)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID, pad_token_id=0, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=shape.image_tokens)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


class Here:
    """The last stage of a method on the folder's model, with random blocks in its pool."""

    def __init__(self, shape: Shape, llava: Llava, settings: Settings, blocks: int):
        self.side, rng = Ours(settings, llava.config, blocks), np.random.default_rng(1)
        self.side.load(llava, lambda path, leaf: rng.normal(0, DEVIATION, leaf.shape).astype(leaf.dtype))
        batch = random_batch(llava.config, shape.rows, shape.positions, LABELS)
        self.step, self.generator = self.side.compile_step(shape.rows, (shape.positions, LABELS)), None
        self.shape, self.batch = shape, self.side.place(batch)
        self.prompts = self.side.place(random_batch(llava.config, shape.rows, shape.positions, 0))

    def train(self) -> float:
        """One step; its loss."""
        return float(self.side.train(self.step, self.batch))

    def generate(self) -> np.ndarray:
        """New tokens i32[B, N] after the batch's rows."""
        if self.generator is None:
            self.generator = self.side.compile_generator(self.shape.rows, self.shape.positions, self.shape.new_tokens)
        return np.asarray(self.side.generate(self.generator, self.prompts))


def settings_of(method: str, fields: dict, remat: str) -> Settings:
    """The embedded model's settings for a case."""
    overrides = {"rank": RANK, "alpha": ALPHA, **fields}
    flags = [f"--config.method.{name}={value}" for name, value in overrides.items()]
    flags += [f"--config.train.learning_rate={RATE}", f"--config.train.projector_learning_rate={RATE}",
              "--config.train.schedule=constant", "--config.train.warmup_fraction=0.0",
              f"--config.model.remat={remat}", "--config.data.root=unused"]
    return from_config(load_config(f"{ROOT / 'configs/coin_mini.py'}:method={method}", flags))


class There:
    """transformers' LLaVA with PEFT's adapters, which hold our blocks; all are active and the last trains."""

    def __init__(self, shape: Shape, folder: str, here: Here, blocks: int, remat: str):
        self.model = peers.attach(transformers.LlavaForConditionalGeneration.from_pretrained(folder), blocks, RANK, ALPHA)
        self._copy(here.side.params, blocks)
        peers.set_checkpointing(self.model, remat == "full")
        self.side, self.new_tokens = peers.Trainer(self.model, RATE), shape.new_tokens
        self.batch = peers.tensors({name: np.asarray(value) for name, value in here.batch.items()}, LABELS)

    def _copy(self, params: dict, blocks: int) -> None:
        leaves = dict(self.model.named_parameters())
        for index in range(blocks):
            newest, at = index == blocks - 1, slice(index * RANK, (index + 1) * RANK)
            for name, pair in params["block"].items():
                a = pair["a"] if newest else params["pool"][name]["a"][:, :, at]
                b = pair["b"] if newest else params["pool"][name]["b"][:, at]
                for layer in range(len(a)):
                    place = [key for key in leaves if f"language_model.layers.{layer}." in key and f".{name}.lora_" in key
                             and f".block{index}." in key]
                    for key in place:
                        value = a[layer].T if "lora_A" in key else b[layer].T
                        leaves[key].data.copy_(torch.tensor(np.array(value)))
                    if len(place) != 2:
                        raise RuntimeError(f"{name} of layer {layer}: PEFT has {place}")

    def train(self) -> float:
        """One step; its loss."""
        return float(self.side.train(self.batch))

    def generate(self) -> np.ndarray:
        """New tokens i64[B, N] after the batch's rows."""
        return self.side.generate(self.batch, self.new_tokens)


def compare(name: str, shape: Shape, folder: str, rounds: int, steps: int) -> list[dict]:
    """The rows of a case: a training step and a generation."""
    method, fields, blocks, remat = CASES[name]
    llava = load_llava(folder, np.float32)
    began = time.perf_counter()
    ours = Here(shape, llava, settings_of(method, fields, remat), blocks)
    compiled = time.perf_counter() - began
    other, same = There(shape, folder, ours, blocks, remat), method in SAME_FUNCTION
    first = [ours.train() for _ in range(3)]
    theirs = [other.train() for _ in range(3)]
    if same and not np.allclose(first, theirs, rtol=1e-5, atol=0):
        raise RuntimeError(f"{name}: the two sides do not train the same: losses {first} here, {theirs} in torch")
    rows = [{"case": name, "what": "training step", "losses": [first, theirs], "compile_s": compiled}
            | both_sides(ours.train, other.train, rounds, steps)]
    if remat == "none":
        ours.side.start()
        restored = There(shape, folder, ours, blocks, remat)
        agree = float((ours.generate() == restored.generate()).mean())
        if same and agree < 1:
            raise RuntimeError(f"{name}: the two sides answer differently: {agree:.0%} of the tokens agree")
        rows.append({"case": name, "what": f"generation of {shape.new_tokens} tokens", "tokens_agree": agree}
                    | both_sides(ours.generate, restored.generate, rounds, max(1, steps // 3)))
    return rows


def both_sides(ours: Callable, theirs: Callable, rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a call, and the median over rounds of torch's time by ours."""
    seconds = in_turns({"ours": ours, "torch": theirs}, rounds, steps)
    return {f"{name}_ms": 1e3 * statistics.median(own) for name, own in seconds.items()} | ratio(seconds["torch"], seconds["ours"]) | {
        "rounds": rounds}


def compare_ours(shape: Shape, folder: str, rounds: int, steps: int, *, generation: bool = True) -> list[dict]:
    """The rows of our sides among themselves: a training step and, where asked for, a generation, all in turns."""
    llava, sides = load_llava(folder, np.float32), {}
    for name, (case, loop) in ALONE.items():
        method, fields, blocks, remat = CASES[case]
        settings = settings_of(method, fields, remat)
        sides[name] = Here(shape, llava, with_loop(settings) if loop else settings, blocks)
    first = {name: [side.train() for _ in range(3)] for name, side in sides.items()}
    if not np.allclose(first["pool of 8"], first["loop over 8 blocks"], rtol=1e-5, atol=0):
        raise RuntimeError(f"the loop over blocks does not train as the pool does: losses {first}")
    rows, turns = [], [("training step", {name: side.train for name, side in sides.items()}, steps)]
    if generation:
        turns.append((f"generation of {shape.new_tokens} tokens", {name: side.generate for name, side in sides.items()}, max(1, steps // 3)))
    for what, calls, turn in turns:
        seconds = in_turns(calls, rounds, turn)
        medians = {name: 1e3 * statistics.median(own) for name, own in seconds.items()}
        rows += [{"what": what, "above": above, "below": below, "above_ms": medians[above], "below_ms": medians[below]}
                 | ratio(seconds[above], seconds[below]) for above, below in PAIRS]
    return rows


def write(found: Mapping[str, Any], folder: Path) -> None:
    """The numbers, the tables and the figure."""
    shape, threads, rows, alone = Shape(**found["shape"]), found["threads"], found["rows"], found.get("ours_alone", [])
    span = lambda row: f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})"
    lines = [
        "# Training step and generation against transformers and PEFT in torch, CPU", "",
        f"`python benchmarks/cpu_torch.py{'' if threads == found.get('cores', threads) else f' --threads {threads}'}`", "",
        f"A random LLaVA in float32 ({shape.layers} layers of width {shape.width}, {shape.heads} heads, inner width {shape.inner}, "
        f"vocabulary {shape.vocabulary}; a CLIP tower of 3 layers of width 128), {shape.rows} rows of {shape.positions} positions of which "
        f"{shape.image_tokens} are an image, rank {found['rank']} on all seven linears, projector trained, AdamW; threads on each side: "
        f"{threads}{load_of(found)}. Ratio: torch's time by ours, median over rounds in which both took turns (lowest and highest round in "
        "brackets). Torch runs eager with SDPA attention; remat is gradient checkpointing of every layer. Compile: what our side takes "
        "before its first training step, compiling and placing weights.", "",
        "![Ratios](cpu_torch.png)", "",
        "| case | what | ours, ms | torch, ms | torch / ours | compile, s |", "|---|---|---:|---:|---:|---:|",
        *(f"| {row['case']} | {row['what']} | {row['ours_ms']:.1f} | {row['torch_ms']:.1f} | {span(row)} | "
          f"{format(row['compile_s'], '.1f') if 'compile_s' in row else ''} |" for row in rows),
        "",
    ]  # fmt: skip
    if alone:
        lines += [
            "## Our sides among themselves", "",
            "All in turns; what is not called summed has ProgLoRA's gates and recall. The loop has a pair of matmuls for each block, as "
            "the published code; its losses are the pool's.", "",
            "| what | | ms | by | ms | ratio |", "|---|---|---:|---|---:|---:|",
            *(f"| {row['what']} | {row['above']} | {row['above_ms']:.1f} | {row['below']} | {row['below_ms']:.1f} | {span(row)} |"
              for row in alone), "",
        ]  # fmt: skip
    lines += [", ".join(f"{name} {version}" for name, version in found["versions"].items()) + "."]
    write_files(folder, "cpu_torch", found, lines, figure(rows, alone))


def figure(rows: list[dict], alone: list[dict]) -> bytes:
    """The ratios, with their lowest and highest round."""
    bar = lambda row, name, colour: Bar(name, row["ratio"], row["lowest"], row["highest"], colour)
    short = lambda row: row["what"].replace("training step", "training").replace(" of", ",")
    return bars({
        "Torch's time by ours (line: lowest to highest round)": [bar(row, f"{row['case']}: {short(row)}", OURS) for row in rows],
        "Our sides among themselves, time by time": [
            bar(row, f"{row['above']} by {row['below']}: {short(row)}", THEIRS if "loop" in row["above"] else OURS) for row in alone],
    }, mark=1.0)  # fmt: skip


if __name__ == "__main__":
    main()
