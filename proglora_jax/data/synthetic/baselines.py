"""What can be scored on the embedded benchmark without looking at a picture: majority answers, overall and per question."""

from __future__ import annotations

import json
import os
from collections import Counter

from proglora_jax.data.synthetic import layout
from proglora_jax.data.synthetic.benchmark import MANIFEST


def baselines(root: str) -> dict[str, tuple[float, float]]:
    """Two blind baselines a task, printed as a table.

    Args:
        root: a benchmark that `write_benchmark` wrote.

    Returns:
        {task: (accuracy of the most frequent training answer, accuracy of the most frequent training answer to the very
        same prompt)}, both in percent; exact match of answers, a final period aside.
    """
    with open(os.path.join(root, MANIFEST), encoding="utf-8") as file:
        tasks = json.load(file)["tasks"]
    result = {}
    print(f"{'task':<12}{'majority':>10}{'question only':>16}")
    for task in tasks:
        result[task] = _blind(root, task)
        print(f"{task:<12}{result[task][0]:>9.1f}%{result[task][1]:>15.1f}%")
    return result


def _blind(root: str, task: str) -> tuple[float, float]:
    """(majority, question-only majority) of one task, in percent."""
    folder = os.path.join(root, layout.INSTRUCTION_FOLDERS["Original"], task)
    with open(os.path.join(folder, "train.json"), encoding="utf-8") as file:
        train = json.load(file)
    with open(os.path.join(folder, f"{layout.TASKS[task].split}.json"), encoding="utf-8") as file:
        test = json.load(file)
    overall: Counter = Counter()
    by_question: dict[str, Counter] = {}
    for record in train:
        values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            overall[answer.rstrip(".")] += 1
            by_question.setdefault(question.split("\nAnswer ")[0].rpartition(": ")[2], Counter())[answer.rstrip(".")] += 1
    common = overall.most_common(1)[0][0]
    hits = blind = 0
    for record in test:
        answer = record.get("answer", record.get("answer_bbox"))
        question = record["text"].split("\nAnswer ")[0].rpartition(": ")[2]
        hits += answer == common
        blind += answer == (by_question[question].most_common(1)[0][0] if question in by_question else common)
    return 100 * hits / len(test), 100 * blind / len(test)
