"""The sections of a comparison: results per method, the figure over stages, gates, and the order of methods against the papers'."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from proglora_jax.continual import compare_figures, report_figures
from proglora_jax.continual.compare_costs import Cost
from proglora_jax.continual.report import spread
from proglora_jax.continual.report_page import Picture, Section, Table
from proglora_jax.continual.report_tables import ABSENT, number
from proglora_jax.continual.run_record import RunRecord, shared_modes
from proglora_jax.evaluation import published
from proglora_jax.evaluation.sequence import mean, mean_so_far, standard_deviation
from proglora_jax.methods.registry import METHODS
from proglora_jax.training.console import format_bytes

Groups = Mapping[str, Sequence[RunRecord]]
_METRICS = (("acc", "ACC"), ("maa", "MAA"), ("bwt", "BWT"), ("fwt", "FWT"))


def results_section(groups: Groups, costs: Mapping[str, Sequence[Cost]]) -> Section:
    """One table per scoring mode, as the papers' Table 1: two lines per method, metrics and (in the first table) costs beside them."""
    first = next(iter(groups.values()))[0]
    tables = []
    for mode in shared_modes([record for records in groups.values() for record in records]):
        cost_heads = ("trainable", "stored", "stored beside", "s/step", "peak memory") if mode == first.modes[0] else ()
        rows = []
        for name, records in groups.items():
            metrics = tuple(spread([getattr(record.metrics(mode), field) for record in records]) for field, _ in _METRICS)
            right_after, final = (_columns(records, pick, mode) for pick in (RunRecord.right_after, RunRecord.final))
            seeds = str(len(records))
            if records[0].sequential:
                rows.append((name, "right after", *right_after, *("",) * (len(_METRICS) + 1 + len(cost_heads))))
            rows.append((name, "at the end", *final, *metrics, seeds, *(_cost_cells(costs[name]) if cost_heads else ())))
        head = ("method", "accuracy", *first.tasks, *(title for _, title in _METRICS), "seeds", *cost_heads)
        tables.append(Table(head, tuple(rows), f"{mode} scoring, accuracies in %"))
    notes = (
        "Mean ± sample standard deviation over seeds; no deviation for a single seed. ACC is the mean at the end (MFN), MAA the mean over "
        "stages of the mean so far, BWT the mean change since right after training, FWT the mean difference to each task trained alone "
        "(first scoring mode only).",
        "coin: scored as CoIN's scripts do, defects included; clean: the same answers, sane parsing.",
        "trainable: parameters that train in the stage where most do, mm_projector included. stored: parameters in the checkpoints of all "
        "stages; beside: features, statistics or a teacher. s/step: median over the steps through the model, of all runs of the method; "
        "runs at the same time slow each other down. peak memory: the largest of the method's runs, of the device, or of the process on a "
        "CPU.",
    )
    return Section("Results", notes, tables=tuple(tables))


def _columns(records: Sequence[RunRecord], pick: Callable[[RunRecord, str], Sequence[float | None]], mode: str) -> list[str]:
    return [spread(column) for column in zip(*(pick(record, mode) for record in records))]


def _cost_cells(costs: Sequence[Cost]) -> tuple[str, ...]:
    """Costs of a method over its seeds; counts that differ between seeds as a range."""
    counts = [_count([getattr(cost, field) for cost in costs]) for field in ("trainable", "stored", "beside")]
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    memory = [cost.memory for cost in costs if cost.memory is not None]
    return *counts, number(mean(seconds), digits=3) if seconds else ABSENT, format_bytes(max(memory)) if memory else ABSENT


