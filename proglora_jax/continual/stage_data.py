"""The data of a stage: its rows, replayed rows among them, the batch plan, and batches of chosen rows for probes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from proglora_jax.continual.session import Session
from proglora_jax.continual.stages import Stage
from proglora_jax.core.mesh import batch_ways
from proglora_jax.data import replay as replays
from proglora_jax.data.batch import Batch, collate
from proglora_jax.data.pipeline import TrainIterator, load_row, train_iterator
from proglora_jax.data.plan import BatchPlan, check_buckets, plan_batches, row_buckets
from proglora_jax.data.rows import EncodedRows, encode_rows
from proglora_jax.data.schema import TrainRow
from proglora_jax.data.tasks import select_subset
from proglora_jax.methods.base import Phase, Replay
from proglora_jax.training import fisher, losses
from proglora_jax.training.settings import batch_size_of


@dataclasses.dataclass(frozen=True, eq=False)
class StageData:
    """What a stage trains on.

    Attributes:
        rows: all rows, the tasks' own first, then the replayed ones.
        own: how many are the stage's own.
        plan: the batches.
        separate: whether each batch holds replayed rows whose mean is taken apart.
    """

    rows: EncodedRows
    own: int
    plan: BatchPlan
    separate: bool = False


def own_rows(session: Session, stage: Stage) -> EncodedRows:
    """The encoded training rows of a stage's own tasks; their counts have the records that could not be used ("bad_records") too."""
    rows: list[TrainRow] = []
    for task in stage.train:
        examples = select_subset(session.data[session.tasks[task]].train, session.settings.data.train_examples)
        rows += replays.task_rows(examples, stage.local(task))
    encoded = encode_rows(rows, session.encoder, session.settings.data.on_unsupervised)
    bad = sum(session.data[session.tasks[task]].bad_records for task in stage.train)
    return dataclasses.replace(encoded, counts={"bad_records": bad} | encoded.counts)


def stage_data(
    session: Session, stage: Stage, own: EncodedRows, replay: Replay | None, phase: Phase = Phase(), place: int = 0
) -> StageData:
    """Adds the replayed rows of earlier tasks and plans the batches of a phase, the `place`-th of its stage.

    Raises:
        UserError: where batch size, buckets or replay do not fit the data.
    """
    settings = session.settings
    size = phase.batch_size or batch_size_of(settings.train, stage.name)
    seed, epochs = stage.number + 100 * place, phase.epochs or settings.train.epochs
    old = _replayed(session, replay) if replay else []
    if not old:
        return StageData(own, len(own), _grouped_plan(session, own, size, seed, epochs))
    extra = encode_rows(old, session.encoder, settings.data.on_unsupervised)
    rows = _join(own, extra)
    if replay.mix == "concat":
        return StageData(rows, len(own), _grouped_plan(session, rows, size, seed, epochs))
    numbers = np.arange(len(rows))
    part = max(1, round(size * replay.share))
    # Own and replayed rows have one mean each, whatever loss_norm is: there are no groups to balance.
    first = _plan(session, rows, numbers[: len(own)], size - part, seed, settings.train.max_steps, epochs)
    # There may be fewer replayed rows than their share of one batch: they come again as often as needed.
    second = _plan(session, rows, numbers[len(own) :], part, seed, len(first), epochs, remainder="wrap")
    joined = np.concatenate([first.rows, second.rows], axis=1)
    plan = dataclasses.replace(
        first, rows=joined, bucket=np.maximum(first.bucket, second.bucket), positions=first.positions + second.positions)
    return StageData(rows, len(own), plan, separate=True)


def open_iterator(session: Session, data: StageData) -> TrainIterator:
    """This process's share of the plan's batches."""
    part, parts = session.share
    return train_iterator(
        data.rows, data.plan, session.train_loader, process_index=part, process_count=parts, threads=session.settings.data.threads)


