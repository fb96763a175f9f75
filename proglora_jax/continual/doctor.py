"""What a config would do and need, before it runs: stages, steps, hours, parameters, memory of a device, and what to change.

No weights are loaded (only their files' headers are read) and no data: sizes of the model come from config.json or a preset, sizes of
CoIN's tasks from the table in data/tasks.py. The text is what `tools doctor` prints.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax

from proglora_jax.checkpoints.encoder_import import check_encoders
from proglora_jax.checkpoints.sources import find_source, read_config
from proglora_jax.continual.doctor_memory import MemoryPlan
from proglora_jax.continual.doctor_plan import PlannedStage, planned_stages
from proglora_jax.continual.report_page import Table
from proglora_jax.continual.results import versions
from proglora_jax.continual.session import check_preset, model_folder
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import REDUCED, find_set
from proglora_jax.data.plan import main_bucket
from proglora_jax.models.presets import PRESETS, LlavaConfig
from proglora_jax.training import memory, roofline, shapes
from proglora_jax.training.attention_choice import choose_attention
from proglora_jax.training.loop_choice import choose_unroll
from proglora_jax.training.console import format_seconds
from proglora_jax.training.remat_choice import device_limit
from proglora_jax.training.settings import ModelSettings, Settings, from_config

_NOT_SET = "(config.data.root is not set)"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is planned for.

    Attributes:
        devices: how many; 0 takes those that are there.
        memory_gb: memory of each in GB (10^9 bytes); 0 takes what the device says, where it does.
        peak_tflops: peak of each in 10^12 operations per second in the compute dtype, for hours by roofline; 0 gives none.
        utilization: share of the peak that is assumed.
        step_seconds: measured seconds of a training step over all devices, for hours by measurement; 0 gives none.
        step_rows: rows of the measured step; 0 means config.train.batch_size.
        positions: mean positions per row, padding included; 0 takes the main bucket.
    """

    devices: int = 0
    memory_gb: float = 0.0
    peak_tflops: float = 0.0
    utilization: float = 0.45
    step_seconds: float = 0.0
    step_rows: int = 0
    positions: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                raise UserError(f"--{field.name.replace('_', '-')}={getattr(self, field.name)}: must be positive")
        if not 0 < self.utilization <= 1:
            raise UserError(f"--utilization={self.utilization}: must be a share of the peak, above 0 and at most 1")

    @classmethod
    def stated(cls, values: Mapping[str, Any]) -> Machine:
        """The machine that somebody described; what is None or missing keeps its default.

        Raises:
            UserError: "--<field>=<value>: must be positive"
        """
        given = {field.name: values[field.name] for field in dataclasses.fields(cls) if values.get(field.name) is not None}
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')}={value:g}: must be positive")
        return cls(**given)


def diagnose(config: Mapping[str, Mapping[str, Any]], machine: Machine | None = None, *, compile_step: bool = False) -> str:
    """The whole text for a config.

    Args:
        config: as for `main.run`; data.root and model.path may be empty.
        machine: what is planned for; None takes the devices that are there.
        compile_step: also compile the training step for the devices that are there and read what it needs.

    Raises:
        UserError: for a config that no run would accept, and where the model's sizes are not known.
    """
    machine = machine or Machine()
    values = {section: dict(fields) for section, fields in config.items()}
    notes = []
    if not values.get("data", {}).get("root"):
        values.setdefault("data", {})["root"] = _NOT_SET
        notes.append("config.data.root is not set: name the folder that holds playground/ and cl_dataset/ before the run")
    settings = from_config(values)
    if find_set(settings.data.instruction_set) in REDUCED:
        notes.append(f"config.data.instruction_set={settings.data.instruction_set}: how many records its files have is not known here; "
                     "rows, steps, questions and hours are those of the whole set, at most")
    count, platform = machine.devices or jax.device_count(), jax.default_backend()
    try:
        mesh = meshes.abstract_mesh(dataclasses.asdict(settings.mesh), count)
    except ValueError as error:
        raise UserError(str(error)) from error
    settings, _ = choose_attention(choose_unroll(settings, platform, mesh.shape), platform, planned=True)
    sizes, source = model_sizes(settings.model)
    found, problem = weights_found(settings.model)
    notes += [note for note in (problem, _encoders_problem(settings)) if note]
    llava = shapes.abstract_backbone(sizes, settings.model)
    stages = planned_stages(settings, llava, mesh)
    last = stages[-1].shapes
    plan = MemoryPlan.of(settings, llava, stages, mesh, 1e9 * machine.memory_gb or float(device_limit()))
    sections = [
        _environment(count, mesh, source, found),
        _plan(plan.settled(plan.main_bucket), stages, machine, mesh, llava),
        f"Parameters in the last stage, {last.info.name} with {settings.method.name}\n"
        + shapes.describe_parameters(settings.method, last, llava.to_tree()),
        plan.text(),
        _compiled(plan) if compile_step else "",
        _advice([*notes, *plan.warnings()]),
    ]
    return "\n\n".join(section for section in sections if section)