def _count(values: Sequence[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return ABSENT if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def curves_section(groups: Groups) -> Section:
    """The mean accuracy of the tasks so far against the stage, in every scoring mode."""
    first, pictures = next(iter(groups.values()))[0], []
    for mode in shared_modes([record for records in groups.values() for record in records]):
        curves = {name: [mean_so_far(record.scoring[mode]) for record in records] for name, records in groups.items()
                  if records[0].sequential}
        levels = {name: [_running_means(record.final(mode)) for record in records] for name, records in groups.items()
                  if not records[0].sequential}
        png = compare_figures.step_curves(curves, levels, first.tasks, f"Mean accuracy of the tasks so far, {mode} scoring")
        caption = f"{mode} scoring; bands: one standard deviation over seeds."
        caption += " Dotted: methods without a sequence, over the same tasks." if levels else ""
        pictures.append(Picture(f"compare_stages_{mode}.png", caption, png))
    return Section("Accuracy over the stages", pictures=tuple(pictures))


def _running_means(values: Sequence[float]) -> list[float]:
    return [mean(values[:count]) for count in range(1, len(values) + 1)]


def gates_section(groups: Groups) -> Section | None:
    """Mean gates after the last stage, a heat map per method that has any."""
    pictures = []
    for name, records in groups.items():
        stage = max((stage for stage, rows in records[0].gates.items() if rows), default=None)
        if stage is not None:
            pictures.append(_gate_picture(name, records, stage))
    notes = ("Mean over a task's questions after the last stage. Blocks of tasks: mean over seeds. Experts and branches have no order that "
             "two seeds share, so theirs are those of one seed.",)  # fmt: skip
    return Section("Gates", notes, tuple(pictures)) if pictures else None


def _gate_picture(name: str, records: Sequence[RunRecord], stage: int) -> Picture:
    method, tasks = METHODS.get(name), records[0].tasks
    unit = method.gate_unit if method else "block"
    of_tasks = method.blocks_are_tasks if method else True
    used = [record for record in records if stage in record.gates] if of_tasks else records[:1]
    rows = [task for task in tasks if task in used[0].gates[stage]]
    width = max(len(used[0].gates[stage][task]) for task in rows)
    of_tasks = of_tasks and width == len(tasks)
    gates = {task: [mean(values) for values in zip(*(record.gates[stage][task] for record in used))] for task in rows}
    labels = [f"{place}\n{tasks[place - 1]}" if of_tasks else f"{unit} {place - 1}" for place in range(1, width + 1)]
    own = [(row, tasks.index(task)) for row, task in enumerate(rows)] if of_tasks else []
    seeds = f"mean of {len(used)} seed{'s' if len(used) > 1 else ''}" if of_tasks else f"seed {used[0].seed}"
    caption = f"{name}: row = task of the questions, column = {unit}; {seeds}" + ("; outlined: the task's own." if own else ".")
    png = report_figures.mean_gates(gates, labels, own, f"{name}: mean gate after the last stage", unit)
    return Picture(f"compare_gates_{name}.png", caption, png)


# ------------------------------------------------------------------------------------------------------- against the papers


def order_section(groups: Groups) -> Section | None:
    """The order of methods by mean accuracy at the end against the papers' order; None with fewer than two published methods."""
    first = next(iter(groups.values()))[0]
    mode, ours, theirs, deviations, sources = first.modes[0], {}, {}, {}, {}
    for name, records in groups.items():
        row = published.main_row(name)
        level = row and (row.acc if row.acc is not None else row.maa)  # rows without a sequence print their mean as MAA
        if level is not None:
            values = [record.metrics(mode).acc for record in records]
            ours[name], theirs[name], sources[name] = mean(values), level, published.SOURCES[row.source]
            deviations[name] = standard_deviation(values)
    if len(ours) < 2:
        return None
    here, there = ranks(ours), ranks(theirs)
    rows = [
        (name, f"{here[name]:g}", number(ours[name]), f"{there[name]:g}", number(theirs[name]),
         number(here[name] - there[name], signed=True, digits=1).replace(".0", ""), sources[name])
        for name in sorted(ours, key=lambda name: there[name])
    ]
    pairs, swapped = _swapped(ours, theirs, deviations)
    correlation = rank_correlation(list(ours.values()), list(theirs.values()))
    notes = [
        f"Rank correlation (Spearman) of ACC over {len(ours)} methods: {number(correlation)}. "
        f"Pairs of methods in the papers' order: {pairs - len(swapped)} of {pairs}.",
        f"The papers' numbers are {published.LLAVA_7B}'s on CoIN, from several papers; zero-shot and multi-task by their mean.",
    ]
    if first.benchmark and first.benchmark.lower() != "coin":
        notes.append(f"These runs are on {first.benchmark}, with another model: compare the order, not the levels.")
    table = Table(("method", "rank here", "ACC here", "rank in the papers", "ACC in the papers", "places lower here", "paper"), tuple(rows))
    tables = [table] + ([Table(("ahead here, behind in the papers", "behind here", "difference of ACC", "more than the deviation of seeds"),
                               tuple(swapped), "Pairs in another order", words=True)] if swapped else [])  # fmt: skip
    return Section("Order of methods against the papers", tuple(notes), tables=tuple(tables))


def _swapped(ours: Mapping[str, float], theirs: Mapping[str, float], deviations: Mapping[str, float | None]):
    """(number of pairs, rows of those whose order differs: ahead here, behind here, difference, whether seeds tell them apart)."""
    pairs, rows = list(itertools.combinations(ours, 2)), []
    for one, other in pairs:
        ahead, behind = (one, other) if ours[one] >= ours[other] else (other, one)
        if theirs[ahead] >= theirs[behind]:
            continue
        gap, known = ours[ahead] - ours[behind], [deviations[name] for name in (ahead, behind)]
        apart = "one seed" if None in known else "yes" if gap > sum(value**2 for value in known) ** 0.5 else "no"
        rows.append((ahead, behind, number(gap), apart))
    return len(pairs), rows


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Rank of each value, 1 for the largest; equal ones share the mean of their ranks."""
    sorted_values = sorted(values.values(), reverse=True)
    return {name: sorted_values.index(value) + (sorted_values.count(value) + 1) / 2 for name, value in values.items()}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks; None where one side has a single value throughout."""
    first, second = (list(ranks(dict(enumerate(values))).values()) for values in (one, other))
    centre = (len(first) + 1) / 2
    products = [sum((a - centre) * (b - centre) for a, b in zip(x, y)) for x, y in ((first, second), (first, first), (second, second))]
    return products[0] / (products[1] * products[2]) ** 0.5 if products[1] and products[2] else None
