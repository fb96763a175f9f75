"""Writes a low-rank adapter and its projector as PEFT reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from proglora_jax.checkpoints.shards import Entry, write_file
from proglora_jax.core.types import PyTree

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARENTS = {name: "self_attn" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
PARENTS |= {name: "mlp" for name in ("gate_proj", "up_proj", "down_proj")}
_LAYER, _PROJECTOR = "base_model.model.model.language_model.layers.{}.{}.{}", "base_model.model.model.multi_modal_projector"


def save_adapter(
    folder: pathlib.Path, adapter: PyTree, alpha: float, projector: PyTree, *, base: str, dropout: float = 0.0,
    layers: Sequence[int] | None = None, on_projector: PyTree = MappingProxyType({}),
) -> list[pathlib.Path]:
    """Writes the two files.

    The projector is a "module to save" of PEFT: loading the adapter puts it in the place of the base model's.

    Args:
        folder: where to write; must exist.
        adapter: {linear: {"a": f32[L, d_in, R], "b": f32[L, R, d_out]}}, the same rank R everywhere.
        alpha: PEFT scales the delta by alpha / R.
        projector: {"linear_1": {"kernel": f32[d_in, d_out], "bias": f32[d_out]}, "linear_2": ...}; {} leaves the base model's.
        base: `base_model_name_or_path`, the model that the adapter belongs to.
        dropout: of the adapter while it trained; only matters to who trains on.
        layers: the decoder layers that have the adapter; None for all.
        on_projector: {linear of the projector: {"a": f32[d_in, R], "b": f32[R, d_out]}}, where the adapter has ranks there too.

    Returns:
        The files.
    """
    entries = []
    for name, leaf in sorted(adapter.items()):
        a, b = np.asarray(leaf["a"], np.float32), np.asarray(leaf["b"], np.float32)
        for layer in range(a.shape[0]) if layers is None else layers:
            entries += _pair(_LAYER.format(layer, PARENTS[name], name), a[layer], b[layer])
    for name, leaf in sorted(on_projector.items()):
        entries += _pair(f"{_PROJECTOR}.{name}", np.asarray(leaf["a"], np.float32), np.asarray(leaf["b"], np.float32))
    entries += [entry._replace(name=f"{_PROJECTOR}.{entry.name}") for entry in linear_entries(projector)]
    write_file(folder / ADAPTER_WEIGHTS, entries)
    rank = next(iter(adapter.values()))["a"].shape[-1]
    fields = adapter_fields(sorted(adapter), rank, alpha, base, dropout, bool(projector), layers, sorted(on_projector))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]


def linear_entries(parts: PyTree) -> list[Entry]:
    """Linears {name: {"kernel": [d_in, d_out], "bias": [d_out] or absent}} as torch lays them out: <name>.weight, <name>.bias."""
    entries = []
    for part, leaves in sorted(parts.items()):
        entries.append(_entry(f"{part}.weight", np.asarray(leaves["kernel"], np.float32).T))
        if "bias" in leaves:
            entries.append(_entry(f"{part}.bias", np.asarray(leaves["bias"], np.float32)))
    return entries


def adapter_fields(
    linears: list[str], rank: int, alpha: float, base: str, dropout: float = 0.0, projector: bool = True,
    layers: Sequence[int] | None = None, on_projector: Sequence[str] = (),
) -> dict[str, Any]:
    """adapter_config.json of a LoRA on some linears of the decoder layers (and of the projector), and on no layer of the vision tower."""
    groups = {parent: [name for name in linears if PARENTS[name] == parent] for parent in ("self_attn", "mlp")}
    names = "|".join(rf"{parent}\.({'|'.join(group)})" for parent, group in groups.items() if group)
    which = r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
    modules = rf".*language_model.*layers\.{which}\.({names})"
    if on_projector:
        modules = rf"({modules}|.*multi_modal_projector\.({'|'.join(on_projector)}))"
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": False,
        # A list of names would also find the projections of the vision tower.
        "target_modules": modules,
        "modules_to_save": ["multi_modal_projector"] if projector else None,
    }  # fmt: skip


def trim_ranks(adapter: Mapping[str, Mapping[str, Any]], least: int) -> dict[str, dict[str, np.ndarray]]:
    """An adapter without the ranks whose B is zero in every linear and layer (empty slots of a pool, gates of 0).

    Args:
        adapter: {linear: {"a": [L, d_in, R], "b": [L, R, d_out]}}.
        least: ranks that are kept of an adapter that does nothing at all.
    """
    used = np.any([np.any(np.asarray(leaf["b"]) != 0, axis=(0, 2)) for leaf in adapter.values()], axis=0)
    if not used.any():
        used[:least] = True
    return {name: {"a": np.asarray(leaf["a"])[:, :, used], "b": np.asarray(leaf["b"])[:, used, :]} for name, leaf in adapter.items()}


def _pair(at: str, a: np.ndarray, b: np.ndarray) -> list[Entry]:
    """The factors of one linear, [d_in, R] and [R, d_out]."""
    return [_entry(f"{at}.lora_A.weight", a.T), _entry(f"{at}.lora_B.weight", b.T)]


def _entry(name: str, array: np.ndarray) -> Entry:
    return Entry(name, array.dtype, array.shape, lambda: array)
