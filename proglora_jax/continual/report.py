"""Reports on runs: one run as Markdown, HTML and figures; several runs as one table.

Everything comes from `workdir/results.json`, whose format `continual/run_record.py` documents; a partial run gives a partial report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from proglora_jax.continual.report_page import Section, Table, markdown_table, to_html, to_markdown
from proglora_jax.continual.report_published import published_section
from proglora_jax.continual.report_tables import (
    ABSENT,
    cost_section,
    curves_section,
    gate_section,
    matrix_section,
    metrics_section,
    number,
    settings_section,
    task_section,
)
from proglora_jax.continual.run_record import RunRecord, load_run, save_run, shared_modes, write_atomically
from proglora_jax.data.errors import UserError
from proglora_jax.evaluation.sequence import mean, standard_deviation

__all__ = ["RunRecord", "compare_runs", "load_run", "report_sections", "save_run", "write_report"]

_COMPARED = (("acc", "ACC (= MFN)"), ("maa", "MAA"), ("bwt", "BWT"), ("new_acc", "right after training"))


def write_report(workdir: str | os.PathLike[str], against: str = "none") -> list[str]:
    """Writes `report.md`, its figures `report_*.png`, and the self-contained `report.html` into a run's folder.

    Args:
        workdir: folder with `results.json`.
        against: "published" adds a comparison with the papers' numbers, "none" does not.

    Returns:
        The paths written, `report.md` and `report.html` first.

    Raises:
        UserError: "against=<value>: unknown; use none or published"
        UserError: as `load_run` raises for a missing or broken results file
    """
    if against not in ("none", "published"):
        raise UserError(f"against={against}: unknown; use none or published")
    record = load_run(workdir)
    sections = report_sections(record, against)
    title = record.method + (f" on {record.benchmark}" if record.benchmark else "") + f", seed {record.seed}"
    pictures = [picture for section in sections for picture in section.pictures]
    # The pictures are written first, so that a report on disk never names one that is not there.
    drawn = [write_atomically(os.path.join(workdir, picture.file), picture.png) for picture in pictures]
    texts = (("report.md", to_markdown(title, sections)), ("report.html", to_html(title, sections)))
    written = [write_atomically(os.path.join(workdir, name), text.encode()) for name, text in texts]
    return written + drawn


def report_sections(record: RunRecord, against: str = "none") -> list[Section]:
    """The sections of a run's report, in order; what the run did not record is left out."""
    if not record.stages:
        note = f"None of the {len(record.tasks)} stages is scored completely yet, so there are no numbers to show."
        return [Section("Metrics", (note,)), settings_section(record)]
    sections = [
        metrics_section(record),
        matrix_section(record),
        curves_section(record),
        task_section(record),
        gate_section(record),
        published_section(record) if against == "published" else None,
        cost_section(record),
        settings_section(record),
    ]
    return [section for section in sections if section is not None]


def compare_runs(runs: Sequence[str | os.PathLike[str] | RunRecord], labels: Sequence[str] | None = None) -> str:
    """Tables of several methods and seeds: mean and standard deviation over seeds, as Markdown.

    Args:
        runs: workdirs or records, over the same tasks in the same order.
        labels: one per run; runs with the same label are seeds of one line. Default: the method's name.

    Returns:
        For each scoring mode that every run has: ACC, MAA, BWT and mean right after training, then the accuracy per task
        right after training and at the end. Runs that have not finished are named and left out.

    Raises:
        UserError: "compare: no runs given ..."; "compare: <n> labels for <m> runs"
        UserError: "compare: runs differ in their tasks: ..."
        UserError: "compare: <label> has seed <s> <n> times; ..."
    """
    records = [run if isinstance(run, RunRecord) else load_run(run) for run in runs]
    _check_comparable(records, labels)
    names = list(labels) if labels is not None else [record.method for record in records]
    finished = [(name, record) for name, record in zip(names, records) if record.finished]
    unfinished = [
        f"{name} seed {record.seed} (stage {record.stages} of {len(record.tasks)})"
        for name, record in zip(names, records)
        if not record.finished
    ]
    parts = [f"Not finished, left out: {'; '.join(unfinished)}."] if unfinished else []
    if not finished:
        return "\n\n".join((*parts, "No finished run to compare.")) + "\n"
    groups: dict[str, list[RunRecord]] = {}
    for name, record in finished:
        groups.setdefault(name, []).append(record)
    for mode in shared_modes([record for _, record in finished]):
        parts += [
            _metric_table(groups, mode),
            _task_table(groups, mode, "right after training", RunRecord.right_after),
            _task_table(groups, mode, "at the end", RunRecord.final),
        ]
    parts.append("Mean ± sample standard deviation over seeds; no deviation for a single seed.")
    return "\n\n".join(parts) + "\n"


def _check_comparable(records: Sequence[RunRecord], labels: Sequence[str] | None) -> None:
    if not records:
        raise UserError("compare: no runs given; give the workdirs of at least one run")
    if labels is not None and len(labels) != len(records):
        raise UserError(f"compare: {len(labels)} labels for {len(records)} runs; give one label per run, or none")
    orders = {record.tasks for record in records}
    if len(orders) > 1:
        shown = " / ".join(", ".join(order) for order in sorted(orders))
        raise UserError(f"compare: runs differ in their tasks: {shown}; compare only runs over the same tasks in the same order")
    benchmarks = {record.benchmark for record in records}
    if len(benchmarks) > 1:
        raise UserError(f"compare: runs differ in their benchmark: {', '.join(sorted(benchmarks))}; compare them separately")
    keys = [(label, record.seed) for label, record in zip(labels or [record.method for record in records], records)]
    for label, seed in keys:
        if keys.count((label, seed)) > 1:
            count = keys.count((label, seed))
            raise UserError(f"compare: {label} has seed {seed} {count} times; give labels that tell different settings apart")


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, "54.37 ± 0.93"; the mean alone for one value, a dash where one is absent."""
    if any(value is None for value in values):
        return ABSENT
    deviation = standard_deviation(values)
    return number(mean(values)) + (f" ± {number(deviation)}" if deviation is not None else "")


def _metric_table(groups: dict[str, list[RunRecord]], mode: str) -> str:
    rows = []
    for name, records in groups.items():
        found = [record.metrics(mode) for record in records]
        columns = [[getattr(one, field) for one in found] for field, _ in _COMPARED]
        rows.append((name, str(len(records)), *map(spread, columns)))
    table = Table(("method", "seeds", *(title for _, title in _COMPARED)), tuple(rows))
    return f"Metrics, {mode} scoring (%)\n\n{markdown_table(table)}"


def _task_table(groups: dict[str, list[RunRecord]], mode: str, when: str, pick: Callable[[RunRecord, str], list[float]]) -> str:
    tasks = next(iter(groups.values()))[0].tasks
    rows = []
    for name, records in groups.items():
        picked = [pick(record, mode) for record in records]
        rows.append((name, *(spread(column) for column in zip(*picked))))
    return f"Accuracy per task {when}, {mode} scoring (%)\n\n{markdown_table(Table(('method', *tasks), tuple(rows)))}"
