"""Asks a stage's model the questions of a task, keeps every raw answer, and scores them; goes on where a killed run stopped.

    answers/<Task>.partial.jsonl   a header, then one line per answered question, each with a checksum; appended batch by batch;
                                   "blank" says that the question's image could not be read, "cut" that it is cut off; "again" with how
                                   many tokens an answer was asked for that is longer than config.evaluate.first_new_tokens
    answers/<Task>.jsonl           the same without "again", complete, in the order of the questions
    scores/<Task>.json             accuracy in both modes, mean gates, how many images stood blank or were cut off, what of the prompts'
                                   batches was padding, and what was asked and how it was scored: the hashes of questions, references
                                   and answers, the rules of scoring

Where a task is asked a second time with images prepared in another way, that way follows its name (ImageNet_pad.jsonl).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proglora_jax.checkpoints.integrity import atomic_write_json, read_json, sha256_of_file
from proglora_jax.continual.blank_images import KINDS, odd_questions
from proglora_jax.continual.row_split import late_rows
from proglora_jax.continual.session import Session, unasked
from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import CLState
from proglora_jax.data.batch import Batch
from proglora_jax.data.errors import UserError
from proglora_jax.data.image_groups import WORTH, GroupedBatches, group_by_image
from proglora_jax.data.images import ImageLoader
from proglora_jax.data.padding import Padding
from proglora_jax.data.pipeline import EvalBatches, eval_batches
from proglora_jax.data.schema import Question
from proglora_jax.data.tasks import TASKS
from proglora_jax.evaluation.evaluator import references, score_answers
from proglora_jax.training.console import Progress
from proglora_jax.training.loop import Stopped
from proglora_jax.training.processes import Round, from_chief
from proglora_jax.training.settings import Settings

# Of an answers' header. A run that goes on with another batch size, as it must after running out of memory, keeps its answers.
MUST_AGREE = ("task", "adapter", "questions", "max_new_tokens", "image_mode")
# Batches that the device computes while the answers of the one before are decoded and written.
IN_FLIGHT = 1


def evaluate_task(
    session: Session, state: CLState, digest: str, task: int, task_id: int, folder: Path, images: str = ""
) -> tuple[dict[str, Any], bool]:
    """Scores of one task under a state; finished work is read back, not repeated.

    Args:
        session: the session.
        state: parameters on the mesh.
        digest: hash of the stage's adapter; results of another one are not trusted.
        task: index of the task in the run.
        task_id: the task's id as the method sees it.
        folder: the stage's folder.
        images: "pad" or "crop", to ask once more in this way; "" asks as the config says.

    Returns:
        (the content of scores/<Task>.json, whether it was there already).

    Raises:
        Stopped: after a stop signal; the answers so far are kept.
        UserError: for questions or images that cannot be read.
    """
    name = session.tasks[task]
    path, answers = scores_file(folder, name, images), folder / "answers" / f"{_file_name(name, images)}.jsonl"
    questions, auxiliary = session.questions(name), session.data[name].auxiliary
    header = _header(session, digest, name, questions) | ({"image_mode": images} if images else {})
    options, others = session.score_options, unasked(session.data[name], session.settings, questions)
    asked = {field: header[field] for field in MUST_AGREE} | {
        "references": _hash([*references(TASKS[name].scorer, questions, auxiliary), *others]), "scoring": dataclasses.asdict(options)}
    known = from_chief(finished_scores(path, answers, asked) if session.chief else None)
    if known is not None:
        return known, True
    began = time.monotonic()
    entries, padding = _answers(session, state, header, task_id, questions, answers)
    texts = {index: row["text"] for index, row in entries.items()}
    result = score_answers(TASKS[name].scorer, texts, questions, auxiliary, options, others)
    result |= {
        "task": name, "asked": asked, "answers_sha256": sha256_of_file(answers) if session.chief else "",
        "gates": _mean_gates(entries), "seconds": time.monotonic() - began, "image_mode": header["image_mode"],
        "prompts": padding.to_json(),
    } | {f"{kind}_images": len({questions[index].image for index, row in entries.items() if row.get(kind)}) for kind in KINDS}
    if session.chief:
        atomic_write_json(path, result, checksum=True)
    return result, False


def finished_scores(path: Path, answers: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """A task's scores if they are there, intact, of this adapter and these questions and references, and of the answers beside them.

    Args:
        path: scores/<Task>.json.
        answers: answers/<Task>.jsonl.
        asked: what the header of the answers must say (MUST_AGREE), the hash of the references, and how they are scored; with other values
            the scores are made again, from the answers where only the last two changed.
    """
    try:
        known = read_json(path, checksum=True)
    except UserError:
        return None
    if known.get("asked") != dict(asked) or not answers.exists() or sha256_of_file(answers) != known.get("answers_sha256"):
        return None
    return known


def _header(session: Session, digest: str, name: str, questions: list[Question]) -> dict[str, Any]:
    """The first line of the answers' file: everything that an answer depends on, and the batch size, on which it does not.

    `shared_prefix` is added to it, on which it does not depend either.
    """
    evaluate = session.settings.evaluate
    cap = evaluate.max_new_tokens or TASKS[name].max_new_tokens
    asked = [(question.id, question.text, os.path.basename(question.image or "")) for question in questions]
    return {"task": name, "adapter": digest, "questions": _hash(asked), "max_new_tokens": cap, "batch_size": evaluate.batch_size,
            "image_mode": image_mode(session.settings, name)}


def image_mode(settings: Settings, name: str, chosen: str = "") -> str:
    """How the images of a task's questions are prepared, "pad" or "crop", by config.evaluate.image_mode or another choice."""
    return TASKS[name].coin_image_mode if (chosen or settings.evaluate.image_mode) == "coin" else "pad"


