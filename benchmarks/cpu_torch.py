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

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.core import host
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data import batch as codes
from proglora_jax.training import loop, optim, shapes
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import Settings, from_config
from proglora_jax.training.step import make_generator, make_train_step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
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
PROMPT_IDS, IMAGE_ID, LABELS = 5, 3, 8  # the first id of ordinary words; the image's id; supervised tokens a row


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
    host.keep_freed_memory()
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
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14, projection_dim=64)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID, pad_token_id=0, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=shape.image_tokens)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def rows_of(shape: Shape) -> dict[str, np.ndarray]:
    """A batch of random words and one image a row, no padding; the last words are the answer."""
    rng, image = np.random.default_rng(0), np.arange(2, 2 + shape.image_tokens)
    rows = []
    for index in range(shape.rows):
        tokens = rng.integers(PROMPT_IDS, shape.vocabulary, shape.positions).astype(np.int32)
        segments = np.full(shape.positions, codes.INSTRUCTION, np.int8)
        tokens[image], segments[image] = IMAGE_ID, codes.IMAGE
        segments[-LABELS:] = codes.ANSWER
        picture = rng.normal(size=(112, 112, 3)).astype(np.float32)
        rows.append(codes.BatchRow(tokens, segments, picture, 0, index))
    return codes.collate(rows, (shape.positions, LABELS), 0, (112, 112))


class Ours:
    """The last stage of a method on the folder's model, with random blocks in its pool."""

    def __init__(self, shape: Shape, folder: str, method: str, fields: dict, blocks: int, remat: str):
        overrides = {"rank": RANK, "alpha": ALPHA, **fields}
        flags = [f"--config.method.{name}={value}" for name, value in overrides.items()]
        flags += [f"--config.train.learning_rate={RATE}", f"--config.train.projector_learning_rate={RATE}",
                  f"--config.model.remat={remat}", "--config.data.root=unused"]
        self.settings: Settings = from_config(load_config(f"{ROOT / 'configs/coin_mini.py'}:method={method}", flags))
        self.mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
        self.llava = load_llava(folder, np.float32, mesh=self.mesh)
        method_, train = self.settings.method, self.settings.train
        llava = shapes.abstract_backbone(self.llava.config, self.settings.model)
        stage = [*shapes.abstract_stages(method_, llava, [f"task{i}" for i in range(blocks)], [100] * blocks, self.mesh)][-1]
        rng, host_tree = np.random.default_rng(1), meshes.to_host(self.llava.projector_params())
        filled = {path: _filled(path, leaf, rng) for path, leaf in trees.flatten(stage.state.params).items()}
        params = trees.unflatten(filled) | {"mm_projector": host_tree}
        memory = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stage.state.memory)
        self.state = CLState(params=params, memory=memory, carry={}, stage=np.int32(blocks - 1))
        self.trainable, frozen = trees.partition(params, stage.mask)
        self.frozen, self.memory = meshes.put_replicated((frozen, memory), self.mesh)
        self.step = make_train_step(method_, train, remat, False, self.mesh)
        self.generator = make_generator(method_, self.mesh, shape.new_tokens, -1, 0, shape.vocabulary)
        batch = rows_of(shape) | {"task_id": np.full(shape.rows, blocks - 1, np.int32)}
        self.batch = meshes.put_batch(batch, self.mesh)
        self.prompts = meshes.put_batch(batch, self.mesh)
        self.start()

    def start(self) -> None:
        """Back to the first step."""
        self.now = loop.start_phase(self.trainable, self.settings.train, self.mesh)

    def train(self) -> float:
        """One step; its loss."""
        rates = optim.learning_rates(self.settings.train, self.settings.method, 0, 1)
        control = {
            "stage": self.state.stage, "step": np.int32(0), "progress": np.float32(0), "key": jax.random.key(0), "running": {},
            "rates": {name: np.float32(RATE) for name in rates},
        }  # fmt: skip
        self.now.trainable, self.now.optimizer, metrics = self.step(
            self.now.trainable, self.now.optimizer, self.frozen, self.memory, self.llava, self.batch, control)
        return float(metrics["loss"])

    def generate(self) -> np.ndarray:
        """New tokens i32[B, N] after the batch's rows."""
        params = trees.merge(self.frozen, self.now.trainable)
        return np.asarray(self.generator(params, self.memory, self.llava, self.prompts, self.state.stage)["tokens"])


def _filled(path: str, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    if path.startswith("block/") and path.endswith("/b"):
        return np.zeros(leaf.shape, leaf.dtype)
    return rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype)


class Torch:
    """transformers' LLaVA with PEFT's adapters, which hold our blocks; all are active and the last trains."""

    def __init__(self, shape: Shape, folder: str, ours: Ours, blocks: int, remat: str):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
        self.model = peft.get_peft_model(model, config, adapter_name="block0")
        for index in range(1, blocks):
            self.model.add_adapter(f"block{index}", config)
        self.model.base_model.set_adapter([f"block{index}" for index in range(blocks)])
        self._copy(ours, blocks)
        for name, leaf in self.model.named_parameters():
            leaf.requires_grad_(f".block{blocks - 1}." in name or "multi_modal_projector" in name)
        if remat == "full":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
        batch = rows_of(shape)
        tokens = torch.tensor(batch["tokens"], dtype=torch.int64)
        labels = torch.full_like(tokens, -100)
        labels[:, -LABELS:] = tokens[:, -LABELS:]
        self.batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels,
                      "pixel_values": torch.tensor(batch["image"].transpose(0, 3, 1, 2).copy())}
        self.new_tokens = shape.new_tokens

    def _copy(self, ours: Ours, blocks: int) -> None:
        params, leaves = ours.state.params, dict(self.model.named_parameters())
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
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def generate(self) -> np.ndarray:
        """New tokens i32[B, N] after the batch's rows."""
        given = {name: value for name, value in self.batch.items() if name != "labels"}
        self.model.eval()
        with torch.no_grad():
            out = self.model.generate(**given, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=False)
        self.model.train()
        return out[:, given["input_ids"].shape[1]:].numpy()


def compare(name: str, shape: Shape, folder: str, rounds: int, steps: int) -> list[dict]:
    """The rows of a case: a training step and a generation."""
    method, fields, blocks, remat = CASES[name]
    ours = Ours(shape, folder, method, fields, blocks, remat)
    other = Torch(shape, folder, ours, blocks, remat)
    began = time.perf_counter()
    first = [ours.train()]
    compiled = time.perf_counter() - began
    same = method in SAME_FUNCTION
    first += [ours.train() for _ in range(2)]
    theirs = [other.train() for _ in range(3)]
    if same and not np.allclose(first, theirs, rtol=1e-3):
        raise RuntimeError(f"{name}: the two sides do not train the same: losses {first} here, {theirs} in torch")
    rows = [{"case": name, "what": "training step", "losses": [first, theirs], "compile_s": compiled}
            | in_turns(ours.train, other.train, rounds, steps)]
    if remat == "none":
        ours.start()
        restored = Torch(shape, folder, ours, blocks, remat)
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
