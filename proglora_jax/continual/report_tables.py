"""The sections of a run's report: metrics, accuracy, gates, parameters, durations, settings."""

from __future__ import annotations

from collections.abc import Sequence

from proglora_jax.continual import report_figures
from proglora_jax.continual.report_page import Picture, Section, Table
from proglora_jax.continual.run_record import RunRecord
from proglora_jax.data.padding import Padding
from proglora_jax.evaluation.sequence import round_half_up
from proglora_jax.methods.registry import METHODS

ABSENT = "–"

# Endings of scoring modes, and what they say.
_OTHER_IMAGES = {
    "_pad": "coin_pad, clean_pad: the same with every image padded to a square, as in training, also where CoIN's scripts crop.",
    "_crop": "coin_crop, clean_crop: the same with images cropped where CoIN's scripts crop, not padded to a square as in training.",
}

METRIC_NAMES = (
    ("acc", "ACC (= MFN), mean accuracy at the end"),
    ("maa", "MAA, mean over stages of the mean so far"),
    ("bwt", "BWT, change since right after training"),
    ("fwt", "FWT, against training on each task alone"),
    ("new_acc", "New.ACC, mean right after training"),
    ("forgetting", "Forgetting, mean loss of the earlier tasks"),
)


def number(value: float | None, signed: bool = False, digits: int = 2) -> str:
    """A number with two decimals rounded half up, a true minus sign, and a dash where there is none."""
    if value is None:
        return ABSENT
    rounded = round_half_up(value, digits)
    text = f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def difference(one: float | None, other: float | None) -> str:
    """one - other with its sign; a dash where one of them is absent."""
    return ABSENT if one is None or other is None else number(one - other, signed=True)


def metrics_section(record: RunRecord) -> Section:
    """The metrics of the sequence in every scoring mode."""
    by_mode = [record.metrics(mode) for mode in record.modes]
    rows = [(name, *(number(getattr(found, field)) for found in by_mode)) for field, name in METRIC_NAMES]
    if not record.sequential:
        rows = [("mean accuracy", *rows[0][1:])]
    covered = f"over {record.stages} of {len(record.tasks)} stages" if record.sequential else "not a sequence of stages"
    notes = [f"All numbers in percent, {covered}; one run, seed {record.seed}."]
    if not record.finished:
        notes.append("The run is not finished: the metrics cover only what is scored and are not those of the whole run.")
    if record.sequential and not record.isolated:
        notes.append("FWT needs the accuracy of training on each task alone, which this run was not given.")
    return Section("Metrics", tuple(notes), tables=(Table(("metric", *_mode_heads(record)), tuple(rows)),))


def matrix_section(record: RunRecord) -> Section | None:
    """The accuracy matrix as heat maps and as tables; None for a run without a sequence."""
    if not record.sequential:
        return None
    pictures, tables = [], []
    for mode in record.modes:
        accuracy = [list(row or ()) for row in record.scoring[mode]]
        caption = f"Accuracy in percent, {mode} scoring: row = stage, column = task; outlined: the task just trained."
        png = report_figures.accuracy_matrix(record.tasks, accuracy, f"Accuracy after each stage, {mode} scoring")
        pictures.append(Picture(f"report_accuracy_{mode}.png", caption, png))
        rows = [
            (f"{stage + 1} {record.tasks[stage]}", *(number(value) for value in [*row, *[None] * (len(record.tasks) - len(row))]))
            for stage, row in enumerate(accuracy)
        ]
        tables.append(Table(("after training on", *record.tasks), tuple(rows), f"Accuracy matrix, {mode} scoring"))
    notes = ["coin: scored as CoIN's scripts do, defects included, comparable with published tables; clean: the same answers, "
             "sane parsing."]
    notes += [text for ending, text in _OTHER_IMAGES.items() if any(mode.endswith(ending) for mode in record.modes)]
    return Section("Accuracy matrix", tuple(notes), tuple(pictures), tuple(tables))


def curves_section(record: RunRecord) -> Section | None:
    """Accuracy of each task over the stages; None for a run without a sequence."""
    if not record.sequential:
        return None
    scoring = {mode: [list(row or ()) for row in record.scoring[mode]] for mode in record.modes}
    png = report_figures.accuracy_curves(record.tasks, scoring, "Accuracy over the stages")
    caption = "First panel: mean over the tasks seen so far; other panels: each task from its own stage on. "
    caption += f"Numbers: the last value, {record.modes[0]} scoring."
    return Section("Accuracy over the stages", pictures=(Picture("report_curves.png", caption, png),))


