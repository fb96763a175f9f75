"""Training step and generation against transformers and PEFT in torch: same weights, same shapes, in turns, on the CPU.

    python benchmarks/cpu_torch.py                  everything, minutes on two cores
    python benchmarks/cpu_torch.py --rounds 3       a quick look

A random LLaVA is made by transformers, written to a folder and read by both. What is timed is first shown to be the same thing: the
losses of the first steps, and the tokens generated. Then both sides take turns, a few steps each; the result is the median over rounds
of torch's time by ours. PEFT with several active adapters is torch's loop over blocks: it has no gates. Results:
benchmarks/results/cpu_torch.json and cpu_torch.md. Needs the extra "test".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import peft
import torch
import transformers
from sides import peers
from sides.ours import DEVIATION, Ours
from sides.rows import random_batch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.core import host
from proglora_jax.models.llava import Llava
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import Settings, from_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Name -> (our method, its fields, blocks, remat).
CASES = {
    "one LoRA": ("lora", {}, 1, "none"),
    "one LoRA, remat": ("lora", {}, 1, "full"),
    "pool of 8, summed": ("olora", {"orthogonal_weight": 0.0, "norm_weight": 0.0}, 8, "none"),
    "pool of 8, summed, remat": ("olora", {"orthogonal_weight": 0.0, "norm_weight": 0.0}, 8, "full"),
    "pool of 8, ProgLoRA's gates and recall": ("proglora_dynamic", {"proj_width": 64}, 8, "none"),
}
SAME_FUNCTION = ("lora", "olora")
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
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    arguments = parser.parse_args()
    host.keep_freed_memory()  # as the main job does
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    shape = Shape(layers=2, width=32, inner=48, heads=2, vocabulary=128, positions=80, new_tokens=3) if arguments.tiny else Shape()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random(shape, folder)
        for name in arguments.cases:
            rows += compare(name, shape, folder, arguments.rounds, arguments.steps)
            print(json.dumps(rows[-2:]), flush=True)
    write(rows, shape, threads, arguments.out)


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
            | in_turns(ours.train, other.train, rounds, steps)]
    if remat == "none":
        ours.side.start()
        restored = There(shape, folder, ours, blocks, remat)
        agree = float((ours.generate() == restored.generate()).mean())
        if same and agree < 1:
            raise RuntimeError(f"{name}: the two sides answer differently: {agree:.0%} of the tokens agree")
        rows.append({"case": name, "what": f"generation of {shape.new_tokens} tokens", "tokens_agree": agree}
                    | in_turns(ours.generate, restored.generate, rounds, max(1, steps // 3)))
    return rows


def in_turns(ours: Callable, theirs: Callable, rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a call, and the median over rounds of torch's time by ours."""
    sides: tuple[list[float], list[float]] = [], []
    for turn in range(rounds + 1):
        for side, function in sorted(enumerate((ours, theirs)), key=lambda pair: (pair[0] + turn) % 2):
            function()  # wakes its threads
            began = time.perf_counter()
            for _ in range(steps):
                function()
            if turn:
                sides[side].append((time.perf_counter() - began) / steps * 1e3)
    ratios = sorted(b / a for a, b in zip(*sides, strict=True))
    return {"ours_ms": statistics.median(sides[0]), "torch_ms": statistics.median(sides[1]), "ratio": statistics.median(ratios),
            "lowest": ratios[0], "highest": ratios[-1], "rounds": rounds}


def write(rows: list[dict], shape: Shape, threads: int, folder: Path) -> None:
    """The numbers, and the table."""
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"shape": dataclasses.asdict(shape), "rank": RANK, "threads": threads, "versions": versions, "rows": rows}
    (folder / "cpu_torch.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# Training step and generation against transformers and PEFT in torch, CPU", "", "`python benchmarks/cpu_torch.py`", "",
        f"A random LLaVA in float32 ({shape.layers} layers of width {shape.width}, {shape.heads} heads, inner width {shape.inner}, "
        f"vocabulary {shape.vocabulary}; a CLIP tower of 3 layers of width 128), {shape.rows} rows of {shape.positions} positions of which "
        f"{shape.image_tokens} are an image, rank {RANK} on all seven linears, projector trained, AdamW; {threads} threads on both sides. "
        "Ratio: torch's time by ours, median over rounds in which both took turns (lowest and highest round in brackets). Torch runs eager "
        "with SDPA attention; remat is gradient checkpointing of every layer.", "",
        "| case | what | ours, ms | torch, ms | torch / ours |", "|---|---|---|---|---|",
        *(f"| {row['case']} | {row['what']} | {row['ours_ms']:.1f} | {row['torch_ms']:.1f} | "
          f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f}) |" for row in rows),
        "", ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]  # fmt: skip
    (folder / "cpu_torch.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
