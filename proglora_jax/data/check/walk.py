"""Walks a whole data root before any accelerator is used, through the readers and decoders that training uses."""

from __future__ import annotations

import os
from collections.abc import Sequence

from proglora_jax.data.check.counts import COUNT_MODES, expected_counts
from proglora_jax.data.check.fill import Fill, fill_folder, wanted_images
from proglora_jax.data.check.findings import BY_BUCKET, BY_LENGTH, IN_ORDER, Findings, TaskRow
from proglora_jax.data.check.images import IMAGE_KINDS, ImageState, ImageUses, look_at_images
from proglora_jax.data.check.lengths import Batching, Sizes
from proglora_jax.data.check.progress import progress
from proglora_jax.data.check.records import RecordChecker, ReferenceCheck, SeenFile, leaked_questions, shared_images
from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import FOLDERS, REDUCED, find_set, set_names
from proglora_jax.data.scans import record_name
from proglora_jax.data.tasks import load_task, task_order
from proglora_jax.data.tokens import Encoder

# What content hashes say of a text-only record: no picture has this one, it does not fit into 64 bits.
_NO_PICTURE = 1 << 64
_Walked = tuple[TaskRow, SeenFile, SeenFile]


def check_data(
    root: str,
    tasks: str | Sequence[str] = "coin",
    instruction_sets: Sequence[str] = ("Original",),
    *,
    encoder: Encoder | None = None,
    references: ReferenceCheck | None = None,
    counts: str = "published",
    workers: int = 0,
    fill: Fill | None = None,
    batching: Batching = Batching(),
) -> Findings:
    """Checks all records and images of some tasks.

    Args:
        root: data root, as for `load_task`.
        tasks: a named order, or task names.
        instruction_sets: which files; images that several share are decoded once.
        encoder: how text becomes tokens; None leaves lengths unchecked.
        references: finds questions that could not be scored (`evaluation.evaluator.reference_problems`); None leaves them unchecked.
        counts: "published" compares the number of records with the benchmark's (not of reduced sets), "any" does not.
        workers: threads that decode; 0 for one per core.
        fill: a folder to put the whole images into, as runs will ask for them.
        batching: how batches are made whose padding is told; with an encoder.

    Returns:
        The findings; damage in the data is never raised.

    Raises:
        UserError: "<root>: no such folder ...", "--workers -1: ...", or for an unknown task, set or mode.
    """
    names = task_order(tasks)
    _check_arguments(root, instruction_sets, counts, workers)
    findings, uses = Findings(), ImageUses()
    checker = RecordChecker(findings, uses, encoder, references)
    expected = expected_counts(root, counts)
    walked: list[_Walked] = []

    # ---- records
    with progress("records", 2 * len(names) * len(instruction_sets), "files") as tick:
        for instruction_set in instruction_sets:
            known = {} if find_set(instruction_set) in REDUCED else expected
            for name in names:
                walked.append(_walk_task(checker, root, name, instruction_set, known.get(name, (None, None)), tick))

    # ---- images, each once
    with progress("images", len(uses.paths), "images") as tick:
        states = look_at_images(uses.paths, workers or _cores(), tick)
    findings.images = len(states)
    _report_images(findings, uses, states)

    if fill is not None:
        fill_folder(findings, fill, wanted_images(walked, uses, states), workers or _cores())

    # ---- what only shows when both are known
    for row, train, questions in walked:
        _check_together(findings, train, questions, states)
        _fill_row(findings, row, train, questions, states)
        if encoder is not None:
            _fill_lengths(row, train.usable, questions.usable, batching, encoder.max_length)
    if encoder is not None:
        lengths = (" ".join(str(top) for top in tops if top < encoder.max_length) for tops in (dict(batching.buckets), batching.prompts))
        padded = " and of prompts ".join(f"{listed} {encoder.max_length}".strip() for listed in lengths)
        findings.batching = (f"padding: share of the positions of batches of {batching.rows} rows, in CoIN's order, by bucket, and of "
                             f"prompts by length; padded lengths {padded}")
    return findings


