"""Memory of a device while it trains and while it answers: estimated from shapes, or read from the compiled step.

What is held is exact: it follows from shapes, dtypes and shardings. What the backward pass keeps is counted from the names that a
policy saves. The working set of the layer that is being computed depends on what the compiler fuses; its coefficients were fitted
to the compiled training step of the 7B model (XLA for CPU, float32: 3 and 6 layers, 704 positions, every policy), and what a row adds
there agrees within a tenth. A compiler for accelerators should fuse more; no accelerator has been asked yet.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proglora_jax.adapters.distill import CHUNK
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.methods.views import Cost
from proglora_jax.models.llava import Llava
from proglora_jax.training.programs import trace_train_step
from proglora_jax.training.settings import Settings
from proglora_jax.training.shapes import StageShapes

RUNTIME = 1_500_000_000
"""Bytes that the runtime and its libraries take on a device (assumed)."""
USABLE = 0.92
"""Share of a device's memory that a program can plan with: the rest is lost to fragments (assumed)."""


FUSED = ("cudnn", "splash")
"""Attention whose scores never exist at once."""


class Part(NamedTuple):
    """One line of a memory table, in bytes of one device."""

    name: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Load:
    """How much of a batch a device holds at once.

    Attributes:
        rows: rows of a micro-batch on one device.
        positions: T, the padded length.
        labels: K, slots of supervised tokens.
    """

    rows: int
    positions: int
    labels: int


def training_memory(settings: Settings, llava: Llava, stage: StageShapes, load: Load, mesh: Any) -> list[Part]:
    """What a device holds at the peak of a training step.

    Args:
        settings: the config.
        llava: from `shapes.abstract_backbone`.
        stage: a phase of a stage of `shapes.abstract_stages`.
        load: what the device computes at once.
        mesh: from `meshes.abstract_mesh`, or a real one.
    """
    trainable, frozen = trees.partition(stage.state.params, stage.mask)
    size = trees.count_bytes(trainable)
    copies = 1 if settings.train.micro_batches == 1 else 2  # the sum so far, and the newest part's
    cost = settings.method.cost(stage.state.params, stage.info, stage.phase)
    kept, work = activation_bytes(settings, llava, cost, load)
    return [
        Part("frozen backbone", backbone_bytes(llava, mesh)),
        Part("frozen blocks and keys", trees.count_bytes(frozen)),
        Part("memory of the method", trees.count_bytes(stage.state.memory)),
        Part("trainable", size),
        Part("gradients", copies * size),
        Part("Adam's moments", 2 * size),
        Part(f"activations kept, remat {settings.model.remat}", kept),
        Part("working set of a layer", work),
        Part("runtime", RUNTIME),
    ]


def answering_memory(
    settings: Settings, llava: Llava, stage: StageShapes, load: Load, new_tokens: int, mesh: Any, shared: int = 0
) -> list[Part]:
    """What a device holds while it answers: prompts of `load`, and the cache with room for the answers.

    Args:
        settings, llava, stage, load, mesh: as for `training_memory`.
        new_tokens: cap on an answer.
        shared: positions of beginnings that several prompts share; their keys and values are copied, and so are there twice.
    """
    text = llava.config.text_config
    width = jnp.dtype(settings.model.dtype).itemsize
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * width
    # Two of a layer's widest values at once, and the scores of plain attention.
    scores = 0 if settings.model.attention in FUSED else 2 * 4 * text.num_attention_heads * load.positions**2
    inner = 2 * (text.intermediate_size + text.hidden_size) * load.positions * width
    return [
        Part("frozen backbone", backbone_bytes(llava, mesh)),
        Part("blocks, keys, projector", trees.count_bytes(stage.state.params)),
        Part("memory of the method", trees.count_bytes(stage.state.memory)),
        Part("keys and values", position * (load.positions + new_tokens) * load.rows),
        *([Part("keys and values of shared beginnings, at most", position * shared)] if shared else []),
        Part("working set of a layer", load.rows * (scores + inner)),
        Part("runtime", RUNTIME),
    ]


