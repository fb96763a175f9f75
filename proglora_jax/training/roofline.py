"""Work of a training step and of an answer in floating-point operations, from the model's sizes; and the time it takes at a stated peak."""

from __future__ import annotations

import dataclasses

from proglora_jax.core.gpus import GPUS
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
        model: what any implementation is credited with, the numerator of MFU: linears forward and backward through frozen weights (4
            per parameter and token), causal attention, the head at the positions whose words are scored, and a teacher's forward pass.
        total: what this one does: also the vision tower, the projector, the adapter, and what the remat policy computes again; less of
            the last layer where only some positions of it are wanted.
    """

    model: float
    total: float


def training_work(
    config: LlavaConfig, targets: Targets, positions: int, labels: int, remat: str, cost: Cost, attention: str = "cudnn"
) -> Work:
    """One row's forward and backward pass with a frozen backbone.

    Args:
        config: sizes.
        targets: the adapted linears.
        positions: T, image included.
        labels: supervised positions, K.
        remat: rematerialisation policy.
        cost: what the method adds.
        attention: implementation by name; "xla" keeps no scores, and "qkvo" and "qkvo_mlp" compute them again.
    """
    text = config.text_config
    whole, ran = _Pass(config, targets, positions, positions), _Pass(config, targets, positions, positions if cost.whole else labels)
    head = 2 * (positions if cost.words == "all" else labels) * text.hidden_size * text.vocab_size
    projected = 2 * config.image_tokens * (config.vision_config.hidden_size * text.hidden_size + text.hidden_size**2)
    taught = head * bool(cost.words)
    model = 2 * whole.linears() + 3 * whole.attention() + 2 * head + (whole.linears() + whole.attention() + taught) * (cost.teacher > 0)
    work = 2 * ran.linears() + 3 * ran.attention() + 2 * head + (ran.linears() + ran.attention() + taught) * (cost.teacher > 0)

    low_rank = ran.low_rank(cost.frozen + cost.down, cost.frozen + cost.up)
    work += 2 * low_rank + ran.low_rank(cost.down, cost.up)
    if cost.teacher:
        work += ran.low_rank(cost.teacher, cost.teacher) + projected
    names, kept = _AGAIN[remat], ran.scanned()  # the last layer's backward pass follows at once, there is nothing to compute again
    work += sum(kept.linears(name) for name in names if name in targets.linears) + kept.attention() * ("attention" in names)
    work += kept.attention() / 2 * (attention == "xla" and remat in ("qkvo", "qkvo_mlp"))
    work += kept.low_rank(cost.frozen + cost.down, cost.frozen + cost.up) * ("low_rank" in names)
    work += 2 * head * (cost.words == "all")  # of both passes, since these scores never exist at once
    projector = 2 * projected + 2 * config.image_tokens * text.hidden_size**2  # no gradient goes into the vision tower
    return Work(model, work + vision_work(config) + projector)


def prefill_work(config: LlavaConfig, targets: Targets, positions: int, cost: Cost) -> float:
    """Operations of reading one prompt, its image included; new tokens are bound by memory and not counted."""
    ran = _Pass(config, targets, positions, positions if cost.whole else 1)
    return ran.linears() + ran.attention() + ran.low_rank(cost.frozen + cost.down, cost.frozen + cost.up) + vision_work(config)


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One forward pass of a row: T positions, of which the last layer's results are wanted at K."""

    config: LlavaConfig
    targets: Targets
    positions: int
    wanted: int
    layers: int | None = None

    def scanned(self) -> _Pass:
        """The layers that run in the loop: all, or all but the last where that one is cut."""
        layers = self.config.text_config.num_hidden_layers
        return dataclasses.replace(self, layers=layers if self.wanted == self.positions else layers - 1)

    def tokens(self, name: str) -> int:
        """How many rows of input a linear reads over the layers."""
        layers = self.config.text_config.num_hidden_layers
        if self.layers is not None:
            return self.layers * self.positions
        return (layers - 1) * self.positions + (self.positions if name in ("k_proj", "v_proj") else self.wanted)

    def linears(self, *names: str) -> float:
        """The frozen linears, all by default."""
        sizes = self.targets.linears
        return sum(2 * d_in * d_out * self.tokens(name) for name, (d_in, d_out) in sizes.items() if name in (names or sizes))

    def low_rank(self, down: int, up: int) -> float:
        """Factors of so many columns and rows at every linear."""
        return sum(2 * (d_in * down + d_out * up) * self.tokens(name) for name, (d_in, d_out) in self.targets.linears.items())

    def attention(self) -> float:
        """The two products, of which causal attention needs half; a cut layer's few queries are masked."""
        text = self.config.text_config
        layer = 2 * self.positions**2 * text.num_attention_heads * text.head_dim
        if self.layers is not None or self.wanted == self.positions:
            return layer * (self.layers or text.num_hidden_layers)
        return layer * (text.num_hidden_layers - 1) + 4 * self.wanted * self.positions * text.num_attention_heads * text.head_dim


def vision_work(config: LlavaConfig) -> float:
    """Operations of the vision tower's layers that the feature layer needs, for one image."""
    vision = config.vision_config
    tokens = vision.num_patches + 1
    linears = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return config.vision_layers_run * (2 * linears * tokens + 4 * tokens**2 * vision.hidden_size)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of an accelerator.

    Attributes:
        name: as people say it.
        hbm: bytes; of a TPU those that a program may use, as its compiler says, of a GPU all (a run takes `host.gpu_memory_share` of
            them); 0 where unknown.
        peak: floating-point operations per second in bfloat16, as published (dense); 0 where unknown.
    """

    name: str
    hbm: int
    peak: float


CHIPS = {  # by JAX's device kind
    "TPU v5 lite": Chip("TPU v5e", int(15.75 * 2**30), 197e12),
    "TPU v5": Chip("TPU v5p", int(95.74 * 2**30), 459e12),
    "TPU v6 lite": Chip("TPU v6e", int(31.25 * 2**30), 918e12),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", GPUS["a100-40gb"].memory, 312e12),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", GPUS["a100-80gb"].memory, 312e12),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", GPUS["h100-pcie"].memory, 756e12),
    "NVIDIA H100 80GB HBM3": Chip("H100", GPUS["h100"].memory, 989e12),
    "NVIDIA H200": Chip("H200", GPUS["h200"].memory, 989e12),
}


def chip_of(kind: str) -> Chip:
    """The chip of a device kind; one that is not in the table has its kind as name, and nothing else is known of it."""
    return CHIPS.get(kind, Chip(kind, 0, 0.0))