def _check_arguments(root: str, instruction_sets: Sequence[str], counts: str, workers: int) -> None:
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; give the folder that holds playground/ and cl_dataset/")
    unknown = [name for name in instruction_sets if name not in set_names()]
    if unknown or not instruction_sets:
        raise UserError(f"--instruction-set {','.join(unknown)}: unknown; choose from {', '.join(FOLDERS)}, or all")
    if counts not in COUNT_MODES:
        raise UserError(f"--counts {counts}: choose one of {', '.join(COUNT_MODES)}")
    if workers < 0:
        raise UserError(f"--workers {workers}: must be 1 or more, or 0 for one per core")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _walk_task(checker: RecordChecker, root: str, name: str, instruction_set: str, expected, tick) -> _Walked:
    row = TaskRow(instruction_set, name)
    checker.findings.rows.append(row)
    try:
        data = load_task(root, name, instruction_set)
    except UserError as error:
        checker.findings.add("file", root, str(error), stops=True)
        row.problems["file"] += 1
        tick(2)
        return row, SeenFile(), SeenFile()
    if made := data.made_from:
        kept, count = (sum(made[part + end] for part in ("train", "questions")) for end in ("_kept", ""))
        remark = f"records made from {made['from']} by tools make-instructions"
        checker.findings.note(f"{name}, {instruction_set}", f"{remark} ({kept:,} more have no known instruction)", count - kept)
    before = len(checker.findings.problems)
    train = checker.check_train(data, row.train, expected[0])
    train.problems = checker.findings.problems[before:]
    tick(1)
    questions = checker.check_questions(data, row.questions, expected[1])
    tick(1)
    return row, train, questions


def _report_images(findings: Findings, uses: ImageUses, states: Sequence[ImageState]) -> None:
    for path, (file, position, id), count, state in zip(uses.paths, uses.first, uses.count, states):
        if state.kind:
            others = f" ({count - 1:,} more records name it)" if count > 1 else ""
            findings.add(state.kind, file, state.reason.rstrip(".") + others, position, id)
        for note in state.notes:
            findings.note("images", note, example=path)


def _check_together(findings: Findings, train: SeenFile, questions: SeenFile, states: Sequence[ImageState]) -> None:
    contents = [*(state.content for state in states), _NO_PICTURE]
    for index, owner in leaked_questions(train, questions, contents):
        seen = f"{train.path} {record_name(train.positions[owner], train.ids[owner])}"
        position, id = questions.positions[index], questions.ids[index]
        if questions.images[index] >= 0:
            findings.add("duplicate", questions.path, f"asks of the same picture what {seen} asks", position, id)
        else:  # ScienceQA makes them from patterns, so some are equal by chance
            findings.note(questions.path, "a text-only question that training has too", example=f"{record_name(position, id)} and {seen}")
    shared = shared_images(train, questions, contents)
    if shared:
        findings.note(questions.path, "a picture that the training file has too, with other questions or the same", shared)
    for index, size in questions.sizes.items():
        state = states[questions.images[index]] if questions.images[index] >= 0 else None
        if state is not None and state.size not in ((0, 0), size):
            example = f"{record_name(questions.positions[index], questions.ids[index])}: size {list(size)}, image {list(state.size)}"
            findings.note(questions.path, "a size that is not the image's", example=example)


def _fill_row(findings: Findings, row: TaskRow, train: SeenFile, questions: SeenFile, states: Sequence[ImageState]) -> None:
    """Counts a task's problems: those of its files, and those of every image that it uses."""
    used = {number for seen in (train, questions) for number in seen.images if number >= 0}
    row.images = len(used)
    row.problems.update(states[number].kind for number in used if states[number].kind)
    files = {questions.path, *questions.auxiliary} - {""}
    # Of the training file only its own ones: tasks may share it (Multitask/train.json).
    own = [*train.problems, *(problem for problem in findings.problems if problem.file in files)]
    row.problems.update(problem.kind for problem in own if problem.kind not in IMAGE_KINDS)


def _fill_lengths(row: TaskRow, train: Sizes, questions: Sizes, batching: Batching, most: int) -> None:
    row.train.mean, row.questions.mean = train.mean(), questions.mean()
    orders = ((IN_ORDER, "modality_length"), (BY_BUCKET, "bucket"))
    if train.lengths:
        row.train.padding = {name: 100.0 * train.training_padding(batching, most, grouping) for name, grouping in orders}
    if questions.lengths:
        row.questions.padding = {BY_LENGTH: 100.0 * questions.prompt_padding(batching, most)}