def total(parts: list[Part]) -> float:
    """Sum of the parts, bytes."""
    return sum(part.bytes for part in parts)


# {model: {mesh: bytes}}
_BACKBONE_BYTES: weakref.WeakKeyDictionary[Llava, dict[Any, int]] = weakref.WeakKeyDictionary()


def backbone_bytes(llava: Llava, mesh: Any) -> int:
    """Bytes of the backbone on one device of a mesh, by the shardings of a run; counted once, as a plan asks thousands of times."""
    known = _BACKBONE_BYTES.setdefault(llava, {})
    if mesh not in known:
        known[mesh] = sum(
            int(np.prod(meshes.backbone_sharding(path, leaf.shape, mesh).shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for path, leaf in trees.flatten(llava.to_tree()).items())
    return known[mesh]


def activation_bytes(settings: Settings, llava: Llava, cost: Cost, load: Load) -> tuple[float, float]:
    """(what is kept for the backward pass over all layers, the working set of the layer at hand), bytes of one device.

    A teacher's pass comes before the backward pass and keeps nothing of its layers: only what it is compared by stays.
    """
    ranks = cost.frozen + cost.down
    text, policy, width = llava.config.text_config, settings.model.remat, jnp.dtype(settings.model.dtype).itemsize
    hidden, inner = text.hidden_size, text.intermediate_size
    heads, narrow = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attended, mlp = 2 * heads + 2 * narrow, hidden + 2 * inner
    low_rank = 4 * ranks * len(llava.targets().linears)
    inputs = 2 * hidden + heads + inner  # of the seven linears: one dropout mask for those that read the same
    scores = 0 if settings.model.attention in FUSED else text.num_attention_heads * load.positions
    outputs = heads + 2 * narrow + mlp
    saved = {  # bytes per token and layer, the residual stream between layers aside
        "full": 0,
        "qkvo": width * attended + low_rank,
        "qkvo_mlp": width * (attended + mlp) + low_rank,
        "dots": width * outputs + (4 * outputs if ranks else 0) + low_rank,
        "none": width * (attended + mlp + inputs) + 4 * (10 * hidden + 2 * inner + scores) + low_rank,
    }
    tokens = load.rows * load.positions
    # Of a last layer that is cut to the labels' positions little is kept, and that only until its own backward pass comes.
    kept = tokens * (text.num_hidden_layers * width * hidden + (text.num_hidden_layers - (not cost.whole)) * saved[policy])
    again = max(0, width * (attended + mlp) + low_rank - saved[policy])
    work = tokens * (2.8 * width * (inputs + outputs) + 1.2 * again + 2.2 * 4 * scores)
    # Scores that exist at once, those of a teacher too (counted in compiled steps: 2, 6 and 4; the first is rounded up).
    scored = {"": 3 * load.labels, "labels": 6 * load.labels, "all": 4 * CHUNK}[cost.words]
    head = 4 * load.rows * scored * text.vocab_size
    kept += tokens * width * hidden * (cost.words == "all")  # the teacher's last states
    return kept, max(work, head)


def compiled_memory(settings: Settings, llava: Llava, stage: StageShapes, rows: int, bucket: tuple[int, int], mesh: Mesh) -> list[Part]:
    """What the compiler plans for the real training step on one device of a mesh; compiles, and allocates nothing.

    Args:
        settings, llava, stage: as `training_memory`.
        rows: rows of a whole batch.
        bucket: (positions, label slots).
        mesh: of devices that are there.
    """
    analysis = trace_train_step(settings, llava, stage, rows, bucket, mesh).lower().compile().memory_analysis()
    if analysis is None:
        return []
    return [
        Part("arguments", analysis.argument_size_in_bytes),
        Part("results that take no argument's place", analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        Part("temporaries", analysis.temp_size_in_bytes),
        Part("runtime", RUNTIME),
    ]