def other_images(settings: Settings, name: str) -> str:
    """How they are prepared when the task is asked a second time; "" where it is not, or would be asked the same again."""
    chosen = settings.evaluate.other_mode
    other = image_mode(settings, name, chosen) if chosen else ""
    return "" if other == image_mode(settings, name) else other


def scores_file(folder: Path, name: str, images: str = "") -> Path:
    """Where the scores of a task lie in a stage's folder; arguments as for `evaluate_task`."""
    return folder / "scores" / f"{_file_name(name, images)}.json"


def _file_name(name: str, images: str) -> str:
    return f"{name}_{images}" if images else name


def _answers(
    session: Session, state: CLState, header: dict[str, Any], task_id: int, questions: list[Question], path: Path
) -> tuple[dict[int, dict[str, Any]], Padding]:
    """(the lines of all questions by index, generated from where the partial file ends; what of the prompts' batches is padding).

    All questions are asked with room for a short answer; those that are still answering then, again with the cap and fewer at once.
    """
    evaluate, cap = session.settings.evaluate, header["max_new_tokens"]
    first = min(cap, evaluate.first_new_tokens or cap)
    loader, (part, parts) = session.eval_loader(header["image_mode"]), session.share
    batches_of = lambda asked, rows: eval_batches(
        asked, session.encoder, loader, batch_size=rows, task_id=task_id, lengths=evaluate.prompt_lengths, process_index=part,
        process_count=parts)
    batches = batches_of(questions, evaluate.batch_size)
    if evaluate.share_prefix != "off" and session.method.fixed_at_test:
        batches = group_by_image(batches, meshes.batch_ways(session.mesh), WORTH if evaluate.share_prefix == "auto" else 0.0)
    header, padding = header | {"shared_prefix": isinstance(batches, GroupedBatches)}, batches.padding()
    partial = path.with_suffix(".partial.jsonl")
    whole, entries = _kept(path, partial, header, len(questions), chief=session.chief)
    if whole:
        return entries, padding
    done = _done(batches, range(len(questions)), entries)
    entries = {index: entries[index] for n in range(done) for index in batches.members(n)}
    with _reopen(partial, header, entries) if session.chief else contextlib.nullcontext() as file:
        work = _Work(session, state, header["task"], questions, loader, entries, file)
        work.ask(f"evaluate {header['task']}", batches, range(len(questions)), done, first, cap)
        if again := [index for index in sorted(entries) if entries[index].get("again")]:
            longer = batches_of([questions[index] for index in again], late_rows(evaluate.batch_size, meshes.batch_ways(session.mesh)))
            done = _done(longer, again, {index for index in again if entries[index]["again"] == cap})
            work.ask(f"evaluate {header['task']}, longer answers", longer, again, done, cap, cap)
    if session.chief:
        whole = {index: {key: value for key, value in entries[index].items() if key != "again"} for index in sorted(entries)}
        _reopen(partial, header, whole).close()
        os.replace(partial, path)
    return entries, padding


def _done(batches: EvalBatches, numbers: Sequence[int], entries: Collection[int]) -> int:
    """How many batches, from the first on, have all their answers among `entries`; a batch's question n is `numbers[n]`."""
    count = 0
    while count < len(batches) and all(numbers[index] in entries for index in batches.members(count)):
        count += 1
    return count


