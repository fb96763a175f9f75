"""A trained stage whose gates depend on the prompt, for users of Hugging Face: all blocks as PEFT adapters, and the gates in torch.

    routing.json                  sizes, template, how gates follow from a prompt
    routing.safetensors           keys and query projector
    mm_projector.safetensors      the trained projector
    block_00, block_01, ...       one PEFT adapter each; the projector is not repeated in them
    gated_llava.py                what puts them together in torch, a copy of assets/torch/gated_llava.py
    tokenizer.json, ...           the backbone's tokenizer
"""

from __future__ import annotations

import importlib.resources
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from proglora_jax.checkpoints.hf_convert import check_free, copy_tokenizer, whole_folder
from proglora_jax.checkpoints.integrity import atomic_write_json
from proglora_jax.checkpoints.peft_export import linear_entries, save_adapter
from proglora_jax.checkpoints.shards import Entry, write_file
from proglora_jax.checkpoints.sources import Source
from proglora_jax.continual import torch_check
from proglora_jax.continual.export import RECORD, other_forms, record, say
from proglora_jax.continual.predict import prompting
from proglora_jax.continual.torch_check_gates import MODULE, compare_dynamic
from proglora_jax.continual.trained import Trained, open_trained
from proglora_jax.core.types import PyTree
from proglora_jax.data.errors import UserError
from proglora_jax.methods.routing import Routing

ROUTING = "routing.json"
FORMAT = 1
HOW = ("tokens", "pool", "query", "score", "temperature", "weights")  # fields of a Routing that are no arrays
SHARED = "shared"


def export_dynamic(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    stage: str | None = None,
    base: str | None = None,
    verify: bool | None = None,
    tolerance: float = torch_check.TOLERANCE,
    log: Callable[[str], None] = print,
) -> None:
    """Writes all blocks of a stage with what gates them, and the torch module that generates the same tokens as ours.

    Args:
        workdir: of the run.
        out: folder to write; must be absent or empty.
        stage: see `trained.open_trained`.
        base: folder of the backbone, where it is not where the run found it.
        verify: see `export.export_adapter`; gates, logits and generated tokens are compared.
        tolerance: see there.
        log: takes a line of text.

    Raises:
        UserError: as `trained.open_trained`; "<stage>: <why the method's gates cannot be exported>; ..."; "<out>: is not empty ...";
            "<backbone>: transformers does not read the layout of original LLaVA; ..."; as `torch_check_gates.compare_dynamic`.
    """
    torch_check.check_tolerance(tolerance)
    check_free(out)
    trained = open_trained(workdir, stage)
    try:
        routing = trained.method.routing(trained.state)
    except ValueError as error:
        raise UserError(f"{trained.folder}: {error}; {_instead(trained)}") from error
    source, warning = trained.backbone(base)
    say(log, warning)
    torch_check.check_readable(source)
    names = trained.tasks()
    with whole_folder(out) as partial:
        _write_blocks(trained, routing, source, partial)
        say(log, copy_tokenizer(source, partial))
        fields = _fields(trained, routing, source)
        (partial / ROUTING).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(module_file(), partial / MODULE)
        atomic_write_json(partial / RECORD, record(trained, kind="dynamic", task=None, block=None))
        log(f"{trained.method.name}, stage {trained.folder.name}: {len(names)} blocks of rank {trained.method.rank} and their gates "
            f"({', '.join(names)})")
        log(torch_check.checked(verify, lambda: compare_dynamic(trained, source, partial, tolerance)))
    log(f"wrote {out}; {MODULE} in it says how to use it")


def _instead(trained: Trained) -> str:
    try:
        trained.method.fold(trained.state, trained.task_id(None))
    except ValueError:
        return other_forms(trained)
    return "use --kind adapter or --kind merged"


def module_file() -> pathlib.Path:
    """The torch module as it ships with the package."""
    return pathlib.Path(str(importlib.resources.files("proglora_jax") / "assets" / "torch" / MODULE))


def _write_blocks(trained: Trained, routing: Routing, source: Source, folder: pathlib.Path) -> None:
    """The adapters, the router's tensors, and the projector."""
    method, state = trained.method, trained.state
    alpha = method.scale * method.rank  # what the blocks ran with, though a method may leave the scale out
    blocks = {f"block_{index:02d}": method.block(state, index) for index in range(method.blocks(state))}
    if routing.shared:
        blocks[SHARED] = routing.shared
    for name, block in blocks.items():
        (folder / name).mkdir()
        save_adapter(folder / name, jax.tree.map(np.asarray, block), alpha, {}, base=str(source.folder), dropout=method.dropout)
    write_file(folder / "routing.safetensors", _router_entries(routing))
    write_file(folder / "mm_projector.safetensors", linear_entries(jax.tree.map(np.asarray, state.params["mm_projector"])))


def _router_entries(routing: Routing) -> list[Entry]:
    parts: PyTree = dict(routing.query_projector)
    norm = {"norm.weight": parts["norm"]["scale"], "norm.bias": parts["norm"]["bias"]} if parts else {}
    linears = linear_entries({name: leaves for name, leaves in parts.items() if name != "norm"})
    whole = {name: np.asarray(value, np.float32) for name, value in ({"keys": routing.keys} | norm).items()}
    return [Entry(name, value.dtype, value.shape, lambda value=value: value) for name, value in whole.items()] + linears


def _fields(trained: Trained, routing: Routing, source: Source) -> dict[str, Any]:
    """What the torch module must know, routing.json."""
    method, (encoder, images) = trained.method, prompting(trained, source)
    tokenizer, template = encoder.tokenizer, encoder.template
    return {
        "format": FORMAT, "method": method.name, "rank": method.rank, "alpha": method.alpha, "scale": method.scale, "fuse": method.mix(),
        "targets": sorted(trained.meta["targets"]), "base_model_name_or_path": str(source.folder),
        "blocks": [{"folder": f"block_{index:02d}", "task": task} for index, task in enumerate(trained.tasks())],
        "shared": [SHARED] if routing.shared else [],
        "routing": {name: getattr(routing, name) for name in HOW},
        "template": {"name": template.name, "system": template.system, "user": template.user, "assistant": template.assistant},
        "image": {"size": images.size, "mean": list(images.mean), "std": list(images.std)},
        "image_tokens": encoder.image_tokens, "image_token_id": tokenizer.image_token_id, "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "unk_token_id": tokenizer.unk_id,
        "special_ids": list(tokenizer.special_ids), "tokenizer_size": tokenizer.size,
    }  # fmt: skip
