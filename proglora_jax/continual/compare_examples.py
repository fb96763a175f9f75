"""Answers of all methods side by side on a few questions of each task, after the last stage (as the papers' Figures 4, 7 and 8)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from proglora_jax.checkpoints.integrity import read_json
from proglora_jax.continual.answering import read_answers
from proglora_jax.continual.compare_figures import pictures_in_a_row
from proglora_jax.continual.report_page import Picture, Section, Table
from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Question
from proglora_jax.data.tasks import load_task, select_subset

PER_TASK = 3


class Answered(NamedTuple):
    """Answers of one run to a task's questions: text by index of the question, and how right each is, 0 to 1."""

    texts: Mapping[int, str]
    right: Sequence[float]


def example_sections(workdirs: Mapping[str, Path], tasks: Sequence[str], mode: str) -> list[Section]:
    """One section per task that every run has answered, with pictures, questions, references and each method's answers.

    Args:
        workdirs: method -> a finished run.
        tasks: names of tasks.
        mode: scoring mode that says what is right.

    Returns:
        Sections; none where the runs left no answers or their data is not there.
    """
    sections = []
    for task in tasks:
        answered = {method: found for method, folder in workdirs.items() if (found := answers_of(folder, task, mode)) is not None}
        questions = _questions(next(iter(workdirs.values())), task) if len(answered) == len(workdirs) else []
        if questions and all(len(found.right) == len(questions) for found in answered.values()):
            sections.append(_section(task, questions, answered, mode))
    return sections


def answers_of(workdir: Path, task: str, mode: str) -> Answered | None:
    """What a run answered to a task's questions in the last stage that was asked them; None where it was not."""
    stages = sorted((workdir / "stages").glob(f"*/scores/{task}.json"))
    if not stages:
        return None
    try:
        right = read_json(stages[-1], checksum=True)["correct"][mode]
    except (UserError, KeyError, TypeError):
        return None
    rows = read_answers(stages[-1].parents[1] / "answers" / f"{task}.jsonl")
    return Answered({index: row["text"] for index, row in rows.items()}, right) if len(rows) == len(right) else None


def choose(right: Sequence[Sequence[float]], count: int) -> list[int]:
    """The questions on which methods differ most: those where the most pairs of methods disagree, the first ones among equals.

    Args:
        right: [methods][questions] how right each answer is.
        count: how many are wanted.

    Returns:
        Indices in rising order.
    """
    disagreement = [sum(abs(a - b) for a in column for b in column) for column in zip(*right)]
    best = sorted(range(len(disagreement)), key=lambda index: (-round(disagreement[index], 6), index))
    return sorted(best[:count])


def _questions(workdir: Path, task: str) -> list[Question]:
    """The questions of a task as the run was asked them; [] where its data is not there any more."""
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]
        data, evaluate = config["data"], config["evaluate"]
        questions = load_task(data["root"], task, data["instruction_set"]).questions
        size = 0 if task in evaluate.get("subset_except", ()) else evaluate["subset_size"]
        return select_subset(questions, size, evaluate["subset_seed"])
    except (UserError, OSError, ValueError, KeyError):
        return []


def _section(task: str, questions: Sequence[Question], answered: Mapping[str, Answered], mode: str) -> Section:
    chosen = choose([found.right for found in answered.values()], PER_TASK)
    letters = [chr(ord("A") + place) for place in range(len(chosen))]
    rows = [
        ("question", *(questions[index].text for index in chosen)),
        ("reference", *(questions[index].answer for index in chosen)),
        *((method, *(f"{_mark(found.right[index])} {found.texts[index] or '(nothing)'}" for index in chosen))
          for method, found in answered.items()),
    ]
    heads = [f"{letter}: {questions[index].id}" for letter, index in zip(letters, chosen)]
    tables = (Table(("", *heads), tuple(rows), f"✓ right, ✗ wrong, a number in between: partly right, {mode} scoring", words=True),)
    png = pictures_in_a_row([questions[index].image for index in chosen], letters)
    picture = Picture(f"compare_examples_{task.lower()}.png", f"Pictures of the questions {', '.join(letters)} of {task}.", png)
    return Section(f"Answers: {task}", pictures=(picture,), tables=tables)


def _mark(right: float) -> str:
    return "✓" if right >= 0.995 else "✗" if right <= 0.005 else f"{right:.1f}"
