"""The section of a report that sets a run beside the papers' numbers."""

from __future__ import annotations

from collections.abc import Sequence

from proglora_jax.continual.report_page import Section, Table
from proglora_jax.continual.report_tables import METRIC_NAMES, difference, number
from proglora_jax.continual.run_record import RunRecord
from proglora_jax.evaluation import published
from proglora_jax.evaluation.sequence import SequenceMetrics, metrics

TITLE = "Comparison with the papers"
_PRINTED = ("acc", "maa", "bwt", "fwt")


def published_section(record: RunRecord) -> Section:
    """A run against the published row of its method, and within the published table.

    Args:
        record: the run; compared in its headline scoring mode, with the row that its config names or the main row of its method.

    Returns:
        Notes on what may be compared, metrics and per-task tables; only notes where nothing can be compared.
    """
    named = record.settings.get("published row", "")
    row = published.ROWS.get(named) or next((row for row in published.ROWS.values() if _fits(row, record)), None)
    if row is not None and not _same_tasks(record.tasks, row.order):
        row = None
    notes = [
        f"Published numbers are as printed ({row.backbone if row else published.LLAVA_7B}, CoIN); this run is scored in the "
        f"{record.modes[0]} mode. "
        "LoRA, MoELoRA, zero-shot and multi-task were scored on random subsets of 4,000 questions that are not published."
    ]
    if record.benchmark and record.benchmark.lower() != "coin":
        notes.append(f"This run is on {record.benchmark}, not on CoIN with the papers' model: compare the pattern, not the levels.")
    if not _same_tasks(record.tasks, published.COIN_ORDER) and row is None:
        notes.append("The tasks or their order are not those of a published table, so there is nothing to compare with.")
        return Section(TITLE, tuple(notes))
    tables = []
    if row is None:
        notes.append(f"The papers print no row for the method {record.method}.")
    else:
        tables, more = _against_row(record, row)
        notes += more
    if record.finished and _same_tasks(record.tasks, published.COIN_ORDER):
        tables.append(_league(record))
    return Section(TITLE, tuple(notes), tables=tuple(tables))


def _fits(row: published.PublishedRow, record: RunRecord) -> bool:
    """Whether a row is the one of the run's method: the main setting, or another task order."""
    plain = not row.variant or row.order != published.COIN_ORDER
    return plain and row.backbone == published.LLAVA_7B and row.method == record.method and _same_tasks(record.tasks, row.order)


def _same_tasks(one: Sequence[str], other: Sequence[str]) -> bool:
    return [_bare(name) for name in one] == [_bare(name) for name in other]


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _against_row(record: RunRecord, row: published.PublishedRow) -> tuple[list[Table], list[str]]:
    """Metrics and per-task tables against one published row, and the notes that belong to them."""
    mode, stages = record.modes[0], record.stages
    notes = []
    matrix = published.MATRICES.get(row.method) if row is published.main_row(row.method) else None
    theirs: SequenceMetrics | published.PublishedRow = row
    if not record.finished:
        if matrix is None:
            notes.append("The run is not finished and the papers print no matrix of this method, so metrics are not compared.")
            return [_per_task(record, row, None)] if row.right_after else [], notes
        notes.append(f"The run is not finished: the papers' metrics are computed from the first {stages} stages of their matrix.")
        theirs = metrics(matrix[:stages])
    else:
        notes += [f"The published {_upper(metric)} is doubtful: {why}." for metric, why in row.doubts.items()]
    ours = record.metrics(mode)
    if row.variant:
        notes.append(f"Compared with the variant \"{row.variant}\" of {row.method}.")
    rows = []
    for field, name in METRIC_NAMES:
        here, there = getattr(ours, field), getattr(theirs, field, None)
        if there is not None:
            rows.append((name, number(here), number(there), difference(here, there)))
    tables = [Table(("metric", "this run", "printed" if theirs is row else "from their matrix", "difference"), tuple(rows))]
    if row.right_after:
        tables.append(_per_task(record, row, matrix))
    return tables, notes


def _per_task(record: RunRecord, row: published.PublishedRow, matrix: Sequence[Sequence[float]] | None) -> Table:
    right_after, final = record.right_after(record.modes[0]), record.final(record.modes[0])
    # In the middle of the sequence the papers' last row says nothing; the matrix, where printed, has the row of that stage.
    their_final = (row.final or row.right_after) if record.finished else matrix[record.stages - 1] if matrix else None
    lines = []
    for index, task in enumerate(record.tasks):
        here = (right_after[index], final[index]) if index < len(final) else (None, None)
        there = (_at(row.right_after, index), _at(their_final, index))
        first = (number(here[0]), number(there[0]), difference(here[0], there[0]))
        last = (number(here[1]), number(there[1]), difference(here[1], there[1]))
        lines.append((task, *first, *last))
    head = ("task", "right after", "papers", "difference", "at the end", "papers", "difference")
    return Table(head, tuple(lines), f"Per task, against {row.method} in the {published.SOURCES[row.source]} paper")


def _at(values: Sequence[float] | None, index: int) -> float | None:
    return values[index] if values is not None and index < len(values) else None


def _league(record: RunRecord) -> Table:
    """The papers' main table with this run as its last line."""
    ours = record.metrics(record.modes[0])
    rows = [
        (row.method, published.SOURCES[row.source], *(_printed(row, field) for field in _PRINTED))
        for row in published.MAIN_ROWS
    ]
    rows.append((record.method, f"this run, seed {record.seed}", *(number(getattr(ours, field)) for field in _PRINTED)))
    caption = "Published methods; an asterisk marks a number that does not follow from the paper's own accuracies."
    return Table(("method", "paper", *map(_upper, _PRINTED)), tuple(rows), caption)


def _printed(row: published.PublishedRow, field: str) -> str:
    return number(getattr(row, field)) + ("*" if field in row.doubts else "")


def _upper(metric: str) -> str:
    return {"acc": "ACC (= MFN)"}.get(metric, metric.upper())
