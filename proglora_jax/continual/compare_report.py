"""A comparison of methods over seeds: runs what is missing, and writes compare.md, compare.html and their figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from proglora_jax.continual import compare_jobs
from proglora_jax.continual.compare_costs import cost_of
from proglora_jax.continual.compare_examples import example_sections
from proglora_jax.continual.compare_plan import PlannedRun, plan
from proglora_jax.continual.compare_tables import curves_section, gates_section, order_section, results_section
from proglora_jax.continual.report_page import Section, Table, to_html, to_markdown
from proglora_jax.continual.run_record import RunRecord, load_run, write_atomically
from proglora_jax.data.errors import UserError


def default_out(named: str) -> Path:
    """runs/compare_<config>_<words of its argument>."""
    path, _, argument = named.partition(":")
    words = [word.strip().replace("=", "-") for word in argument.split(",") if word.strip()]
    return Path("runs", "_".join(["compare", Path(path).stem, *words]))


def run_comparison(
    named: str, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int], out: Path | None = None, jobs: int = 1,
    isolated: bool = False, command: str = "", job: Sequence[str] = compare_jobs.COMMAND,
) -> int:
    """Runs methods x seeds as far as they are not there, and writes their comparison.

    Args:
        named, overrides, methods, seeds, isolated: as for `compare_plan.plan`.
        out: folder of runs and report; default: `default_out`.
        jobs: runs at the same time.
        command: what asked for it, for the report.
        job: the main job; another one for tests.

    Returns:
        Exit status: 0, 1 where a run failed, 128 + the number of the signal after a stop.

    Raises:
        UserError: for what the user can mend before anything runs, and where no run has finished.
    """
    out = out or default_out(named)
    runs = plan(named, overrides, methods, seeds, out, isolated)
    say = lambda line: print(line, flush=True)
    say(f"{len(runs)} runs below {out}: methods {', '.join(methods)}; seeds {', '.join(map(str, seeds))}"
        + (f"; {sum(bool(run.families) for run in runs)} of the runs train each task alone" if isolated else ""))
    failed, stopped = compare_jobs.run_all(runs, jobs, say, job)
    for path in write_comparison(runs, out, command, failed)[:2]:
        say(path)
    if stopped:
        say("stopped; run the same command to go on")
    return 128 + stopped if stopped else int(bool(failed))


def write_comparison(runs: Sequence[PlannedRun], out: Path, command: str = "", failed: Mapping[str, str] | None = None) -> list[str]:
    """Writes compare.md, the self-contained compare.html, and the figures; returns the paths, these two first.

    Args:
        runs: from `compare_plan.plan`; those that are not finished are named and left out.
        out: folder to write to.
        command: what made the comparison.
        failed: {label: sentence} of runs that failed.
    """
    sections = comparison_sections(runs, command, failed or {})
    title = "Comparison of methods" + (f" on {sections.benchmark}" if sections.benchmark else "")
    pictures = [picture for section in sections.all for picture in section.pictures]
    drawn = [write_atomically(os.path.join(out, picture.file), picture.png) for picture in pictures]
    texts = (("compare.md", to_markdown(title, sections.all)), ("compare.html", to_html(title, sections.all)))
    return [write_atomically(os.path.join(out, name), text.encode()) for name, text in texts] + drawn


@dataclasses.dataclass(frozen=True)
class Sections:
    """A comparison as data: its sections, and the name of the benchmark."""

    all: tuple[Section, ...]
    benchmark: str = ""


def comparison_sections(runs: Sequence[PlannedRun], command: str, failed: Mapping[str, str]) -> Sections:
    """The sections of a comparison; without a finished run only what is missing and the command."""
    finished = {run: load_run(run.workdir) for run in runs if run.finished}
    groups: dict[str, list[RunRecord]] = {}
    folders: dict[str, list[Path]] = {}
    for run, record in finished.items():
        if not run.families:
            groups.setdefault(run.method, []).append(_with_isolated(run, record, finished))
            folders.setdefault(run.method, []).append(run.workdir)
    ending = [_missing_section(runs, finished, failed), Section("Command", literal=command) if command else None]
    if not groups:
        return Sections(tuple(section for section in ending if section is not None))
    first = next(iter(groups.values()))[0]
    costs = {name: [cost_of(*pair) for pair in zip(records, folders[name])] for name, records in groups.items()}
    sections = [
        results_section(groups, costs),
        curves_section(groups),
        order_section(groups),
        gates_section(groups),
        *example_sections({name: paths[0] for name, paths in folders.items()}, first.tasks, first.modes[0]),
        *ending,
    ]
    return Sections(tuple(section for section in sections if section is not None), first.benchmark)


def _with_isolated(run: PlannedRun, record: RunRecord, finished: Mapping[PlannedRun, RunRecord]) -> RunRecord:
    """The record with the accuracy of each task alone, from the family's run where that is finished."""
    for other, alone in finished.items():
        if run.method in other.families and run.seed == other.seed:
            return dataclasses.replace(record, isolated=alone.isolated)
    return record


def _missing_section(runs: Sequence[PlannedRun], finished: Mapping, failed: Mapping[str, str]) -> Section | None:
    """What the tables do not have, and why."""
    rows = []
    for run in (run for run in runs if run not in finished):
        try:
            record = load_run(run.workdir)
            reached = f"{record.stages} of {len(record.tasks)} stages are scored"
        except UserError:
            reached = "no stage is scored"
        rows.append((run.label, failed.get(run.label) or f"not finished: {reached}"))
    return Section("Runs that are not in the tables", tables=(Table(("run", "why"), tuple(rows), words=True),)) if rows else None
