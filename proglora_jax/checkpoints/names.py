"""The table of parameter names: Hugging Face's on one side, our paths on the other, and how the arrays differ between them.

The scheme that the table is written in is the one of LLaVA folders on the hub (transformers 4.x), which is also what export writes.
Names in other styles are brought to it by prefix first (`canonical`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

# (pattern, replacement): the first that matches a name rewrites it.
_PREFIXES = (
    # Original LLaVA, if the vision tower was saved with it.
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "vision_tower.vision_model."),
    # In memory of transformers from 4.52 on, with and without the inner vision_model.
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    # Saved by transformers 5.x: without the inner vision_model.
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    # Original LLaVA, its stage-1 projector, and a language model on its own.
    (r"^(model\.)?mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^(model\.)?mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    # CLIP on its own, and its vision tower on its own (with transformers 5.x without a prefix).
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^(?=embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.)", "vision_tower.vision_model."),
)

# Style of a writer -> (pattern, replacement) from the table's names to its own, the first that matches.
_STYLES: dict[str, tuple[tuple[str, str], ...]] = {
    "hub": (),
    "transformers5": ((r"^vision_tower\.vision_model\.", "vision_tower."),),
    "memory": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?=multi_modal_projector\.|vision_tower\.)", "model."),
    ),
    "original": (
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^vision_tower\.", ""),
    ),
}
STYLES = tuple(_STYLES)

# Buffers that follow from the config, and the parts of a CLIP checkpoint that are not its vision tower.
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|image_newline$|^text_model\.|^(visual|text)_projection\.|^logit_scale$|text_model\."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        path: our path; one that starts with a stacked prefix holds all layers.
        name: the name on disk in the canonical scheme; "{layer}" stands for the layer's index.
        change: "same", "linear" (transposed) or "patches" (a convolution's kernel as a matmul's).
    """

    path: str
    name: str
    change: str

    @property
    def stacked(self) -> bool:
        """Whether our array holds one array on disk per layer."""
        return "{layer}" in self.name

    def read(self, array: np.ndarray) -> np.ndarray:
        """One layer's array in our layout, from the one on disk."""
        return _CHANGES[self.change][0](array)

    def write(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One layer's array as it is on disk, from ours; `shape` is the one on disk."""
        return np.ascontiguousarray(_CHANGES[self.change][1](array, shape))

    def names(self, layers: int) -> list[str]:
        """Names on disk, one a layer where it is stacked over so many layers."""
        return [self.name.format(layer=layer) for layer in range(layers)] if self.stacked else [self.name]

    def disk_shape(self, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Shape on disk of one layer's array that has this shape here; `channels` is the image's number of channels."""
        if self.change == "linear":
            return shape[::-1]
        if self.change == "patches":
            side = round((shape[0] / channels) ** 0.5)
            return (shape[1], channels, side, side)
        return tuple(shape)


# Ours from disk, and disk from ours.
_CHANGES: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda array: array, lambda array, shape: array),
    "linear": (lambda array: array.T, lambda array, shape: array.T),
    # Disk [D, channels, row, column]; ours [row * column * channels, D], the order in which patches are cut out.
    "patches": (
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
        lambda array, shape: array.reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1),
    ),
}


def canonical(name: str) -> str | None:
    """A name in the table's scheme, or None for one that is of no use here.

    Takes the styles of original LLaVA and what its LoRA training leaves beside the adapter, of transformers 4.x and 5.x on disk and in
    memory, and of a Llama or CLIP on its own.
    """
    name = name.removeprefix("base_model.model.")
    if _IGNORED.search(name):
        return None
    for pattern, replacement in _PREFIXES:
        rewritten, count = re.subn(pattern, replacement, name)
        if count:
            return rewritten
    return name


def styled(name: str, style: str) -> str:
    """A name of the table in the style of a writer, the inverse of `canonical`.

    Args:
        name: in the table's scheme.
        style: "hub" (the table's own), "transformers5" (what 5.x saves), "memory" (a model's own names from 4.52 on) or "original"
            (LLaVA's, with the vision tower's names as in a CLIP folder).
    """
    for pattern, replacement in _STYLES[style]:
        rewritten, count = re.subn(pattern, replacement, name)
        if count:
            return rewritten
    return name


def llava_rows(*, tied: bool, projector_bias: bool) -> tuple[Row, ...]:
    """The table of a LLaVA: every parameter of ours once.

    Args:
        tied: the model has no head of its own.
        projector_bias: the projector's linears have biases.
    """
    rows = _vision_rows() + _language_rows()
    for part in ("linear_1", "linear_2"):
        rows += _linear(f"mm_projector/{part}", f"multi_modal_projector.{part}", bias=projector_bias)
    if not tied:
        rows += _linear("language/lm_head", "language_model.lm_head")
    return tuple(rows)


def _language_rows() -> list[Row]:
    ours, disk = "language/layers/", "language_model.model.layers.{layer}."
    rows = [
        Row("language/embed_tokens", "language_model.model.embed_tokens.weight", "same"),
        Row("language/norm/scale", "language_model.model.norm.weight", "same"),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{ours}{name}/scale", f"{disk}{name}.weight", "same"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += _linear(ours + name, f"{disk}self_attn.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += _linear(ours + name, f"{disk}mlp.{name}")
    return rows


def _vision_rows() -> list[Row]:
    tower = "vision_tower.vision_model."
    ours, disk = "vision/layers/", tower + "encoder.layers.{layer}."
    rows = [
        Row("vision/class_embedding", tower + "embeddings.class_embedding", "same"),
        Row("vision/position_embedding", tower + "embeddings.position_embedding.weight", "same"),
        Row("vision/patch_embedding/kernel", tower + "embeddings.patch_embedding.weight", "patches"),
    ]
    for name in ("pre_layrnorm", "post_layernorm"):
        rows += _norm(f"vision/{name}", tower + name)
    for name in ("layer_norm1", "layer_norm2"):
        rows += _norm(ours + name, disk + name)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(ours + name, f"{disk}self_attn.{name}", bias=True)
    for name in ("fc1", "fc2"):
        rows += _linear(ours + name, f"{disk}mlp.{name}", bias=True)
    return rows


def _linear(path: str, name: str, *, bias: bool = False) -> list[Row]:
    rows = [Row(f"{path}/kernel", f"{name}.weight", "linear")]
    return rows + [Row(f"{path}/bias", f"{name}.bias", "same")] if bias else rows


def _norm(path: str, name: str) -> list[Row]:
    return [Row(f"{path}/scale", f"{name}.weight", "same"), Row(f"{path}/bias", f"{name}.bias", "same")]
