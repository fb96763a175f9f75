"""What people read on the console: plain log lines, parameter tables, progress with the time left, sizes and durations in words."""

from __future__ import annotations

import logging as python_logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from absl import logging

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


class ParameterRow(NamedTuple):
    """One line of `parameter_table`: a group of leaves that train or rest together."""

    group: str
    leaves: int
    parameters: int
    bytes: int
    trainable: bool


class Progress:
    """Progress of an evaluation with the time left: one line that rewrites itself on a terminal, a line now and then elsewhere."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        every_seconds: float = 30.0,
        chief: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the clock.

        Args:
            label: what is going on, e.g. "evaluate GQA".
            total: how many items there are.
            every_seconds: time between two lines where the stream is no terminal (a terminal's line changes twice a second).
            chief: False prints nothing.
            stream: where to print; the standard error stream if None.
            clock: seconds; another one for tests.
        """
        self._label, self._total, self._chief, self._clock = label, total, chief, clock
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.5 if self._terminal else every_seconds
        self._done, self._width, self._finished = 0, 0, False
        self._start = self._printed = clock()

    def update(self, items: int = 1) -> None:
        """Counts items as done, and prints if it is time to."""
        self._done += items
        if self._clock() - self._printed >= self._every:
            self._printed = self._clock()
            passed = self._printed - self._start
            left = passed / max(1, self._done) * max(0, self._total - self._done)
            self._print(f"{self._label}: {self._done}/{self._total}, {self._done / passed:.3g}/s, {format_seconds(left)} left")

    def finish(self) -> None:
        """Prints the closing line, once."""
        if not self._finished:
            passed = self._clock() - self._start
            self._print(f"{self._label}: {self._done} of {self._total} done in {format_seconds(passed)}")
            if self._terminal and self._chief:
                self._stream.write("\n")
            self._finished = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _print(self, text: str) -> None:
        if self._chief and self._terminal:
            self._stream.write("\r" + text.ljust(self._width))  # blanks cover what is left of a longer line
            self._stream.flush()
            self._width = len(text)
        elif self._chief:
            logging.info("%s", text)


def setup_console(chief: bool = True) -> None:
    """Makes absl's log readable for people: time and message, our own information lines, other packages' warnings only.

    Call it once absl's flags are parsed (`flags.FLAGS.mark_as_parsed()` where there are none), or absl's first line is a remark on that.

    Args:
        chief: False lets only errors through, so that one process of many speaks.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO if chief else logging.ERROR)
    handler = logging.get_absl_handler()
    handler.setFormatter(_ConsoleFormat("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.filters = [_is_for_people]


def parameter_table(rows: Sequence[ParameterRow]) -> str:
    """A table of what trains and what rests, with totals.

    Args:
        rows: one per group, in the order to print.

    Returns:
        Lines of text: group, leaves, parameters, bytes, trainable; then the sums, with the share that trains.
    """
    header = ("group", "leaves", "parameters", "bytes", "trainable")
    cells = [_cells(row) for row in rows]
    every, train = _total("total", rows), _total("trainable", [r for r in rows if r.trainable])
    share = 100 * train.parameters / every.parameters if every.parameters else 0.0
    sums = [(*_cells(train)[:4], f"{share:.3g} %"), (*_cells(every)[:4], "")]
    widths = [max(len(line[i]) for line in [header, *cells, *sums]) for i in range(5)]

    def line(values: Sequence[str]) -> str:
        aligned = [values[0].ljust(widths[0]), *(values[i].rjust(widths[i]) for i in (1, 2, 3)), values[4]]
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 8)
    return "\n".join([line(header), rule, *map(line, cells), rule, *map(line, sums)])


def format_seconds(seconds: float) -> str:
    """A duration in at most two units: "45s", "3m20s", "2h05m", "3d04h"; "?" for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for size, unit, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02}{name}"
    return f"{whole}s"


def format_bytes(count: float) -> str:
    """A size in binary units with three digits: "512 B", "1.50 KiB", "31.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            digits = 0 if unit == "B" or count >= 100 else 1 if count >= 10 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


class _ConsoleFormat(python_logging.Formatter):
    def format(self, record: python_logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < python_logging.WARNING else text.replace(" ", f" {record.levelname}: ", 1)


def _is_for_people(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or os.path.abspath(record.pathname).startswith(_PACKAGE)


def _cells(row: ParameterRow) -> tuple[str, ...]:
    return row.group, f"{row.leaves:,}", f"{row.parameters:,}", format_bytes(row.bytes), "yes" if row.trainable else "no"


def _total(name: str, rows: Sequence[ParameterRow]) -> ParameterRow:
    return ParameterRow(name, *(sum(row[i] for row in rows) for i in (1, 2, 3)), False)
