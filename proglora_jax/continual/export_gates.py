"""A trained stage whose gates depend on the prompt, for users of Hugging Face: all blocks as PEFT adapters, and the gates in torch.

    routing.json                  sizes, template, how gates follow from a prompt
    routing.safetensors           what they follow from: keys and query projector, or routers
    mm_projector.safetensors      the trained projector
    block_00, block_01, ...       one PEFT adapter each; the projector is not repeated in them
    shared                        where there is one, the adapter that no prompt gates
    gated_llava.py                what puts them together in torch, and
    gated_routers.py              what makes the gates: copies of the files in assets/torch
    tokenizer.json, ...           the backbone's tokenizer

A block is what the method calls one: the block of a task (of SEMA: its modules, in the layers that have them), an expert, a branch with
the trunk. PCLR's ranks of all tasks lie in one adapter, `ranks`, that of the mm_projector included.

routing.json:

    format, method, base_model_name_or_path     what it is
    rank, alpha, scale                          of the method; the delta of a block is scaled by `scale`
    fuse                                        "delta" or "factor", see `adapters.lowrank.mix_ranks`
    targets                                     the adapted linears
    blocks                                      {"folder", "name"} of each, the folder empty where no layer has the block
    columns                                     what each column of the gates belongs to
    shared                                      folders of shared blocks
    routing                                     settings of one of the dataclasses in `methods.routing`, by its `kind`; its docstring says
                                                what they mean, and `tensors` what routing.safetensors holds
    template, image, image_tokens, ..._id(s)    how a question becomes tokens and pixels
    tokenizer_size                              ids from this one on are never generated
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
from proglora_jax.data.errors import UserError
from proglora_jax.methods.routing import Block, Way

ROUTING = "routing.json"
FORMAT = 2
SHARED = "shared"


def export_dynamic(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    stage: str | None = None,
    base: str | None = None,
    vision: str | None = None,
    projector: str | None = None,
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
        vision: see `export.export_adapter`.
        projector: see there.
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
    source, warning = trained.backbone(base, vision, projector)
    say(log, warning)
    torch_check.check_readable(source)
    with whole_folder(out) as partial:
        _write_blocks(trained, routing, source, partial)
        say(log, copy_tokenizer(source, partial))
        fields = _fields(trained, routing, source)
        (partial / ROUTING).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for module in module_file().parent.glob("*.py"):
            shutil.copyfile(module, partial / module.name)
        atomic_write_json(partial / RECORD, record(trained, kind="dynamic", task=None, block=None))
        count, ranks = len(fields["blocks"]), _ranks(next(iter(_blocks(trained, routing).values())))
        log(f"{trained.method.name}, stage {trained.folder.name}: {count} block{'s' * (count != 1)} of rank {ranks} and their gates "
            f"({', '.join(fields['columns'])})")
        log(torch_check.checked(verify, lambda: compare_dynamic(trained, source, partial, tolerance)))
    log(f"wrote {out}; {MODULE} in it says how to use it")


def _instead(trained: Trained) -> str:
    try:
        trained.method.fold(trained.state, trained.task_id(None))
    except ValueError:
        return other_forms(trained)
    return "use --kind adapter or --kind merged"


def module_file() -> pathlib.Path:
    """The torch module as it ships with the package; the one that it imports lies beside it."""
    return pathlib.Path(str(importlib.resources.files("proglora_jax") / "assets" / "torch" / MODULE))


def _blocks(trained: Trained, routing: Way) -> dict[str, Block]:
    """The blocks by their folders: those that the routing names, else the method's own."""
    method, state = trained.method, trained.state
    return routing.blocks or {f"block_{index:02d}": Block(method.block(state, index)) for index in range(method.blocks(state))}


def _ranks(block: Block) -> int:
    return next(iter(block.weights.values()))["a"].shape[-1]


def _write_blocks(trained: Trained, routing: Way, source: Source, folder: pathlib.Path) -> None:
    """The adapters, the router's tensors, and the projector."""
    method, blocks = trained.method, _blocks(trained, routing)
    if routing.shared:
        blocks = blocks | {SHARED: routing.shared}
    for name, block in blocks.items():
        if block.layers == ():
            continue
        # What the block ran with: a method may leave the scale out, and a block may have a share of its rank.
        alpha = method.scale * _ranks(block) * (routing.shared_gate if name == SHARED else 1.0)
        (folder / name).mkdir()
        weights, projector = jax.tree.map(np.asarray, (block.weights, block.projector))
        save_adapter(folder / name, weights, alpha, {}, base=str(source.folder), dropout=method.dropout, layers=block.layers,
                     on_projector=projector)
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in routing.tensors().items()}
    entries = [Entry(name, value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()]
    write_file(folder / "routing.safetensors", entries)
    write_file(folder / "mm_projector.safetensors", linear_entries(jax.tree.map(np.asarray, trained.state.params["mm_projector"])))


def _columns(trained: Trained) -> list[str]:
    """What the gates belong to: the tasks, or the experts by number."""
    method = trained.method
    if method.blocks_are_tasks:
        return list(trained.tasks())
    return [f"{method.gate_unit} {index}" for index in range(method.blocks(trained.state))]


def _fields(trained: Trained, routing: Way, source: Source) -> dict[str, Any]:
    """What the torch module must know, routing.json."""
    method, (encoder, images) = trained.method, prompting(trained, source)
    tokenizer, template = encoder.tokenizer, encoder.template
    columns, blocks = _columns(trained), _blocks(trained, routing)
    names = columns if len(blocks) == len(columns) else list(blocks)
    return {
        "format": FORMAT, "method": method.name, "rank": method.rank, "alpha": method.alpha, "scale": method.scale, "fuse": method.mix(),
        "targets": sorted(trained.meta["targets"]), "base_model_name_or_path": str(source.folder),
        "blocks": [{"folder": "" if block.layers == () else folder, "name": name} for name, (folder, block) in zip(names, blocks.items())],
        "columns": columns, "shared": [SHARED] if routing.shared else [], "routing": routing.settings(),
        "template": {"name": template.name, "system": template.system, "user": template.user, "assistant": template.assistant},
        "image": {"size": images.size, "mean": list(images.mean), "std": list(images.std), "resample": images.resample},
        "image_tokens": encoder.image_tokens, "image_token_id": tokenizer.image_token_id, "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "unk_token_id": tokenizer.unk_id,
        "special_ids": list(tokenizer.special_ids), "tokenizer_size": tokenizer.size,
    }  # fmt: skip
