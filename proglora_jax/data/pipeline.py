"""Batches as they are trained and scored on: Grain threads that load images and collate what a plan says.

One element of the Grain dataset is one batch of this process. Threads, not worker processes, do the work: decoding
releases the interpreter lock, and no worker imports jax or takes device memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from proglora_jax.data.batch import Batch, BatchRow, collate
from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageLoader
from proglora_jax.data.padding import Padding
from proglora_jax.data.plan import BatchPlan, row_buckets, suggest_buckets
from proglora_jax.data.rows import EncodedRows
from proglora_jax.data.schema import Question
from proglora_jax.data.tokens import Encoder


class TrainIterator:
    """The batches of a plan for one process, in order, resumable at every step.

    After an error the iterator stays broken: Grain would go on behind the failed batch without a word.

    Attributes:
        blank: (number of a batch) -> a batch of the same shapes without content.
    """

    def __init__(self, dataset: grain.MapDataset, threads: int, fingerprint: str, blank: Callable[[int], Batch]):
        """Args: dataset: one element per batch; threads: as in `train_iterator`; fingerprint: of everything behind it; blank: as below."""
        self._fingerprint, self._length, self._error = fingerprint, len(dataset), None
        self.blank = blank
        self._iterator = iter(dataset.to_iter_dataset(_read_options(threads)))

    def __iter__(self) -> TrainIterator:
        return self

    def __len__(self) -> int:
        """Batches in the whole plan."""
        return self._length

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: "GQA record 2354786 (number 17 of its file): <path>: no such image; ..."
        """
        if self._error is not None:
            raise self._error
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise

    @property
    def step(self) -> int:
        """Number of the batch that comes next."""
        return int(self._iterator.get_state()["next_index"])

    def fingerprint(self) -> str:
        """sha256 of plan, data, tokenizer, image spec and settings; not of process count or threads."""
        return self._fingerprint

    def get_state(self) -> dict[str, int | str]:
        """Position and fingerprint, ready for JSON; equal on all processes, and valid for another number of them."""
        return {"next_index": self.step, "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, int | str]) -> None:
        """Continues where `get_state` was taken.

        Raises:
            UserError: "iterator state: it was saved with other data or settings (fingerprint 12ab..., now 34cd...); ..."
        """
        index, saved = state.get("next_index"), str(state.get("fingerprint"))
        if saved != self._fingerprint:
            raise UserError(
                f"iterator state: it was saved with other data or settings (fingerprint {saved[:12]}, now {self._fingerprint[:12]}); "
                "resume with the same data, tokenizer and config, or start the stage again in a new workdir"
            )
        if not isinstance(index, int) or not 0 <= index <= self._length:
            raise UserError(f"iterator state: next_index={index} is outside 0..{self._length}; the checkpoint is damaged")
        self._error = None
        self._iterator.set_state({"next_index": index})


def train_iterator(
    rows: EncodedRows,
    plan: BatchPlan,
    loader: ImageLoader,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    settings: Mapping[str, object] | None = None,
) -> TrainIterator:
    """Iterator over this process's share of every batch of the plan.

    Args:
        rows: encoded rows that the plan was made of.
        plan: global batches; a process gets the `process_index`-th of `process_count` equal slices of each.
        loader: loads images; its spec and mode are part of the fingerprint.
        process_index, process_count: this process among all that hold different rows, see `core.mesh.row_share`.
        threads: batches prepared at the same time; 0 prepares them when asked.
        settings: anything else that must be the same when a run is resumed (JSON values).

    Raises:
        UserError: "config.train.batch_size=30: not divisible by 4 processes"; "plan names row 90, but there are 80 rows".
    """
    share = _share("config.train.batch_size", plan.batch_size, process_index, process_count)
    if plan.rows.max(initial=-1) >= len(rows):
        raise UserError(f"the batch plan names row {plan.rows.max()}, but there are {len(rows)} rows; plan with the same rows")
    side = loader.spec.size

    def load(n: int) -> Batch:
        members = [load_row(rows, loader, int(number)) for number in plan.rows[n, share]]
        return collate(members, plan.buckets[plan.bucket[n]], rows.encoder.tokenizer.pad_id, (side, side))

    def blank(n: int) -> Batch:
        return _blank(share, plan.buckets[plan.bucket[n]], side)

    dataset = grain.MapDataset.source(range(len(plan))).map(load)
    return TrainIterator(dataset, threads, _fingerprint(rows, plan, loader, settings or {}), blank)


def _blank(share: slice, bucket: tuple[int, int], side: int) -> Batch:
    """A batch of the right shapes with nothing in it: what a process that cannot read its rows gives to the step of all."""
    return {name: np.zeros((share.stop - share.start, *field.shape[1:]), field.dtype)
            for name, field in collate([], bucket, 0, (side, side)).items()}


def reader_threads(stated: int) -> int:
    """How many threads a run reads with: what the config says, or for 0 half of the cores that this process may use, 2 to 8.

    A thread reads about 120 images of 336 pixels a second. Eight GPUs ask for about 220 in training and 440 in evaluation. Each thread
    prepares a whole batch, so more of them take memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return stated or max(2, min(8, cores // 2))


def _read_options(threads: int) -> grain.ReadOptions:
    # A batch of 112 images of 336 pixels takes 150 MB, so few wait ahead (Grain's own default is 500).
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)


def _share(field: str, batch_size: int, process_index: int, process_count: int) -> slice:
    if process_count < 1 or not 0 <= process_index < process_count or batch_size % process_count:
        raise UserError(f"{field}={batch_size}: not divisible by {process_count} processes (this is process {process_index})")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def load_row(rows: EncodedRows, loader: ImageLoader, number: int) -> BatchRow:
    """A training row with its image.

    Raises:
        UserError: "GQA record 2354786 (number 17 of its file): <path>: no such image; ..."
    """
    try:
        path = rows.rows[number].example.image
        return rows.row(number, None if path is None else loader(path))
    except Exception as error:  # whatever fails, the record must be named
        raise UserError(f"{rows.describe(number)}: {error}") from error


def _fingerprint(rows: EncodedRows, plan: BatchPlan, loader: ImageLoader, settings: Mapping[str, object]) -> str:
    encoder = rows.encoder
    parts = {
        "plan": plan.digest(),
        "rows": rows.digest(),
        "tokenizer": encoder.tokenizer.fingerprint,
        "encoder": [repr(encoder.template), encoder.image_tokens, encoder.max_length, encoder.max_labels, encoder.empty_answer],
        "images": [repr(loader.spec), loader.mode],
        "settings": dict(settings),
    }
    return hashlib.sha256(json.dumps(parts, default=repr, sort_keys=True).encode()).hexdigest()


class EvalBatches:
    """Prompt batches of a task in a fixed order; batch n can be had on its own, so scoring resumes at any batch.

    The rows of a batch name their question in `example`; fillers of the last batch have valid=False.
    """

    def __init__(self, questions, encoded, encoder, loader, order, bucket, lengths, batch_size, share, task_id):
        """Made by `eval_batches`; order: i64[n] question numbers in scoring order; bucket: i64[n] index into lengths per question."""
        self._questions, self._encoded, self._encoder, self._loader = questions, encoded, encoder, loader
        self._order, self._bucket, self._lengths = order, bucket, lengths
        self._batch_size, self._share, self._task_id = batch_size, share, task_id

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._order) // self._batch_size)

    def members(self, n: int) -> list[int]:
        """Numbers of the questions that batch n asks, all processes together, fillers left out."""
        return self._order[n * self._batch_size : (n + 1) * self._batch_size].tolist()

    def batch(self, n: int) -> Batch:
        """This process's share of batch n.

        Raises:
            UserError: "GQA question 201: <path>: no such image; ..."
        """
        members = self._order[n * self._batch_size : (n + 1) * self._batch_size]
        filled = np.concatenate([members, np.full(self._batch_size - len(members), members[0])])
        valid = np.arange(self._batch_size) < len(members)
        rows = [self._row(int(i), bool(v)) for i, v in zip(filled[self._share], valid[self._share])]
        positions = self._padded_length(members)
        side = self._loader.spec.size
        return collate(rows, (positions, 0), self._encoder.tokenizer.pad_id, (side, side))

    def blank(self, n: int) -> Batch:
        """A batch of the shapes of batch n without content: no row is valid."""
        members = self._order[n * self._batch_size : (n + 1) * self._batch_size]
        return _blank(self._share, (self._padded_length(members), 0), self._loader.spec.size)

    def batches(self, start: int = 0, threads: int = 2) -> Iterator[Batch]:
        """Batches start, start + 1, ..., prepared ahead by threads (0: when asked)."""
        if not 0 <= start <= len(self):
            raise UserError(f"evaluation cannot resume at batch {start}: there are {len(self)}; delete the partial results of this task")
        dataset = grain.MapDataset.source(range(start, len(self))).map(self.batch)
        return iter(dataset.to_iter_dataset(_read_options(threads))) if start < len(self) else iter(())

    def padding(self) -> Padding:
        """What of the prompts' batches is padding, fillers included."""
        sizes = sum(len(self._encoded[number].tokens) for number in self._order)
        return Padding.of(sizes, (self._padded_length(self.members(n)) for n in range(len(self))), self._batch_size)

    def _padded_length(self, members: Sequence[int]) -> int:
        return self._lengths[self._bucket[members].max()]

    def truncated(self) -> list[str]:
        """Ids of questions that were cut to fit."""
        return [question.id for question, item in zip(self._questions, self._encoded) if item.truncated]

    def _row(self, number: int, valid: bool) -> BatchRow:
        question, item = self._questions[number], self._encoded[number]
        try:
            image = None if question.image is None else self._loader(question.image)
        except Exception as error:  # whatever fails, the question must be named
            raise UserError(f"{question.task} question {question.id}: {error}") from error
        return BatchRow(item.tokens, item.segments, image, self._task_id, number, valid=valid)


def eval_batches(
    questions: Sequence[Question],
    encoder: Encoder,
    loader: ImageLoader,
    *,
    batch_size: int,
    task_id: int = 0,
    lengths: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Prompt batches of a task, each of exactly `batch_size` rows (all processes together).

    With one length questions stay in order; with several, short prompts come first and what does not fill a batch moves
    to the next length, so that only the very last batch has fillers.

    Args:
        questions: the task's questions.
        encoder: how text becomes tokens.
        loader: loads images (on_bad="blank" never leaves a question out).
        batch_size: rows per batch.
        task_id: index of the task in the sequence.
        lengths: prompt lengths T to pad to, growing; () for one that fits all.
        process_index, process_count: this process among all that hold different rows, see `core.mesh.row_share`.

    Raises:
        UserError: "no questions to evaluate ..."; "config.evaluate.batch_size=0: ..."; a prompt longer than the largest length.
    """
    if not questions:
        raise UserError("no questions to evaluate; check the task's evaluation file and config.evaluate.subset_size")
    if batch_size < 1:
        raise UserError(f"config.evaluate.batch_size={batch_size}: must be above 0")
    encoded = encoder.encode_questions(questions)
    sizes = np.asarray([len(item.tokens) for item in encoded], np.int64)
    limits = tuple(int(t) for t in lengths) or (suggest_buckets(sizes, np.zeros_like(sizes))[0][0],)
    if any(b <= a for a, b in zip(limits, limits[1:])):
        raise UserError(f"config.evaluate.prompt_lengths={list(limits)}: must grow")
    if sizes.max() > limits[-1]:
        longest = questions[int(sizes.argmax())]
        raise UserError(
            f"config.evaluate.prompt_lengths={list(limits)}: the prompt of {longest.task} question {longest.id} has {sizes.max()} "
            "positions; enlarge the last one")
    bucket = row_buckets(sizes, np.zeros_like(sizes), tuple((t, 0) for t in limits))
    order = np.argsort(bucket, kind="stable")
    share = _share("config.evaluate.batch_size", batch_size, process_index, process_count)
    return EvalBatches(questions, encoded, encoder, loader, order, bucket, limits, batch_size, share, task_id)
