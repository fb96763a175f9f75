"""Compiles a run's programs for accelerators that are not there: does it fit, what does it compute, what do the chips tell each other.

The programs are those of a run, with its shardings, from shapes alone: no weights, no data and no accelerator are needed, only the
compiler (for TPUs the wheel libtpu, extra "aot"; for NVIDIA GPUs JAX's CUDA plugin, extra "cuda13" or "cuda12"). What memory and
collectives say is exact for this compiler; nothing is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from jax.sharding import Mesh

from proglora_jax.continual.compile_table import compile_text
from proglora_jax.continual.doctor import model_sizes
from proglora_jax.continual.doctor_memory import MemoryPlan
from proglora_jax.continual.doctor_plan import planned_stages
from proglora_jax.continual.row_split import late_rows
from proglora_jax.core import gpus, host
from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.data.errors import UserError, write_file
from proglora_jax.training import collectives, flops, memory, programs, roofline, shapes
from proglora_jax.training.attention_choice import choose_attention
from proglora_jax.training.loop_choice import choose_unroll
from proglora_jax.training.remat_choice import planning_limit
from proglora_jax.training.settings import Settings, from_config

PROGRAMS = ("train", "answer", "answer_late", "answer_shared")
"""What can be compiled: the third, questions with longer answers, where these are asked again; the last, questions that share images, for
methods whose adapter does not depend on the prompt."""
PER_IMAGE, BEHIND = 2, 64
"""Questions an image, and positions behind the image, of the last one."""
NO_DEVICE = (
    "compiled without a GPU: kernels are not timed against one another (no autotuning) and cuDNN is not asked for its plan and workspace, "
    "so that other kernels and somewhat other temporaries are to be expected on the machine",
)
"""What is different on the machine where GPUs are only described."""
# What libtpu asks of its surroundings when there is no TPU: no metadata server, no other hosts, no lock on a chip. And JAX's CUDA plugin
# shall not look for a driver.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be compiled.

    Attributes:
        topology: a TPU slice as its compiler names it, "v5e:4x4", "v5p:2x2x1", "v6e:2x4"; or GPUs of `gpus.GPUS`, "h100" for one,
            "h100:8" for eight of one host, "h100:2x8" for two hosts.
        programs: some of PROGRAMS.
        positions: padded lengths to compile for, buckets of the config; () takes its largest.
        hlo: folder for the compiled programs' text; "" keeps none.
    """

    topology: str
    programs: tuple[str, ...] = PROGRAMS
    positions: tuple[int, ...] = ()
    hlo: str = ""


def compile_ahead(config: Mapping[str, Mapping[str, Any]], order: Order) -> dict[str, Any]:
    """Compiles and measures.

    Args:
        config: as for `main.run`; data.root and model.path may be empty.
        order: what is to be compiled.

    Returns:
        The report, ready for JSON; `compile_text` makes a table of it. "fits" is False where any program does not fit.

    Raises:
        UserError: for a config that no run would accept, and where the compiler is not there.
    """
    values = {section: dict(fields) for section, fields in config.items()}
    values.setdefault("data", {})["root"] = values.get("data", {}).get("root") or "(not set)"
    settings = from_config(values)
    mesh = described_mesh(settings, order.topology)
    first = mesh.devices.flat[0]
    settings, reason = choose_attention(choose_unroll(settings, first.platform, mesh.shape), first.platform, first)
    chip, on_gpus = roofline.chip_of(first.device_kind), gpus.names_gpus(order.topology)
    usable = _usable(chip, on_gpus)
    sizes, source = model_sizes(settings.model)
    llava = shapes.abstract_backbone(sizes, settings.model)
    stages = planned_stages(settings, llava, mesh)
    plan = MemoryPlan.of(settings, llava, stages, mesh, float(planning_limit(usable) if on_gpus else usable))
    _check_split(plan)
    late = plan.first_answer() < plan.longest_answer() or order.programs == ("answer_late",)
    chosen = [name for name in order.programs
              if (name != "answer_shared" or _shares(settings, order)) and (name != "answer_late" or late)]
    asked = [(name, positions) for name in chosen for positions in _lengths(settings, name, order.positions)]
    results = [_compile(plan, name, positions, order, usable) for name, positions in asked]
    trainable = trees.partition(plan.stage.state.params, plan.stage.mask)[0]
    report = {
        "topology": order.topology, "chips": int(mesh.size), "chip": chip.name, "hbm": usable, "mesh": dict(mesh.shape),
        "model": source, "method": settings.method.name, "remat": settings.model.remat, "attention": settings.model.attention,
        "attention_reason": reason,
        "micro_batches": settings.train.micro_batches, "trainable_bytes": trees.count_bytes(trainable),
        "backbone_bytes": trees.count_bytes(llava.to_tree()), "backbone_bytes_per_chip": memory.backbone_bytes(llava, mesh),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "flax") if name != "libtpu" or not on_gpus}
        | (gpus.compiler_versions() if on_gpus else {}),
        "notes": list(NO_DEVICE) if on_gpus else [],
        "fits": all(result["fits"] for result in results), "programs": results,
    }
    return report | {"advice": [] if report["fits"] else advice(plan)}


