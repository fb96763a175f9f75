"""The files of one instruction set made from those of another: `tools make-instructions`, for who has only the Original files.

Only the instruction in the first human turn, or in the question, is exchanged; all else stays as it was read. A record without an
instruction of the set that the files are in stays as it is and is counted. re_templated.json in the folder says what was done.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import MADE, task_of
from proglora_jax.data.schema import IMAGE_PLACEHOLDER, Question, read_json
from proglora_jax.data.tasks import TaskData, load_task, task_order
from proglora_jax.data.templates import INSTRUCTION_SETS, INSTRUCTIONS, re_template

_LINE = f"{IMAGE_PLACEHOLDER}\n"


def target_folder(root: str, target: str, source: str, tasks: Sequence[str]) -> str:
    """Where the files of the new set belong: beside the folder of the old one.

    Raises:
        UserError: "--set <name>: choose one of ...", "--set <name>: is what the files are made from", or as `load_task`.
    """
    for flag, name in (("--set", target), ("--from", source)):
        if name not in INSTRUCTION_SETS:
            raise UserError(f"{flag} {name}: choose one of {', '.join(INSTRUCTION_SETS)}")
    if target == source:
        raise UserError(f"--set {target}: is what the files are made from; choose another set")
    folders = [load_task(root, task, source).folder for task in task_order(tasks)]
    return os.path.join(os.path.dirname(os.path.dirname(folders[0])), f"Instructions_{target}")


def write_set(
    root: str, folder: pathlib.Path, target: str, source: str, tasks: str | Sequence[str], seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Writes the files of a set.

    Args:
        root: data root with the files of `source`.
        folder: to write to.
        target: the set whose instructions are put in.
        source: the set whose instructions are there now.
        tasks: a named order, or task names.
        seed: of the choice among several instructions.
        log: takes a line for each task.

    Raises:
        UserError: as `load_task` and `read_json`; "<file>: none of <n> records has an instruction of <source> in it; ..."
    """
    made: dict[str, Any] = {}
    for name in task_order(tasks):
        data, found = load_task(root, name, source), {"from": source, "seed": seed}
        (folder / data.task.folder).mkdir()
        asked = data.task.eval_file
        for part, path, file in (("train", data.train_path, "train.json"), ("questions", data.path(asked), asked)):
            records = _records(data, path)
            kept = [_exchange(record, position, name, target, source, seed) for position, record in enumerate(records)].count(False)
            if records and kept == len(records):
                raise UserError(
                    f"{path}: none of {kept} records has an instruction of {source} in it; name with --from the set that they are of")
            with open(folder / data.task.folder / file, "w", encoding="utf-8") as out:
                json.dump(records, out, ensure_ascii=False, indent=1)
            found |= {part: len(records), f"{part}_kept": kept}
        made[name] = found
        why = f" (no instruction of {source} in them)" if found["train_kept"] or found["questions_kept"] else ""
        log(f"{name}: {found['train']:,} training records and {found['questions']:,} questions, {found['train_kept']:,} and "
            f"{found['questions_kept']:,} of them as they were{why}")
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _records(data: TaskData, path: str) -> list[Any]:
    """The records of a file that are the task's, as they were read."""
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: must hold a JSON array of records; download it again")
    shared = os.path.dirname(path) != data.folder
    return [record for record in records if not shared or task_of(record) == data.task.name]


def _exchange(record: Any, position: int, task: str, target: str, source: str, seed: int) -> bool:
    """Puts another instruction into a record; False where there is none to exchange."""
    if not isinstance(record, dict):
        return False
    turns = record.get("conversations")
    turns = turns if isinstance(turns, list) else []
    holder, key = (record, "text") if "text" in record else (next((turn for turn in turns if isinstance(turn, dict)), {}), "value")
    text = holder.get(key)
    if not isinstance(text, str) or holder.get("from", "human") not in ("human", "user"):
        return False
    line = _LINE if text.startswith(_LINE) else ""
    body = text.removeprefix(line)
    stated = body.partition(": ")[0] if task == "Grounding" else body.rpartition("\n")[2].strip().removesuffix(".")
    if stated not in INSTRUCTIONS[source][task]:
        return False
    identity = str(record.get("question_id", record.get("id", position)))
    holder[key] = line + re_template(Question(identity, task, None, body, ""), target, seed).text
    return True