def task_section(record: RunRecord) -> Section:
    """Per task: right after training, at the end, and beside it what the task scores without the sequence."""
    head, columns = ["task"], []
    for mode in record.modes:
        right_after, final = record.right_after(mode), record.final(mode)
        if not record.sequential:
            head.append(f"accuracy, {mode}")
            columns.append([*map(number, final)])
            continue
        head += [f"right after, {mode}", f"at the end, {mode}", f"change, {mode}"]
        changes = [difference(last, first) for last, first in zip(final, right_after)]
        columns += [[*map(number, right_after)], [*map(number, final)], changes]
    for name, values in _beside(record):
        head.append(name)
        columns.append([number(values.get(task)) for task in record.tasks])
    rows = [
        (task, *(column[index] if index < len(column) else ABSENT for column in columns)) for index, task in enumerate(record.tasks)
    ]
    notes = [f"At the end means after stage {record.stages}."] if record.sequential else []
    return Section("Accuracy per task", tuple(notes), tables=(Table(tuple(head), tuple(rows)),))


def _beside(record: RunRecord) -> list[tuple[str, dict]]:
    alone = [("trained alone", dict(record.isolated))] if record.isolated else []
    return alone + [(name.replace("_", " "), dict(values)) for name, values in record.baselines.items()]


def gate_section(record: RunRecord) -> Section | None:
    """Mean gates after the last stage that has any; None if none were recorded."""
    stages = [stage for stage, rows in record.gates.items() if rows]
    if not stages:
        return None
    stage = max(stages)
    gates = {task: list(record.gates[stage][task]) for task in record.tasks if task in record.gates[stage]}
    method = METHODS.get(record.method)
    # What gates belong to where it is no task; counted from 0 as by `tools convert --block`.
    expert = method.gate_unit if method and not method.blocks_are_tasks else ""
    blocks = max(map(len, gates.values())) if expert else _used_blocks(gates, stage + 1)
    gates = {task: values[:blocks] for task, values in gates.items()}
    per_task = not expert and blocks == stage + 1
    named = lambda block: f"{block + 1}\n{record.tasks[block]}" if per_task else f"{expert}\n{block}" if expert else str(block + 1)
    labels = [named(block) for block in range(blocks)]
    own = [(row, record.tasks.index(task)) for row, task in enumerate(gates)] if per_task else []
    title = f"Mean gate after stage {stage + 1}"
    caption = f"{title}: row = task of the questions, column = {expert or 'block'}" + ("; outlined: the task's own block." if own else ".")
    png = report_figures.mean_gates(gates, labels, own, title, expert or "block")
    rows = [(task, *(number(value, digits=3) for value in [*values, *[None] * (blocks - len(values))])) for task, values in gates.items()]
    table = Table(("questions of", *(label.replace("\n", " ") for label in labels)), tuple(rows), "Mean gates")
    return Section("Gates", pictures=(Picture("report_gates.png", caption, png),), tables=(table,))


def _used_blocks(gates: dict[str, list[float]], expected: int) -> int:
    """Number of blocks to show: empty slots of the pool, which have gate 0 for every task, are left out."""
    blocks = max(map(len, gates.values()))
    while blocks > expected and not any(values[blocks - 1] for values in gates.values() if len(values) >= blocks):
        blocks -= 1
    return blocks


# Heads of a column, and what it counts in a record's `data`.
_ROWS = {"rows": "rows", "left out, unusable": "bad_records", "left out, no answer": "unsupervised", "cut short": "truncated",
         "with an empty answer": "empty_answers", "unreadable images, blank": "blank_images",
         "cut off, as far as they go": "cut_images"}  # fmt: skip


