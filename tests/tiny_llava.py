"""A tiny random LLaVA of ours and random batches for it: tasks whose instructions and answers use words of their own."""

from __future__ import annotations

import functools

import jax
import numpy as np

from proglora_jax.core import mesh as meshes
from proglora_jax.core.tree import flatten
from proglora_jax.data import batch as codes
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import Llava, build, random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig

BOS, EOS, USER, IMAGE_TOKEN, PAD, VOCAB = 1, 2, 3, 61, 60, 64
CONFIG = LlavaConfig(
    text_config=LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    vision_config=ClipConfig(
        hidden_size=16, intermediate_size=24, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    ),
    image_token_id=IMAGE_TOKEN,
    pad_token_id=PAD,
)
PATCHES, SIDE = CONFIG.image_tokens, CONFIG.vision_config.image_size


@functools.cache
def model(dtype: str = "float32", unroll: int = 1) -> Llava:
    """The model, computing in `dtype`; its embeddings are large enough for instructions to differ."""
    llava = random_llava(CONFIG, seed=3, settings=Settings(dtype=dtype, unroll=unroll))
    tree = llava.to_tree()
    tree["language"]["embed_tokens"] = tree["language"]["embed_tokens"] * 25
    return Llava.from_tree(CONFIG, tree, llava.settings)


def mesh(**shape: int):
    """A mesh with the given axes on the first simulated devices; one device without axes."""
    shape = {"data": 1, "fsdp": 1, "model": 1} | shape
    return meshes.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


def place(llava: Llava, on) -> Llava:
    """The model on a mesh, as a run places it."""
    flat = flatten(llava.to_tree())
    return build(CONFIG, lambda path, _: jax.device_put(flat[path], meshes.backbone_sharding(path, flat[path].shape, on)), llava.settings)


def row(rng: np.random.Generator, task: int = 0, *, image: bool = True, words: int | None = None, answer: int | None = None, **rest):
    """One row of a task: BOS, the image, a few of the task's eight words, a role tag, and an answer of the task's own token."""
    words = int(rng.integers(2, 6)) if words is None else words
    answer = int(rng.integers(1, 4)) if answer is None else answer
    instruction = rng.integers(20 + 8 * task, 28 + 8 * task, words)
    closing = [EOS] if answer else []
    parts = [
        ([BOS], codes.TEMPLATE), ([IMAGE_TOKEN] * PATCHES * image, codes.IMAGE), (instruction, codes.INSTRUCTION),
        ([USER], codes.TEMPLATE), ([10 + task] * answer + closing, codes.ANSWER),
    ]  # fmt: skip
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    segments = np.concatenate([np.full(len(ids), code, np.int8) for ids, code in parts])
    pixels = rng.standard_normal((SIDE, SIDE, 3)).astype(np.float32) if image else None
    return codes.BatchRow(tokens, segments, pixels, task, rest.pop("example", 0), **rest)


def batch(rows, positions: int = 20, labels: int = 5) -> codes.Batch:
    """Rows as a batch of the bucket (positions, labels)."""
    return codes.collate(rows, (positions, labels), PAD, (SIDE, SIDE))


def rows_of(task: int, count: int, seed: int = 0, **fixed):
    """`count` rows of a task; every fourth has no image."""
    rng = np.random.default_rng([seed, task])
    return [row(rng, task, **({"image": i % 4 != 3, "example": i} | fixed)) for i in range(count)]


def embed_batch(llava, params, batch):
    """Input embeddings [B, T, D] of a batch, images through the tower and the state's projector."""
    return llava.embed(batch["tokens"], llava.project(llava.encode_image(batch["image"]), params["mm_projector"]))