@dataclasses.dataclass
class _Work:
    """Batches of questions of a task on their way through the device into `entries` and the partial file (process 0's)."""

    session: Session
    state: CLState
    name: str
    questions: list[Question]
    loader: ImageLoader
    entries: dict[int, dict[str, Any]]
    file: Any

    def ask(self, title: str, batches: EvalBatches, numbers: Sequence[int], start: int, tokens: int, cap: int) -> None:
        """Asks batches from `start` on, for answers of up to so many tokens; `title` is that of their progress.

        Raises:
            Stopped: after a stop signal; the answers so far are kept.
            UserError: for images that cannot be read; likewise.
        """
        prepared, told = batches.batches(start, self.session.settings.data.threads), Round(self.session.stop)
        waiting: collections.deque = collections.deque()
        count = sum(len(batches.members(number)) for number in range(start))

        def settle(most: int) -> None:
            """Writes answers until at most so many batches are being computed."""
            nonlocal count
            while len(waiting) > most:
                rows = _rows(self.session, self.questions, numbers, *waiting.popleft(), told)
                self._write(rows, tokens, cap)
                count += len(rows)
                progress.update(len(rows))

        with Progress(title, len(numbers), chief=self.session.chief) as progress:
            progress.update(count)
            for number in range(start, len(batches)):
                try:
                    batch = told.next(prepared, lambda number=number: batches.blank(number))
                except UserError:
                    settle(0)
                    raise
                generate = self.session.generator(tokens, by_image="slot" in batch)
                members = [numbers[index] for index in batches.members(number)]
                waiting.append(_begin(self.session, self.questions, self.loader, generate, self.state, batch, members))
                settle(IN_FLIGHT if number + 1 < len(batches) else 0)
                if told.stopping:  # several processes hear of it from the results that have just been read
                    settle(0)
                    raise Stopped(f"stopped while evaluating {self.name} after {count} of {len(numbers)} questions; the answers are kept")

    def _write(self, rows: list[dict[str, Any]], tokens: int, cap: int) -> None:
        """Takes answers of up to `tokens`; with a higher cap those that were cut off are marked, and so are those that were asked again."""
        for row in rows:
            if row["index"] in self.entries or (row["hit_cap"] and tokens < cap):
                row["again"] = tokens
            self.entries[row["index"]] = row
        if self.file is not None:
            self.file.write("".join(_line(row) for row in rows))
            self.file.flush()
            os.fsync(self.file.fileno())


def _kept(path: Path, partial: Path, header: dict, count: int, *, chief: bool) -> tuple[bool, dict[int, dict[str, Any]]]:
    """(whether all answers are in place, those that are there). Process 0 reads for all: it alone writes, and another would see less."""
    rows = read_answers(path, header) if chief and path.exists() else {}
    whole = len(rows) == count
    if chief and not whole:
        rows = read_answers(partial, header)
    whole, rows = from_chief([whole, list(rows.values())])
    return whole, {row["index"]: row for row in rows}


def _begin(
    session: Session, questions: list[Question], loader: ImageLoader, generate, state: CLState, batch: Batch, members: Sequence[int]
) -> tuple[dict[str, jax.Array], dict[str, set[int]]]:
    """Has the device answer a batch's questions, `members`: (results that may not be there yet, {kind: questions whose image is of it}).

    The processes tell each other of such images first: behind the batch that would wait for its end.
    """
    images = [questions[index].image for index in members]
    odd = {kind: {index for index, found in zip(members, odd_questions(images, loader, kind)) if found} for kind in KINDS}
    return generate(state.params, state.memory, session.llava, meshes.put_batch(batch, session.mesh), state.stage), odd


def _rows(
    session: Session, questions: list[Question], numbers: Sequence[int], results: Mapping[str, jax.Array], odd: Mapping[str, set[int]],
    told: Round,
) -> list[dict[str, Any]]:
    """The answers' lines, from what `_begin` returned, when the device has it; a batch's example n is question `numbers[n]`."""
    out = {name: np.asarray(value) for name, value in results.items()}
    if told.hear(out):  # the rows of a batch that one process could not read are left out together
        raise told.failure()
    rows = []
    for row in np.flatnonzero(out["valid"]):
        index, count = numbers[int(out["example"][row])], int(out["count"][row])
        text = session.encoder.tokenizer.decode(out["tokens"][row, :count].tolist()).strip()
        rows.append({
            "index": index, "question_id": questions[index].id, "prompt": questions[index].text, "text": text,
            "hit_cap": bool(out["hit_cap"][row]), "gates": [round(float(gate), 6) for gate in out["gates"][row]],
        } | {kind: True for kind, found in odd.items() if index in found})
    return rows


def _mean_gates(entries: dict[int, dict]) -> list[float]:
    """Mean gate of each block over the questions, in the order of the questions so that it does not depend on batches."""
    return [float(value) for value in np.mean([entries[index]["gates"] for index in sorted(entries)], axis=0)]


def _hash(items: list) -> str:
    return f"{zlib.crc32(repr(items).encode('utf-8', 'replace')):08x}"


def _line(row: dict[str, Any]) -> str:
    body = json.dumps(row, ensure_ascii=False)
    return json.dumps(row | {"crc": zlib.crc32(body.encode("utf-8", "replace"))}, ensure_ascii=False) + "\n"


def _reopen(path: Path, header: dict, entries: dict[int, dict]):
    """The partial file with exactly the trusted entries, open for appending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(_line(header) + "".join(_line(row) for row in entries.values()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")


def read_answers(path: Path, header: dict | None = None) -> dict[int, dict]:
    """The answers of a file by index of the question; lines that are torn or changed are left out.

    Args:
        path: a file as described above; it need not exist.
        header: what its first line must say of MUST_AGREE; answers under another header are not trusted.
    """
    if not path.exists():
        return {}
    rows = []
    # Not splitlines: an answer may hold a line separator of Unicode, which JSON leaves as it is.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            crc = row.pop("crc")
        except (ValueError, KeyError, AttributeError):
            continue
        if zlib.crc32(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")) == crc:
            rows.append(row)
    agreed = header is None or (rows and all(rows[0].get(field) == header[field] for field in MUST_AGREE))
    if not rows or not agreed:
        return {}
    return {row["index"]: row for row in rows if "index" in row}