def cost_section(record: RunRecord) -> Section | None:
    """What trained in each stage, on how many rows, and how long it took."""
    tables = []
    if any(record.counts):
        groups = list(dict.fromkeys(group for counts in record.counts for group in counts or ()))
        rows = []
        for stage, counts in enumerate(record.counts):
            numbers = [f"{(counts or {}).get(group, 0):,}" if counts else ABSENT for group in groups]
            total = f"{sum(counts.values()):,}" if counts else ABSENT
            rows.append((_stage_name(record, stage), *numbers, total))
        tables.append(Table(("stage", *groups, "total"), tuple(rows), "Trainable parameters"))
    if any(record.data):
        # Of what may be wrong with records, what is wrong with none is not told.
        heads = {head: name for head, name in _ROWS.items() if name == "rows" or any((read or {}).get(name) for read in record.data)}
        rows = [(_stage_name(record, stage), *(f"{read[name]:,}" if read and name in read else ABSENT for name in heads.values()))
                for stage, read in enumerate(record.data)]  # fmt: skip
        tables.append(Table(("stage", *heads), tuple(rows), "Training rows of the stage's own tasks"))
    tables += _padding_tables(record)
    for counts, head, title in (
        (record.blank_images, "unreadable images, blank", "Images without which questions were asked"),
        (record.cut_images, "cut off, as far as they go", "Images of which questions saw a part"),
    ):
        rows = [(_stage_name(record, stage), task, f"{count:,}") for stage, found in enumerate(counts)
                for task, count in (found or {}).items()]  # fmt: skip
        if rows:
            tables.append(Table(("stage", "questions of", head), tuple(rows), title))
    if any(record.seconds):
        rows, sums = [], {"train": 0.0, "evaluate": 0.0}
        for stage, seconds in enumerate(record.seconds):
            rows.append((_stage_name(record, stage), *(duration((seconds or {}).get(part)) for part in sums)))
            sums = {part: total + ((seconds or {}).get(part) or 0.0) for part, total in sums.items()}
        rows.append(("total", *map(duration, sums.values())))
        tables.append(Table(("stage", "training", "evaluation"), tuple(rows), "Wall-clock time"))
    return Section("Parameters and durations", tables=tuple(tables)) if tables else None


def _padding_tables(record: RunRecord) -> list[Table]:
    """What of the batches was padding: of training by stage, of prompts by task as it was asked last."""
    trained = [(stage, Padding.from_json(read)) for stage, read in enumerate(record.data)]
    rows = [(_stage_name(record, stage), f"{padding.positions:,}", _percent(padding), _by_length(padding))
            for stage, padding in trained if padding]  # fmt: skip
    asked = {task: Padding.from_json(found) for prompts in record.prompts for task, found in (prompts or {}).items()}
    prompts = [(task, f"{padding.positions:,}", _percent(padding), _by_length(padding)) for task, padding in asked.items() if padding]
    head = ("positions", "padding, %", "batches by padded length")
    return [Table((first, *head), tuple(found), title) for first, found, title in (
        ("stage", rows, "Positions trained on, replayed rows included"), ("questions of", prompts, "Positions of the prompts")) if found]


def _percent(padding: Padding) -> str:
    return number(100.0 * padding.share, digits=1)


def _by_length(padding: Padding) -> str:
    return ", ".join(f"{length}: {count:,}" for length, count in padding.batches.items())


def _stage_name(record: RunRecord, stage: int) -> str:
    return f"{stage + 1} {record.tasks[stage]}" if stage < len(record.tasks) else str(stage + 1)


def duration(seconds: float | None) -> str:
    """Seconds as "42 s", "3 min 07 s" or "2 h 05 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{number(seconds, digits=1)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def settings_section(record: RunRecord) -> Section:
    """How the run was made: settings, versions and the command."""
    rows = [("method", record.method), ("seed", str(record.seed)), ("tasks", ", ".join(record.tasks))]
    rows += [(name, text) for name, text in (("benchmark", record.benchmark), ("config hash", record.config_hash)) if text]
    rows += [(str(name), str(value)) for name, value in record.settings.items()]
    tables = [Table(("setting", "value"), tuple(rows), words=True)]
    if record.versions:
        versions = tuple((str(name), str(version)) for name, version in sorted(record.versions.items()))
        tables.append(Table(("package", "version"), versions, "Versions", words=True))
    notes = ("The command that made the run stands below the tables.",) if record.command else ()
    return Section("Settings", notes, tables=tuple(tables), literal=record.command)


def _mode_heads(record: RunRecord) -> Sequence[str]:
    return [f"{mode} scoring" for mode in record.modes]