def model_sizes(model: ModelSettings) -> tuple[LlavaConfig, str]:
    """Sizes of the backbone and where they are from: the folder's config.json, or the preset where there is no folder.

    Raises:
        UserError: where neither is there.
    """
    if model.path == "embedded" or os.path.isdir(model.path):
        folder = model_folder(model.path)
        config = read_config(folder, model.vision_path or None)
        check_preset(folder, config, model.preset)
        return config, f"{folder}/config.json"
    if model.preset:
        return PRESETS[model.preset](), f"the preset {model.preset}"
    raise UserError(f"config.model.path='{model.path}': no such folder, and config.model.preset is empty; give a folder with a "
                    f"config.json, or a preset: {', '.join(PRESETS)}")


def weights_found(model: ModelSettings) -> tuple[str, str]:
    """(what lies in the backbone's folders, what is wrong with it), from the headers of the weight files; "" where there is nothing to say.

    Vicuna, its projector and CLIP are found in three places, as a run finds them.
    """
    if not model.path:
        return "", "config.model.path is not set: give a LLaVA folder (or Vicuna's, with vision_path and projector_path) before the run"
    if model.path != "embedded" and not os.path.isdir(model.path):
        return "", f"config.model.path={model.path}: no such folder yet"
    try:
        return find_source(model_folder(model.path), model.vision_path or None, model.projector_path or None).describe(), ""
    except UserError as error:
        return "", str(error)


def _encoders_problem(settings: Settings) -> str:
    """What is wrong with the folders of the similarity encoders, where a run would read them."""
    if not settings.method.uses_similarity or settings.similarity.encoders != "vit_bert":
        return ""
    try:
        check_encoders(settings.similarity.vit_path, settings.similarity.bert_path)
    except UserError as error:
        return str(error)
    return ""


def _environment(count: int, mesh: Any, source: str, found: str) -> str:
    here = jax.devices()
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"devices here: {len(here)} x {here[0].device_kind} ({jax.default_backend()}), {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPU cores",
        f"planned for: {count} device(s), mesh {axes}; the model's sizes are from {source}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    return "\n".join([*lines, f"backbone {found}"] if found else lines)


def _plan(settings: Settings, stages: list[PlannedStage], machine: Machine, mesh: Any, llava: Any) -> str:
    """The table of stages, and how long they take."""
    positions = machine.positions or main_bucket(settings.data.buckets, llava.config.image_tokens)[0]
    train_seconds, ask_second, how = _speeds(settings, stages, machine, mesh, llava, positions)
    rows = []
    for stage, train in zip(stages, train_seconds):
        own = f"{stage.train_rows:,}" + (f" + {stage.replayed:,}" if stage.replayed else "")
        hours = (train, stage.questions * ask_second)
        rows.append((str(stage.number + 1), stage.name, own, str(stage.batch), f"{stage.steps:,}", f"{stage.questions:,}",
                     *(format_seconds(second) if second else "-" for second in hours)))
    totals = [sum(getattr(stage, name) for stage in stages) for name in ("steps", "questions")]
    seconds = [sum(train_seconds), totals[1] * ask_second]
    rows.append(("", "all", "", "", f"{totals[0]:,}", f"{totals[1]:,}", *(format_seconds(second) if second else "-" for second in seconds)))
    head = ("stage", "task", "rows (+ replayed, at most)", "batch", "steps", "questions", "train", "answer")
    return "\n".join([plain_table(Table(head, tuple(rows))), how])


