"""A trained stage for users of Hugging Face (`tools convert to-hf`): a PEFT adapter, or a LLaVA with the adapter merged into it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from proglora_jax.checkpoints.hf_convert import check_free, whole_folder, write_folder
from proglora_jax.checkpoints.integrity import atomic_write_json
from proglora_jax.checkpoints.merge import Merge
from proglora_jax.checkpoints.peft_export import save_adapter, trim_ranks
from proglora_jax.checkpoints.sources import is_original
from proglora_jax.checkpoints.weight_files import CONFIG, read_fields
from proglora_jax.continual import torch_check
from proglora_jax.continual.session import model_folder
from proglora_jax.continual.trained import Trained, open_trained
from proglora_jax.core.types import PyTree
from proglora_jax.data.errors import UserError

RECORD = "proglora_export.json"


def export_adapter(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    stage: str | None = None,
    task: str | None = None,
    block: int | None = None,
    base: str | None = None,
    vision: str | None = None,
    projector: str | None = None,
    verify: bool | None = None,
    tolerance: float = torch_check.TOLERANCE,
    log: Callable[[str], None] = print,
) -> None:
    """Writes a stage's adapter and projector as a PEFT folder.

    Without `block` it is the whole of what the method adds for a task, fused into one adapter (rank = lora_alpha = the ranks of all
    blocks that count, gates and scale in B). That needs gates that do not depend on the input.

    Args:
        workdir: of the run.
        out: folder to write; must be absent or empty.
        stage: see `trained.open_trained`.
        task: whose fused block, for methods that fuse by task; None takes the stage's own.
        block: one block instead, as it was trained: with the method's rank and alpha, and without any gate.
        base: folder of the backbone, where it is not where the run found it.
        vision: folder of its CLIP, see `trained.Trained.backbone`.
        projector: file of its projector, see there.
        verify: reload it with torch, transformers and peft, and compare logits before the folder gets its name; None does so where
            they are installed and the memory is there, and says so where they are not.
        tolerance: how far a logit may be from ours.
        log: takes a line of text.

    Raises:
        UserError: as `trained.open_trained`; "<stage>: <reason why it cannot be folded>; ..."; "<stage>: <method> has no block ...";
            "<out>: is not empty ..."; "<backbone>: transformers does not read the layout of original LLaVA; ..."; as `torch_check.compare`.
    """
    torch_check.check_tolerance(tolerance)
    check_free(out)
    trained = open_trained(workdir, stage)
    named = _readable(base or trained.model["path"])
    method, id_ = trained.method, trained.asked_task(task)
    if block is not None and task is not None:
        raise UserError("--block exports a block as it is, --task a fused one; give one of them")
    if not method.blocks(trained.state):
        raise UserError(f"{trained.folder}: {method.name} has no adapter; its backbone is the model")
    if block is None:
        adapter = _folded(trained, id_)
        if method.blocks(trained.state) == 1 and not method.uses_task_id:
            block = 0  # the same adapter, with the rank and alpha of its training
    if block is not None:
        adapter = _block(trained, block)
        alpha = method.scale * next(iter(adapter.values()))["a"].shape[-1]  # a block may have a share of the method's rank
    else:
        adapter = trim_ranks(adapter, method.rank)
        alpha = next(iter(adapter.values()))["a"].shape[-1]
    own = jax.tree.map(np.asarray, trained.state.params["mm_projector"])
    with whole_folder(out) as partial:
        save_adapter(partial, adapter, alpha, own, base=named, dropout=method.dropout)
        atomic_write_json(partial / RECORD, record(trained, kind="adapter", task=_named(trained, id_, block), block=block))
        rank = next(iter(adapter.values()))["a"].shape[-1]
        log(f"{method.name}, stage {trained.folder.name}: {_what(trained, id_, block)} as a PEFT adapter of rank {rank}, alpha {alpha:g}")
        log(torch_check.checked(verify, lambda: _compare(trained, (base, vision, projector), partial, id_, block, tolerance, log)))
    log(f"wrote {out}")


def export_merged(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    stage: str | None = None,
    task: str | None = None,
    base: str | None = None,
    vision: str | None = None,
    projector: str | None = None,
    dtype: Any = None,
    verify: bool | None = None,
    tolerance: float = torch_check.TOLERANCE,
    log: Callable[[str], None] = print,
) -> Merge:
    """Writes a LLaVA folder with the adapter merged: the sum in f32, one cast, and a table of what the cast cost.

    Args:
        workdir: as for `export_adapter`.
        out: as for `export_adapter`.
        stage: as for `export_adapter`.
        task: as for `export_adapter`.
        base: as for `export_adapter`.
        vision: as for `export_adapter`.
        projector: as for `export_adapter`.
        dtype: of the weights; None keeps the formats of the backbone's files.
        verify: as for `export_adapter`, without peft.
        tolerance: as for `export_adapter`; in half precision it holds before the cast, whose own difference is reported.
        log: takes a line of text.

    Returns:
        The merge, with what was lost.

    Raises:
        UserError: as `export_adapter`, and for a backbone that is not the run's.
    """
    torch_check.check_tolerance(tolerance)
    check_free(out)
    trained = open_trained(workdir, stage)
    id_ = trained.asked_task(task)
    adapter = _folded(trained, id_)
    source, warning = trained.backbone(base, vision, projector)
    say(log, warning)
    merge = Merge(trim_ranks(adapter, 0) if adapter else {}, jax.tree.map(np.asarray, trained.state.params["mm_projector"]))
    again = Merge(merge.adapter, merge.projector)  # for the comparison; what it sums up is not the export's
    source = dataclasses.replace(source, protocol=f"{source.protocol}+{trained.method.name}")

    def check(partial: pathlib.Path) -> None:
        atomic_write_json(partial / RECORD, record(trained, kind="merged", task=_named(trained, id_, None), block=None))
        log(f"{trained.method.name}, stage {trained.folder.name}: {_what(trained, id_, None)} merged into {source.folder}")
        log(merge.report())
        log(torch_check.checked(verify, lambda: torch_check.compare_merged(trained, source, partial, id_, again, tolerance)))

    write_folder(source, out, dtype=dtype, change=merge, check=check, log=log)
    return merge


def _readable(base: str) -> str:
    """The folder that an adapter is put on, refused in the layout of original LLaVA: PEFT would find no layer there. It may have moved."""
    folder = model_folder(base) if base == "embedded" else base
    if (pathlib.Path(folder) / CONFIG).exists() and is_original(read_fields(folder)):
        raise torch_check.unreadable(folder)
    return folder


def _compare(
    trained: Trained, places: Sequence[str | None], folder: pathlib.Path, task: int, block: int | None, tolerance: float,
    log: Callable[[str], None],
) -> str:
    """`torch_check.compare_adapter`; an adapter is written without the backbone, so that one that has moved is a reason, no error."""
    torch_check.modules("torch", "peft")
    try:
        source, warning = trained.backbone(*places)
    except UserError as error:
        if any(places):
            raise
        raise torch_check.CannotCompare(str(error)) from error
    say(log, warning)
    return torch_check.compare_adapter(trained, source, folder, task, block, tolerance)


def _folded(trained: Trained, task: int) -> PyTree:
    try:
        return jax.tree.map(np.asarray, trained.method.fold(trained.state, task))
    except ValueError as error:
        raise UserError(f"{trained.folder}: {error}, so that no single set of weights equals it; {other_forms(trained)}") from error


def other_forms(trained: Trained) -> str:
    """What can be exported of a stage that cannot be folded into one adapter."""
    forms = []
    for ask, form in ((lambda: trained.method.block(trained.state, 0), "one block alone (--kind adapter --block)"),
                      (lambda: trained.method.routing(trained.state), "all blocks with their gates (--kind dynamic)")):
        with contextlib.suppress(ValueError):
            ask()
            forms.append(form)
    return f"what can be exported is {', or '.join(forms)}" if forms else "there is no export of it yet"


def _block(trained: Trained, block: int) -> PyTree:
    try:
        return jax.tree.map(np.asarray, trained.method.block(trained.state, block))
    except ValueError as error:
        raise UserError(f"{trained.folder}: {error}") from error


def _named(trained: Trained, task: int, block: int | None) -> str | None:
    return trained.tasks()[task] if block is None and trained.method.uses_task_id else None


def _what(trained: Trained, task: int, block: int | None) -> str:
    named = _named(trained, task, block)
    return f"block {block}" if block is not None else f"the fused block of {named}" if named else "its adapter"


def record(trained: Trained, **more: Any) -> dict[str, Any]:
    """Where an export comes from: the fields of the stage's meta.json that say so, and `more`."""
    fields = ("method", "hyperparameters", "rank", "alpha", "targets", "backbone", "protocol", "tasks", "stage", "digest", "versions")
    return {**more, "trained_on": trained.meta["task"], **{name: trained.meta[name] for name in fields if name in trained.meta}}


def say(log: Callable[[str], None], line: str) -> None:
    """Logs a line, if there is one."""
    if line:
        log(line)