def chosen_batches(session: Session, rows: EncodedRows, numbers: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of chosen rows in plan-free order, short ones first, the last one filled up.

    Args:
        session: the session.
        rows: where the numbers point.
        numbers: i64[n] row numbers.
        batch_size: rows per batch, all processes together.

    Returns:
        (positions i64[<= batch_size] in `numbers` that the batch's first rows answer, this process's share of the batch), ...
    """
    buckets = check_buckets(session.settings.data.buckets)
    place = row_buckets(rows.lengths[numbers], rows.labels[numbers], buckets)
    order = np.argsort(place, kind="stable")

    def load(start: int) -> tuple[np.ndarray, Batch]:
        positions = order[start : start + batch_size]
        filled = _share(session, np.resize(positions, batch_size))
        return positions, _load(session, rows, numbers[filled], buckets[place[positions].max()])

    return _ahead(load, range(0, len(order), batch_size), session.settings.data.threads)


def numbered_batches(session: Session, rows: EncodedRows, numbers: np.ndarray, size: int) -> Iterator[Batch]:
    """Batches of consecutive numbers, which is what a mean over a batch depends on.

    Args:
        session: the session.
        rows: where the numbers point.
        numbers: i64[n] row numbers.
        size: rows per batch; the last one may have fewer. Rows without labels fill a batch up to a multiple of the devices.

    Returns:
        This process's share of each batch.
    """
    buckets = check_buckets(session.settings.data.buckets)
    place = row_buckets(rows.lengths[numbers], rows.labels[numbers], buckets)
    whole = fisher.filled_size(size, batch_ways(session.mesh))

    def load(start: int) -> Batch:
        chosen = np.arange(start, min(start + size, len(numbers)))
        batch = _load(session, rows, numbers[_share(session, np.resize(chosen, whole))], buckets[place[chosen].max()])
        return fisher.fill(batch, int((_share(session, np.arange(whole)) < len(chosen)).sum()))

    return _ahead(load, range(0, len(numbers), size), session.settings.data.threads)


def _ahead(make: Callable[[int], Any], starts: Iterable[int], threads: int) -> Iterator[Any]:
    """make(start) for every start, in order, so many prepared ahead as there are threads and one more (none without threads)."""
    if not threads:
        yield from map(make, starts)
        return
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for start in starts:
                waiting.append(pool.submit(make, start))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()


def _share(session: Session, numbers: np.ndarray) -> np.ndarray:
    """This process's part of a batch's rows."""
    part, parts = session.share
    return np.split(numbers, parts)[part]


def _load(session: Session, rows: EncodedRows, numbers: np.ndarray, bucket: tuple[int, int]) -> Batch:
    members = [load_row(rows, session.train_loader, int(number)) for number in numbers]
    return collate(members, bucket, session.encoder.tokenizer.pad_id, (session.images.size, session.images.size))


def _grouped_plan(session: Session, rows: EncodedRows, size: int, number: int, epochs: int) -> BatchPlan:
    """The batches of all rows; the groups within which the loss is averaged are of about equal length."""
    train = session.settings.train
    groups = losses.group_count(size, train)
    return _plan(session, rows, np.arange(len(rows)), size, number, train.max_steps, epochs, groups=groups)


def _plan(
    session: Session, rows: EncodedRows, numbers: np.ndarray, size: int, number: int, max_steps: int, epochs: int, remainder: str = "",
    groups: int = 1,
) -> BatchPlan:
    data, train = session.settings.data, session.settings.train
    # A seed per stage: with one for all, every stage of equal size would see its rows in the same order.
    plan = plan_batches(
        rows.lengths[numbers], rows.labels[numbers], rows.has_image[numbers], batch_size=size, buckets=data.buckets,
        seed=session.settings.run.seed * 1000 + number, epochs=epochs, max_steps=max_steps, grouping=data.grouping,
        remainder=remainder or data.remainder, chunks=groups, image_positions=session.encoder.image_tokens,
    )
    return dataclasses.replace(plan, rows=numbers[plan.rows])


def _replayed(session: Session, replay: Replay) -> list[TrainRow]:
    rows: list[TrainRow] = []
    for index, count in enumerate(replay.counts):
        name = session.tasks[index]
        examples = select_subset(session.data[name].train, session.settings.data.train_examples)
        positions = replays.replay_indices(len(examples), count, session.settings.run.seed, name)
        rows += replays.task_rows(examples, index, replay.weight, positions)
    return rows


def _join(first: EncodedRows, second: EncodedRows) -> EncodedRows:
    """Two sets of rows as one, the first's numbers unchanged."""
    join = lambda name: np.concatenate([getattr(first, name), getattr(second, name)])
    return EncodedRows(
        rows=first.rows + second.rows, tokens=join("tokens"), segments=join("segments"),
        starts=np.concatenate([first.starts, first.starts[-1] + second.starts[1:]]), lengths=join("lengths"), labels=join("labels"),
        has_image=join("has_image"), encoder=first.encoder,
        counts={name: count + second.counts.get(name, 0) for name, count in first.counts.items()},
    )