def described_mesh(settings: Settings, topology: str) -> Mesh:
    """The config's mesh on a slice that is only described.

    Raises:
        UserError: "--topology <name>: ..." where there is no compiler for it, or the mesh does not fit its number of chips.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        devices = meshes.described_devices(topology)
    except ValueError as error:
        wanted = "; names look like v5e:4x4, v5p:2x2x1 or v6e:2x4 (and h100:8 for GPUs), and the compiler for TPUs comes with " \
                 "pip install 'proglora-jax[aot]'"
        raise UserError(f"--topology {topology}: {error}{'' if gpus.names_gpus(topology) else wanted}") from error
    try:
        return meshes.make_mesh(dataclasses.asdict(settings.mesh), devices)
    except ValueError as error:
        raise UserError(str(error)) from error


def advice(plan: MemoryPlan) -> list[str]:
    """Which settings would make it fit, by the estimate of `tools doctor`; where that finds room, as if there were less memory."""
    for share in (1.0, 0.85, 0.7, 0.55, 0.4):
        found = dataclasses.replace(plan, limit=share * plan.limit).warnings()
        if found:
            return found
    return ["the estimate of tools doctor sees room for it: compile with more micro-batches or another remat policy"]


def write_report(report: Mapping[str, Any], path: str) -> None:
    """Writes a report as JSON, whole or not at all.

    Raises:
        UserError: "<path>: cannot be written (...); ..."
    """
    write_file(path, json.dumps(report, indent=1) + "\n")


def _usable(chip: roofline.Chip, on_gpus: bool) -> int:
    """Bytes that a program may use: all that a TPU's compiler knows of, and of a GPU what a run takes."""
    try:
        return int(chip.hbm * host.gpu_memory_share()) if on_gpus else chip.hbm
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_split(plan: MemoryPlan) -> None:
    if found := dataclasses.replace(plan, limit=0.0).warnings():
        raise UserError("; ".join(found))


def _shares(settings: Settings, order: Order) -> bool:
    """Whether a run of the config may answer questions that share images together.

    Raises:
        UserError: where that alone was asked for, and it may not.
    """
    if settings.method.fixed_at_test and settings.evaluate.share_prefix != "off":
        return True
    if order.programs == PROGRAMS[3:]:
        reason = f"the adapter of {settings.method.name} depends on the prompt" if settings.evaluate.share_prefix != "off" else (
            "config.evaluate.share_prefix='off'")
        raise UserError(f"--program {PROGRAMS[3]}: {reason}, so every prompt is read whole; compile the program answer")
    return False


def _lengths(settings: Settings, program: str, positions: Sequence[int]) -> list[int]:
    known = [bucket[0] for bucket in settings.data.buckets] if program == "train" else list(settings.evaluate.prompt_lengths)
    if not positions:
        return known[-1:]
    strange = [length for length in positions if length not in known]
    if strange:
        field = "data.buckets" if program == "train" else "evaluate.prompt_lengths"
        raise UserError(f"--positions {strange[0]}: not in config.{field}, which has {', '.join(map(str, known))}")
    return list(positions)


