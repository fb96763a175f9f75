"""Evaluation batches whose questions share images: what the prompts about one image have in common stands in them once.

Such a batch has places for G images and B questions. A device has the same part of both, and every question's image is on its device.
The beginning of a prompt, up to its last image position, is the same for all questions of an image:

    prefix_tokens    i32[G,P]    BOS, the template's text before the image, the image's positions
    prefix_segments  i8[G,P]
    prefix_task_id   i32[G]
    image            f32[G,H,W,3]  zeros where fewer images are asked about
    slot             i32[B]      the question's image among those of its device
    tokens, segments, length, task_id, example, valid: as in data/batch.py, of what follows the beginning
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from proglora_jax.data.batch import IMAGE, PREFIX_FIELDS, QUESTION_FIELDS, Batch, BatchRow, collate
from proglora_jax.data.padding import Padding
from proglora_jax.data.pipeline import EvalBatches

WORTH = 1.25
"""By what factor the positions to read must fall for sharing to be worth programs of its own."""
MULTIPLE = 32
"""What follows a shared beginning is padded to multiples of this."""


class Lane(NamedTuple):
    """A device's part of a batch.

    Attributes:
        images: for each image a question about it.
        rows: (question, its image's place in `images`).
    """

    images: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]


def fill_lanes(groups: Sequence[Sequence[int]], rows: int, images: int) -> list[Lane]:
    """Deals groups of questions, one per image, into lanes in order; one that does not fit goes on in the next lane.

    Args:
        groups: questions by image.
        rows: most questions of a lane.
        images: most images of a lane.
    """
    lanes: list[Lane] = []
    seen: list[int] = []
    placed: list[tuple[int, int]] = []
    for group in groups:
        rest = list(group)
        while rest:
            if len(placed) == rows or len(seen) == images:
                lanes.append(Lane(tuple(seen), tuple(placed)))
                seen, placed = [], []
            part, rest = rest[: rows - len(placed)], rest[rows - len(placed) :]
            placed += [(number, len(seen)) for number in part]
            seen.append(part[0])
    return [*lanes, Lane(tuple(seen), tuple(placed))] if placed else lanes


def group_by_image(plain: EvalBatches, ways: int, worth: float = WORTH) -> EvalBatches:
    """The same questions in batches as above, and those without an image in plain ones behind them.

    Args:
        plain: batches of the questions as they come.
        ways: devices that share a batch.
        worth: by what factor the positions to read must fall at least.

    Returns:
        `plain` itself where it is not worth it, where no two questions share an image, where a device has a single row, and where
        prompts do not begin alike.
    """
    grouped = GroupedBatches.of(plain, ways)
    return plain if grouped is None or grouped.gain < worth else grouped


class GroupedBatches(EvalBatches):
    """Batches grouped by image; made by `group_by_image`.

    Attributes:
        lanes: parts of the batches with images, as many for each batch as there are devices.
        images: places for images in a lane.
        gain: positions that plain batches of the questions with images read, over those that these batches read; padding, fillers and
            places without an image count.
    """

    def __init__(self, plain: EvalBatches, ways: int, groups: list[list[int]], start: int):
        """Args: plain, ways: as for `group_by_image`; groups: questions by image; start: positions that all their prompts begin with."""
        vars(self).update(vars(plain))
        self._ways, self._start, first = ways, start, self._encoded[groups[0][0]]
        self._prefix = BatchRow(first.tokens[:start], first.segments[:start], None, self._task_id, 0)
        ordered, rows = self._ordered(groups), self._batch_size // ways
        pictured = {number for group in groups for number in group}
        self._tops = self._suffix_lengths(ordered)
        # As many images as fill a lane on average; a few more let more lanes be full.
        even = min(-(-rows * len(groups) // len(pictured)), -(-len(groups) // ways))
        tried = range(max(1, even - 1), min(rows - 1, even + max(1, rows // 8)) + 1)
        plans = {images: fill_lanes(ordered, rows, images) for images in tried}
        costs = {images: self._positions(lanes, rows, images) for images, lanes in plans.items()}
        self.images = min(costs, key=costs.get)
        self.lanes = tuple(plans[self.images])
        apart = [number for number in self._order if number in pictured]
        cuts = [self._bucket[apart[at : at + self._batch_size]] for at in range(0, len(apart), self._batch_size)]
        self.gain = sum(self._batch_size * self._lengths[cut.max()] for cut in cuts) / costs[self.images]
        text = np.asarray([number for number in self._order if number not in pictured], np.int64)
        self._rest = EvalBatches(
            self._questions, self._encoded, self._encoder, self._loader, text, self._bucket, self._lengths, self._batch_size,
            self._share, self._task_id)

    @classmethod
    def of(cls, plain: EvalBatches, ways: int) -> GroupedBatches | None:
        """The batches, or None where nothing can be shared; arguments as for `group_by_image`."""
        questions, encoded, size = plain._questions, plain._encoded, plain._batch_size
        groups: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            if question.image is not None:
                groups.setdefault(question.image, []).append(number)
        pictured = [number for group in groups.values() for number in group]
        processes = size // (plain._share.stop - plain._share.start)
        if len(groups) == len(pictured) or size % ways or size // ways < 2 or ways % processes:
            return None
        starts = {number: 1 + int(np.flatnonzero(encoded[number].segments == IMAGE)[-1]) for number in pictured}
        if len({encoded[number].tokens[:start].tobytes() for number, start in starts.items()}) > 1:
            return None
        return cls(plain, ways, list(groups.values()), starts[pictured[0]])

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.lanes) // self._ways) + len(self._rest)

    def members(self, n: int) -> list[int]:
        """Numbers of the questions that batch n asks, all processes together, fillers left out."""
        own = self._lanes_of(n)
        return [number for lane in own for number, _ in lane.rows] if own else self._rest.members(self._behind(n))

    def batch(self, n: int) -> Batch:
        """This process's share of batch n.

        Raises:
            UserError: "GQA question 201: <path>: no such image; ..."
        """
        return self._collated(n) if self._lanes_of(n) else self._rest.batch(self._behind(n))

    def blank(self, n: int) -> Batch:
        """A batch of the shapes of batch n without content: no row is valid."""
        if not self._lanes_of(n):
            return self._rest.blank(self._behind(n))
        return {name: np.zeros_like(value) for name, value in self._collated(n, load=False).items()}

    def padding(self) -> Padding:
        """What is padding of the beginnings (places without an image count), of what follows them, and of the plain batches."""
        rows, pictured = self._batch_size // self._ways, [number for lane in self.lanes for number, _ in lane.rows]
        asked = sum(len(self._encoded[number].tokens) - self._start for number in pictured)
        positions = asked + self._start * sum(len(lane.images) for lane in self.lanes)
        tops = (self._start + self._top(self._lanes_of(n)) for n in range(-(-len(self.lanes) // self._ways)))
        shared = Padding.of(positions, tops, 0)
        return dataclasses.replace(shared, padded_positions=self._positions(list(self.lanes), rows, self.images)) + self._rest.padding()

    def _lanes_of(self, n: int) -> tuple[Lane, ...]:
        """The lanes of batch n, all processes together; () for a batch of questions without images."""
        return self.lanes[n * self._ways : (n + 1) * self._ways]

    def _behind(self, n: int) -> int:
        return n - -(-len(self.lanes) // self._ways)

    def _collated(self, n: int, load: bool = True) -> Batch:
        lanes = self._lanes_of(n)
        top, filler = self._top(lanes), lanes[0].rows[0][0]
        each, side = self._batch_size // self._ways, self._loader.spec.size
        whole = (*lanes, *[Lane((), ())] * (self._ways - len(lanes)))
        lanes = whole[self._share.start // each : self._share.stop // each]
        members, slots, pixels = [], [], np.zeros((len(lanes) * self.images, side, side, 3), np.float32)
        for place, lane in enumerate(lanes):
            members += [self._after(number, True) for number, _ in lane.rows]
            members += [self._after(filler, False)] * (each - len(lane.rows))
            slots += [slot for _, slot in lane.rows] + [0] * (each - len(lane.rows))
            for slot, number in enumerate(lane.images if load else ()):
                pixels[place * self.images + slot] = self._row(number, True).image
        pad = self._encoder.tokenizer.pad_id
        made = collate(members, (top, 0), pad, (0, 0))
        prefix = collate([self._prefix] * len(pixels), (self._start, 0), pad, (0, 0))
        return {
            **{name: made[name] for name in QUESTION_FIELDS}, "slot": np.asarray(slots, np.int32), "image": pixels,
            **{f"prefix_{name}": prefix[name] for name in PREFIX_FIELDS},
        }

    def _after(self, number: int, valid: bool) -> BatchRow:
        """What follows the beginning of a question's prompt."""
        item = self._encoded[number]
        return BatchRow(item.tokens[self._start :], item.segments[self._start :], None, self._task_id, number, valid=valid)

    # ---- planning

    def _bucket_of(self, group: Sequence[int]) -> int:
        return int(self._bucket[list(group)].max())

    def _ordered(self, groups: list[list[int]]) -> list[list[int]]:
        """Short prompts first, as in plain batches; within a bucket groups of all sizes mixed evenly, so that batches are full alike."""
        counts: dict[tuple[int, int], int] = {}
        keys = []
        for group in groups:
            kind = (self._bucket_of(group), len(group))
            counts[kind] = counts.get(kind, 0) + 1
            keys.append((kind, counts[kind]))
        even = [(bucket, (place - 0.5) / counts[bucket, size]) for (bucket, size), place in keys]
        return [groups[index] for index in sorted(range(len(groups)), key=lambda index: even[index])]

    def _suffix_lengths(self, groups: list[list[int]]) -> dict[int, int]:
        """{bucket: positions that what follows the beginnings is padded to}, as short as its questions allow."""
        longest: dict[int, int] = {}
        for group in groups:
            bucket = self._bucket_of(group)
            longest[bucket] = max(longest.get(bucket, 0), *(len(self._encoded[number].tokens) - self._start for number in group))
        return {bucket: min(-(-most // MULTIPLE) * MULTIPLE, self._lengths[bucket] - self._start) for bucket, most in longest.items()}

    def _top(self, lanes: Sequence[Lane]) -> int:
        """Positions that a batch's rows are padded to: those of the smallest bucket that holds them all."""
        longest = max(len(self._encoded[number].tokens) for lane in lanes for number, _ in lane.rows) - self._start
        return min(top for top in self._tops.values() if top >= longest)

    def _positions(self, lanes: list[Lane], rows: int, images: int) -> int:
        """Positions that are read."""
        batches = [lanes[at : at + self._ways] for at in range(0, len(lanes), self._ways)]
        return sum(self._ways * (images * self._start + rows * self._top(batch)) for batch in batches)
