"""Work of a training step and of an answer in floating-point operations, from the model's sizes; and the time it takes at a stated peak."""

from __future__ import annotations

import dataclasses

from proglora_jax.core.types import Targets
from proglora_jax.methods.views import Cost
from proglora_jax.models.presets import LlavaConfig

# What the backward pass computes again of a layer's forward pass: names of linears, "attention", "low_rank". Not even "full" has
# down_proj: its output is the next layer's input, which is kept, and no gradient asks for it (seen in the traced step).
_AGAIN = {
    "none": (), "dots": ("attention",), "qkvo_mlp": (), "qkvo": ("o_proj", "gate_proj", "up_proj"),
    "full": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "attention", "low_rank"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of one row.

    Attributes:
        model: what any implementation must do, the numerator of MFU: linears forward and backward through frozen weights (4 per
            parameter and token), causal attention, the head at the positions whose words are scored, and a teacher's forward pass.
        total: what this one does: also the vision tower, the projector, the adapter, and what the remat policy computes again.
    """

    model: float
    total: float


def training_work(config: LlavaConfig, targets: Targets, positions: int, labels: int, remat: str, cost: Cost) -> Work:
    """One row's forward and backward pass with a frozen backbone.

    Args:
        config: sizes.
        targets: the adapted linears.
        positions: T, image included.
        labels: supervised positions, K.
        remat: rematerialisation policy.
        cost: what the method adds.
    """
    text = config.text_config
    linears = {name: d_in * d_out * text.num_hidden_layers for name, (d_in, d_out) in targets.linears.items()}
    forward = 2 * sum(linears.values()) * positions
    mixing = _attention(config, positions)
    head = 2 * (positions if cost.words == "all" else labels) * text.hidden_size * text.vocab_size
    low_rank = _low_rank(config, targets, cost.frozen + cost.down, cost.frozen + cost.up) * positions
    projected = 2 * config.image_tokens * (config.vision_config.hidden_size * text.hidden_size + text.hidden_size**2)
    taught = (forward + mixing + head * bool(cost.words)) * (cost.teacher > 0)
    model = 2 * forward + 3 * mixing + 2 * head + taught
    again = sum(2 * linears.get(name, 0) * positions for name in _AGAIN[remat])
    again += mixing * ("attention" in _AGAIN[remat]) + low_rank * ("low_rank" in _AGAIN[remat])
    again += 2 * head * (cost.words == "all")  # of both passes, since these scores never exist at once
    adapter = 2 * low_rank + _low_rank(config, targets, cost.down, cost.up) * positions
    if cost.teacher:
        adapter += _low_rank(config, targets, cost.teacher, cost.teacher) * positions + projected
    projector = 2 * projected + 2 * config.image_tokens * text.hidden_size**2  # no gradient goes into the vision tower
    return Work(model, model + again + adapter + vision_work(config) + projector)


def prefill_work(config: LlavaConfig, targets: Targets, positions: int, cost: Cost) -> float:
    """Operations of reading one prompt, its image included; new tokens are bound by memory and not counted."""
    per_token = 2 * sum(d_in * d_out for d_in, d_out in targets.linears.values()) * config.text_config.num_hidden_layers
    per_token += _low_rank(config, targets, cost.frozen + cost.down, cost.frozen + cost.up)
    return per_token * positions + _attention(config, positions) + vision_work(config)


def vision_work(config: LlavaConfig) -> float:
    """Operations of the vision tower's layers that the feature layer needs, for one image."""
    vision = config.vision_config
    tokens = vision.num_patches + 1
    linears = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return config.vision_layers_run * (2 * linears * tokens + 4 * tokens**2 * vision.hidden_size)


def _low_rank(config: LlavaConfig, targets: Targets, down: int, up: int) -> float:
    """One pass of a token through factors of so many columns and rows, in all layers."""
    return 2 * sum(d_in * down + d_out * up for d_in, d_out in targets.linears.values()) * config.text_config.num_hidden_layers


def _attention(config: LlavaConfig, positions: int) -> float:
    """Causal attention of all layers, forward: half of the two products."""
    text = config.text_config
    return 2 * positions**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of an accelerator.

    Attributes:
        name: as people say it.
        hbm: bytes that a program may use, as its compiler says; 0 where unknown (a GPU says it at run time).
        peak: floating-point operations per second in bfloat16, as published (dense); 0 where unknown.
    """

    name: str
    hbm: int
    peak: float


CHIPS = {  # by JAX's device kind
    "TPU v5 lite": Chip("TPU v5e", int(15.75 * 2**30), 197e12),
    "TPU v5": Chip("TPU v5p", int(95.74 * 2**30), 459e12),
    "TPU v6 lite": Chip("TPU v6e", int(31.25 * 2**30), 918e12),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 0, 312e12),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 0, 312e12),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 0, 756e12),
    "NVIDIA H100 80GB HBM3": Chip("H100", 0, 989e12),
    "NVIDIA H200": Chip("H200", 0, 989e12),
}


def chip_of(kind: str) -> Chip:
    """The chip of a device kind; one that is not in the table has its kind as name, and nothing else is known of it."""
    return CHIPS.get(kind, Chip(kind, 0, 0.0))
