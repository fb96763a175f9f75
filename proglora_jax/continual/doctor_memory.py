"""Whether a config fits on a device, bucket by bucket and while it answers, and which setting would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from proglora_jax.continual import row_split
from proglora_jax.continual.doctor_plan import PlannedPhase, PlannedStage
from proglora_jax.continual.report_page import Table
from proglora_jax.core import tree as trees
from proglora_jax.core.mesh import abstract_mesh, batch_ways
from proglora_jax.data import image_groups
from proglora_jax.data.plan import main_bucket
from proglora_jax.data.tasks import TASKS
from proglora_jax.models.llava import Llava
from proglora_jax.training import memory
from proglora_jax.training.memory import Load, Part
from proglora_jax.training.remat_choice import in_words, policy_for, with_policy
from proglora_jax.training.settings import Settings
from proglora_jax.training.shapes import StageShapes

SIZES_GB = (24, 40, 80, 141)
"""Memory of common devices, for a plan without one."""
OTHER_ROWS = 64
"""Rows of a batch that can be split into many parts, of the benchmark MCITlib; see `batches` in configs/coin.py."""
_BEGINNING = 64  # most positions of text before an image: BOS and the system sentence (Vicuna's has 35 tokens)
_CHEAPEST_FIRST = ("none", "dots", "qkvo_mlp", "qkvo", "full")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of a config on one device of a mesh.

    Attributes:
        settings: the config.
        llava: the backbone as shapes.
        stage: the last stage, with which all questions are answered at the end.
        phases: those that train the model, one of each kind.
        mesh: an abstract mesh.
        limit: bytes of a device, 0 where unknown.
        batches: rows of a step of every phase, by name.
    """

    settings: Settings
    llava: Llava
    stage: StageShapes
    phases: tuple[PlannedPhase, ...]
    mesh: Any
    limit: float
    batches: dict[str, int]

    @classmethod
    def of(cls, settings: Settings, llava: Llava, stages: list[PlannedStage], mesh: Any, limit: float) -> MemoryPlan:
        """The plan of all stages of a config, from `doctor_plan.planned_stages`."""
        named = [(row_split.row_name(stage.name, phase.shapes.phase), phase) for stage in stages for phase in stage.phases]
        batches = {name: phase.batch for name, phase in named}
        return cls(settings, llava, stages[-1].shapes, _unlike(settings, [phase for _, phase in named]), mesh, limit, batches)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return int(self.mesh.size)

    def rows(self, phase: PlannedPhase) -> int:
        """Rows of a phase that a device computes at once."""
        return -(-phase.batch // (self.settings.train.micro_batches * batch_ways(self.mesh)))

    @property
    def main_bucket(self) -> tuple[int, int]:
        """The bucket that figures for one length are given for."""
        return main_bucket(self.settings.data.buckets, self.llava.config.image_tokens)

    @property
    def usable(self) -> float:
        """Bytes that can be planned with."""
        return memory.USABLE * self.limit

    def training(self, bucket: tuple[int, int]) -> list[Part]:
        """What a training step on a bucket's shape holds, of the phase that holds most."""
        return self._held(self.heaviest(bucket), bucket)

    def heaviest(self, bucket: tuple[int, int]) -> PlannedPhase:
        """The phase that holds most with rows of a bucket: PCLR's distillation has two pools and trains one, its other phases do not."""
        return max(self.phases, key=lambda phase: memory.total(self._held(phase, bucket)))

    def _held(self, phase: PlannedPhase, bucket: tuple[int, int]) -> list[Part]:
        return memory.training_memory(self.settled(bucket), self.llava, phase.shapes, Load(self.rows(phase), *bucket), self.mesh)

    def settled(self, bucket: tuple[int, int]) -> Settings:
        """The settings with the policy that a run takes for a bucket, where the config says "auto"."""
        phases = [(phase.shapes, self.rows(phase)) for phase in self.phases]
        return with_policy(self.settings, policy_for(self.settings, self.llava, phases, bucket, self.mesh, self.limit))

    def answering(self) -> list[Part]:
        """What the longest prompts hold with room for a short answer, or fewer of them with room for the longest: whichever is more."""
        evaluate, ways = self.settings.evaluate, batch_ways(self.mesh)
        asked = [(evaluate.batch_size, self.first_answer())]
        if self.first_answer() < self.longest_answer():
            asked.append((row_split.late_rows(evaluate.batch_size, ways), self.longest_answer()))
        held = []
        for rows, new_tokens in asked:
            load = Load(-(-rows // ways), max(evaluate.prompt_lengths), 0)
            shared = 0 if held else self._shared(load)  # what is asked again is read whole
            held.append(memory.answering_memory(self.settings, self.llava, self.stage, load, new_tokens, self.mesh, shared))
        return max(held, key=memory.total)

    def _shared(self, load: Load) -> int:
        """Most positions of beginnings that the prompts on a device may share; how many it will be depends on the data."""
        evaluate = self.settings.evaluate
        if evaluate.share_prefix == "off" or not self.settings.method.fixed_at_test or load.rows < 2:
            return 0
        most = (load.rows - 1) * min(load.positions, self.llava.config.image_tokens + _BEGINNING)
        if evaluate.share_prefix == "on":
            return most
        return min(most, int(load.rows * max(0.0, load.positions / image_groups.WORTH - image_groups.MULTIPLE)))  # else it is not worth it

    def _apart(self) -> MemoryPlan:
        """The plan with every prompt read whole."""
        evaluate = dataclasses.replace(self.settings.evaluate, share_prefix="off")
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, evaluate=evaluate))

    def first_answer(self) -> int:
        """Room for an answer when a question is first asked."""
        return min(self.longest_answer(), self.settings.evaluate.first_new_tokens or self.longest_answer())

    def _room(self) -> str:
        first, longest = self.first_answer(), self.longest_answer()
        return f"answers of up to {longest} tokens" + (f", asked with room for {first} at first" if first < longest else "")

    def longest_answer(self) -> int:
        """The largest cap on new tokens among the tasks."""
        return self.settings.evaluate.max_new_tokens or max(task.max_new_tokens for task in TASKS.values())

    def peak(self) -> float:
        """Most bytes of any training step."""
        return max((memory.total(self.training(bucket)) for bucket in self.settings.data.buckets), default=0.0) if self.batches else 0.0

    def text(self) -> str:
        """Tables of training and answering, and what fits where."""
        blocks = []
        if self.batches:
            columns = [self.training(bucket) for bucket in self.settings.data.buckets]
            head = tuple(str(positions) for positions, _ in self.settings.data.buckets)
            blocks.append(f"Memory of a device while training, GB, {self._heaviest_named()} (estimated)")
            blocks.append(_columns(head, columns))
            if self.settings.model.remat == "auto":
                chosen = {bucket[0]: self.settled(bucket).model.remat for bucket in self.settings.data.buckets}
                blocks.append(f"remat auto, by memory{'' if self.limit else ', which is not known'}: {in_words(chosen)}")
            if not self.limit:
                blocks.append(self._capacities())
        evaluate = self.settings.evaluate
        blocks.append(f"Memory of a device while answering, GB, {evaluate.batch_size} questions over {batch_ways(self.mesh)} device(s), "
                      f"{self._room()} (estimated)")
        blocks.append(_columns((str(max(evaluate.prompt_lengths)),), [self.answering()]))
        if self.limit:
            blocks.append(f"a device has {self.limit / 1e9:.1f} GB, of which {self.usable / 1e9:.1f} can be planned with")
        return "\n".join(blocks)

    def _heaviest_named(self) -> str:
        """The rows at once and the phase that hold most; one for each bucket where they differ."""
        found: dict[str, list[str]] = {}
        for bucket in self.settings.data.buckets:
            phase = self.heaviest(bucket)
            several = len(self.settings.method.phases(phase.shapes.info)) > 1
            name = f"{self.rows(phase)} row(s) at once in stage {phase.shapes.info.index + 1}, which holds most"
            found.setdefault(name + (f" (phase {phase.shapes.phase.name})" if several else ""), []).append(str(bucket[0]))
        return ", ".join(f"{name} at {', '.join(lengths)} positions" if len(found) > 1 else name for name, lengths in found.items())

    def _capacities(self) -> str:
        """Rows that fit at once on common devices, for the main bucket."""
        bucket = self.main_bucket
        cells = [f"{size} GB: {most_rows(self, bucket, 1e9 * size)}" for size in SIZES_GB]
        return f"rows that fit at once at {bucket[0]} positions, by the device's memory: {', '.join(cells)}"

    def warnings(self) -> list[str]:
        """What will not run or not fit, and which setting would."""
        ways = batch_ways(self.mesh)
        found = list(filter(None, [row_split.split_problem(self.settings, self.batches, ways)]))
        rows = self.settings.evaluate.batch_size
        if rows % ways:
            found.append(f"config.evaluate.batch_size={rows} cannot be split over {ways} devices: "
                         f"--config.evaluate.batch_size={max(1, rows // ways) * ways}")
        changed = self
        if self.limit and self.peak() > self.usable:
            fitting = self._fitting_change()
            found.append(self._training_advice(fitting))
            changed = fitting or self  # a backbone that is split for training is so while it answers
        if self.limit and memory.total(changed.answering()) > self.usable:
            found.append(changed._answering_advice())
        return found

    def _training_advice(self, fitting: MemoryPlan | None) -> str:
        """What does not fit, and what would."""
        misfits = [str(bucket[0]) for bucket in self.settings.data.buckets if memory.total(self.training(bucket)) > self.usable]
        needed = f"training needs {self.peak() / 1e9:.1f} GB a device (rows of {', '.join(misfits)} positions do not fit)"
        if fitting:
            return f"{needed}: it would fit with {_flags(self, fitting)}"
        if other := self._with_other_batches():
            rows, fitting = other
            sizes, most = ", ".join(map(str, sorted(set(self.batches.values())))), max(self._parts(batch_ways(fitting.mesh)))
            choice = " (configs/coin.py:batches=mcitlib64)" if rows == OTHER_ROWS else ""
            return (f"{needed}: batches of {sizes} rows split evenly into {most} parts at most; with {rows} rows for every task{choice} it "
                    f"would fit with {_flags(self, fitting)}")
        return f"{needed}, and no setting known here makes it fit: take devices with more memory, or more of them"

    def _fitting_change(self) -> MemoryPlan | None:
        """The cheapest change that fits: more parts, more recomputing, a split backbone; last, as it loses data, shorter rows."""
        least = self.settings.data.buckets.index(self.main_bucket)
        for buckets in range(len(self.settings.data.buckets), least, -1):
            for mesh in self._meshes():
                for policy in _from(self.settings.model.remat):
                    for parts in self._parts(batch_ways(mesh)):
                        plan = self._changed(mesh, policy, parts, self.settings.data.buckets[:buckets])
                        if plan.peak() <= self.usable:
                            return plan
        return None

    def _with_other_batches(self) -> tuple[int, MemoryPlan] | None:
        """(rows, what fits with so many in every batch) where the config's own batches cannot be split as far as it takes."""
        ways = batch_ways(self.mesh)
        rows = max(ways, OTHER_ROWS // ways * ways)
        phases = tuple(dataclasses.replace(phase, batch=rows) for phase in self.phases)
        plan = dataclasses.replace(self, phases=phases, batches=dict.fromkeys(self.batches, rows))._fitting_change()
        return (rows, plan) if plan else None

    def _changed(self, mesh: Any, policy: str, parts: int, buckets: tuple) -> MemoryPlan:
        now = self.settings
        data = now.data if len(buckets) == len(now.data.buckets) else dataclasses.replace(
            now.data, buckets=buckets, max_length=buckets[-1][0], max_labels=buckets[-1][1])
        changed = dataclasses.replace(
            now, data=data, model=dataclasses.replace(now.model, remat=policy), train=dataclasses.replace(now.train, micro_batches=parts))
        return dataclasses.replace(self, settings=changed, mesh=mesh)

    def _meshes(self) -> list[Any]:
        """The mesh as it is, and meshes that split the backbone over more of the devices."""
        now, model = self.mesh.shape["fsdp"], self.mesh.shape["model"]
        more = [size for size in (2, 4, 8, 16) if size > now and self.devices % (size * model) == 0]
        return [self.mesh, *(abstract_mesh({"data": -1, "fsdp": size, "model": model}, self.devices) for size in more)]

    def _parts(self, ways: int) -> list[int]:
        """Numbers of micro-batches that split every batch evenly over the devices, from the config's own on where there are such."""
        least = self.settings.train.micro_batches
        even = row_split.even_parts(self.batches, ways)
        return [count for count in even if count >= least] or even or [least]

    def _answering_advice(self) -> str:
        needed = f"answering needs {memory.total(self.answering()) / 1e9:.1f} GB a device"
        if memory.total(self._apart().answering()) <= self.usable:
            return f"{needed} where questions share images: it would fit with --config.evaluate.share_prefix=off"
        ways, rows = batch_ways(self.mesh), self.settings.evaluate.batch_size
        while rows > ways:
            rows = max(ways, rows // 2 // ways * ways)
            evaluate = dataclasses.replace(self.settings.evaluate, batch_size=rows)
            smaller = dataclasses.replace(self, settings=dataclasses.replace(self.settings, evaluate=evaluate))
            if memory.total(smaller.answering()) <= self.usable:
                return f"{needed}: it would fit with --config.evaluate.batch_size={rows}"
        return (f"{needed}, even one question a device does not fit: lower config.evaluate.max_new_tokens, "
                "config.evaluate.first_new_tokens or config.evaluate.prompt_lengths, or split the backbone with config.mesh.fsdp")


def _unlike(settings: Settings, phases: Iterable[PlannedPhase]) -> tuple[PlannedPhase, ...]:
    """One phase of each kind that holds and computes the same, the one with the largest batches, of these the last."""
    found: dict[Any, PlannedPhase] = {}
    for phase in phases:
        params, info, memories = phase.shapes.state.params, phase.shapes.info, phase.shapes.state.memory
        trainable, frozen = trees.partition(params, phase.shapes.mask)
        like = settings.method.cost(params, info, phase.shapes.phase), *map(trees.count_bytes, (trainable, frozen, memories))
        if like not in found or found[like].batch <= phase.batch:
            found[like] = phase
    return tuple(found.values())


def most_rows(plan: MemoryPlan, bucket: tuple[int, int], limit: float) -> int:
    """Most rows at once that a device of `limit` bytes trains on a bucket's shape; 0 where not even one fits."""
    fit, settings = [], plan.settled(bucket)
    for phase in plan.phases:
        parts = (memory.training_memory(settings, plan.llava, phase.shapes, Load(rows, *bucket), plan.mesh) for rows in (0, 1))
        none, one = map(memory.total, parts)
        fit.append(int((memory.USABLE * limit - none) / (one - none)))  # every part is held once or grows with the rows
    return max(0, min(fit))


def _from(policy: str) -> tuple[str, ...]:
    """The policies that keep no more than one; "auto" chooses for itself."""
    return ("auto",) if policy == "auto" else _CHEAPEST_FIRST[_CHEAPEST_FIRST.index(policy) :]


def _flags(before: MemoryPlan, after: MemoryPlan) -> str:
    flags = []
    if len(after.settings.data.buckets) < len(before.settings.data.buckets):
        positions, labels = after.settings.data.buckets[-1]
        shapes = str(after.settings.data.buckets).replace(" ", "")
        flags.append(f"--config.data.max_length={positions} --config.data.max_labels={labels} --config.data.buckets={shapes}")
    if after.settings.train.micro_batches != before.settings.train.micro_batches:
        flags.append(f"--config.train.micro_batches={after.settings.train.micro_batches}")
    if after.settings.model.remat != before.settings.model.remat:
        flags.append(f"--config.model.remat={after.settings.model.remat}")
    if after.mesh.shape["fsdp"] != before.mesh.shape["fsdp"]:
        flags.append(f"--config.mesh.data=-1 --config.mesh.fsdp={after.mesh.shape['fsdp']}")
    rows = max(after.rows(phase) for phase in after.phases)
    return f"{' '.join(flags)} ({rows} row(s) at once, {after.peak() / 1e9:.1f} GB)"


def _columns(head: tuple[str, ...], columns: list[list[Part]]) -> str:
    """Parts as lines, one column per padded length, with the sum below."""
    differ = len({part.name for column in columns for part in column}) > len(columns[0])  # policies, one for each bucket
    names = [part.name.partition(", remat")[0] if differ else part.name for part in columns[0]]
    rows = [(name, *(f"{column[i].bytes / 1e9:.2f}" for column in columns)) for i, name in enumerate(names)]
    rows.append(("all", *(f"{memory.total(column) / 1e9:.2f}" for column in columns)))
    table = Table(("positions of a row", *head), tuple(rows))
    widths = [max(len(line[i]) for line in (table.head, *table.rows)) for i in range(len(table.head))]
    align = lambda line: (cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
    return "\n".join("  ".join(align(line)).rstrip() for line in (table.head, *table.rows))