def _speeds(settings: Settings, stages, machine: Machine, mesh: Any, llava: Any, positions: int) -> tuple[list[float], float, str]:
    """Seconds of each stage's training and per question over all devices (0 where unknown), and in words how they were found."""
    last = stages[-1].shapes
    works = {id(phase): _work(settings, llava, positions, phase.shapes) for stage in stages for phase in stage.phases}
    asked = roofline.prefill_work(llava.config, llava.targets(), positions, settings.method.cost(last.state.params, last.info, None))
    most = max(works.values(), key=lambda work: work.total, default=roofline.Work(0.0, 0.0))
    sizes = f"at {positions} positions a training row is {'at most ' if len({*works.values()}) > 1 else ''}{most.total / 1e12:.3g} TFLOP " \
            f"({most.model / 1e12:.3g} count for MFU), a prompt {asked / 1e12:.3g}"
    devices = int(mesh.size)
    speed = machine.peak_tflops * 1e12 * machine.utilization * devices
    answer = asked / speed if speed else 0.0
    if machine.step_seconds:
        rows = machine.step_rows or settings.train.batch_size
        seconds = [stage.rows_passed * machine.step_seconds / rows for stage in stages]
        return seconds, answer, f"hours from {machine.step_seconds:g} s measured for a step of {rows} rows; {sizes}"
    own = [sum(phase.steps * phase.batch * works[id(phase)].total for phase in stage.phases) for stage in stages]
    seconds = [work / speed if speed else 0.0 for work in own]
    if speed:
        return seconds, answer, (
            f"hours at {machine.utilization:.0%} of {machine.peak_tflops:g} TFLOP/s on {devices} device(s); {sizes}; new tokens, loading, "
            "compiling and saving come on top")
    return seconds, 0.0, f"no hours: give --step-seconds (measured) or --peak-tflops; {sizes}"


def _work(settings: Settings, llava: Any, positions: int, phase: shapes.StageShapes) -> roofline.Work:
    """Work of a row in a phase."""
    cost = settings.method.cost(phase.state.params, phase.info, phase.phase)
    labels = next((bucket for bucket in settings.data.buckets if bucket[0] >= positions), settings.data.buckets[-1])[1]
    return roofline.training_work(llava.config, llava.targets(), positions, labels, settings.model.remat, cost, settings.model.attention)


def _compiled(plan: MemoryPlan) -> str:
    """What the compiled step needs for the largest bucket: on the plan's devices if they are there, else on one with its share of rows."""
    if not plan.batches:
        return "Compiled step: nothing trains."
    settings = plan.settled(plan.settings.data.buckets[-1])
    fits, bucket = plan.devices <= jax.device_count(), settings.data.buckets[-1]
    phase = plan.heaviest(bucket)
    mesh = meshes.make_mesh(dict(plan.mesh.shape) if fits else {"data": 1}, jax.devices()[: plan.devices if fits else 1])
    rows = phase.batch if fits else plan.rows(phase) * settings.train.micro_batches
    # The mean over groups does not change what is held, and a share of the rows may not have as many groups.
    own = dataclasses.replace(settings, train=dataclasses.replace(settings.train, loss_groups=0, loss_group_size=1))
    parts = memory.compiled_memory(own, plan.llava, phase.shapes, rows, bucket, mesh)
    cells = ", ".join(f"{part.name} {part.bytes / 1e9:.2f}" for part in parts)
    said = f"{memory.total(parts) / 1e9:.2f} GB ({cells})" if parts else "this backend does not say"
    kind = jax.devices()[0].device_kind
    note = "" if jax.default_backend() != "cpu" else "; XLA for CPU computes 16-bit formats in 32 bits, so an accelerator needs less"
    load = f"{plan.rows(phase)} row(s) of {bucket[0]} positions at once"
    return f"Compiled training step, per device, {load}, for {mesh.size} x {kind}: {said}{note}"


def _advice(warnings: list[str]) -> str:
    if not warnings:
        return "Nothing speaks against this config."
    return "\n".join(["Before you run it:", *(f"  - {warning}" for warning in warnings)])


def plain_table(table: Table) -> str:
    """A table for the console: columns aligned, numbers to the right."""
    lines = [tuple(table.head), *(tuple(row) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    text = ["  ".join(cell.ljust(width) if i == 1 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
            for line in lines]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * len(widths) - 2), *text[1:]])