def _compile(plan: MemoryPlan, program: str, positions: int, order: Order, usable: int) -> dict[str, Any]:
    """Compiles one program and reads what the compiler says of it."""
    settings, llava, mesh = plan.settings, plan.llava, plan.mesh
    if program == "train":
        labels = dict(settings.data.buckets)[positions]
        if not plan.phases:
            raise UserError(f"--program train: config.method.name='{settings.method.name}' trains nothing")
        phase = plan.heaviest((positions, labels))
        rows = phase.batch
        shown = {"rows": rows, "positions": positions, "labels": labels}
        settings = plan.settled((positions, labels))
        shown["remat"] = settings.model.remat
        traced = programs.trace_train_step(settings, llava, phase.shapes, rows, (positions, labels), mesh)
    elif program == "answer_shared":
        rows, new_tokens, ways = settings.evaluate.batch_size, plan.first_answer(), meshes.batch_ways(mesh)
        behind = min(BEHIND, positions // 2)
        load = programs.Shared(rows, -(-rows // (PER_IMAGE * ways)) * ways, positions - behind, behind)
        shown = {"rows": rows, "images": load.images, "positions": positions, "new_tokens": new_tokens}
        traced = programs.trace_prefix_generator(settings, llava, plan.stage, load, new_tokens, mesh)
    else:
        rows, new_tokens = settings.evaluate.batch_size, plan.first_answer()
        if program == "answer_late":
            rows, new_tokens = late_rows(rows, meshes.batch_ways(mesh)), plan.longest_answer()
        shown = {"rows": rows, "positions": positions, "new_tokens": new_tokens}
        traced = programs.trace_generator(settings, llava, plan.stage, rows, positions, new_tokens, mesh)
    work = flops.matmul_work(traced.jaxpr)
    result = {"program": program, **shown, "flops": work.total / mesh.size, "flops_per_new_token": work.turn / mesh.size}
    logging.info("compiling %s at %d positions for %s; this takes minutes", program, positions, order.topology)
    began = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # the compiler's errors are of the runtime's own type
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"fits": False, "compile_seconds": time.monotonic() - began, "error": _first_lines(str(error))}
    text = compiled.as_text()
    if order.hlo:
        os.makedirs(order.hlo, exist_ok=True)
        with open(os.path.join(order.hlo, f"{program}_{positions}.txt"), "w", encoding="utf-8") as file:
            file.write(text)
    result |= _measured(compiled, text, work, mesh) | {"compile_seconds": time.monotonic() - began}
    return result | _verdict(result, order.topology, usable)


def _measured(compiled: Any, text: str, work: flops.MatmulWork, mesh: Mesh) -> dict[str, Any]:
    """Memory of a chip, collectives, and how evenly the matmuls are split."""
    held = compiled.memory_analysis()
    parts = {
        "arguments": held.argument_size_in_bytes, "results": held.output_size_in_bytes - held.alias_size_in_bytes,
        "temporaries": held.temp_size_in_bytes, "code": held.generated_code_size_in_bytes,
    }
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)  # nothing for GPUs that are only described
    return {
        "memory": parts, "memory_total": sum(parts.values()),
        # XLA's own count of a chip takes loop bodies once; so does `once`. 1 means that no chip computes what another does as well.
        "flops_of_a_chip_to_its_share": counted / (work.once / mesh.size) if work.once and counted else None,
        "collectives": [dataclasses.asdict(one) | {"moved": one.moved} for one in collectives.collectives(text)],
    }


def _verdict(result: Mapping[str, Any], topology: str, usable: int) -> dict[str, Any]:
    """Whether a compiled program fits: a TPU's compiler would have refused, that for GPUs leaves it to the run."""
    if not gpus.names_gpus(topology) or result["memory_total"] <= usable:
        return {"fits": True}
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in result["memory"].items())
    return {"fits": False, "error": f"it needs {result['memory_total'] / 2**30:.2f} GiB ({parts})"}


def _first_lines(text: str) -> str:
    """What an error of the compiler says, without its listing of buffers."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:500]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


__all__ = ["PROGRAMS", "Order", "advice", "compile_ahead", "compile_text", "described_mesh", "write_report"]
