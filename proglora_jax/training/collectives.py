"""Finds the collectives in the text of a compiled program: what kind, how large, over how many devices, how often in one run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of KINDS.
        shapes: types of its results on a device, "bf16[4096,4096]".
        bytes: of its results on a device.
        group: devices that take part together; 0 where the text does not say.
        times: how often it runs in one run of the program.
        turn: whether it runs in every turn of a loop whose length the program does not know (decoding); `times` is per turn then.
        source: the operation that it came from, as the compiler's metadata names it.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group: int
    times: int
    turn: bool
    source: str

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one run (or turn), by a ring: an estimate from the sizes, not a measurement."""
        if self.kind == "collective-permute" or not self.group:
            return float(self.bytes * self.times)
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}.get(self.kind, share)
        return self.bytes * self.times * factor


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, each once, however many pieces the compiler has cut it into.

    Args:
        text: from `compiled.as_text()`, optimised HLO of one device.
    """
    bodies, entry = _computations(text)
    found: dict[str, Collective] = {}
    for name, times, turn in _visits(bodies, entry):
        for line in bodies[name]:
            match = _COLLECTIVE.search(line)
            if match:
                one = _read(match, line, times, turn)
                # The pieces of an asynchronous collective share a channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = f"{one.kind} {channel[1]}" if channel else line
                found.setdefault(key, one)
    return sorted(found.values(), key=lambda one: -one.bytes * one.times)


def _read(match: re.Match, line: str, times: int, turn: bool) -> Collective:
    kind, started = match[2], bool(match[3])
    arrays = _ARRAY.findall(match[1])
    if started and match[1].startswith("(("):  # ((operands), results, ...), as the compiler for GPUs writes every kind
        operands = len(_ARRAY.findall(_first_group(match[1][1:])))
        arrays = arrays[operands : 2 * operands]
    elif started and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
    size = sum(_WIDTHS.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
    source = re.search(r'op_name="([^"]*)"', line)
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in arrays)
    return Collective(kind, shapes, size, _group(line), times, turn, source[1] if source else "")


def _first_group(text: str) -> str:
    """A text up to where its first parenthesis closes."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index]
    return text


def _group(line: str) -> int:
    """Devices that take part together, from any of the three ways in which HLO writes groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", match[2]))
    return 0


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name of a computation: its lines}, name of the entry)."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        lines.append(line)
    return bodies, entry


def _visits(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether per turn of an open loop), callers before what they call."""
    waiting, seen = [(entry, 1, False)], set()
    while waiting:
        name, times, turn = waiting.pop()
        if (name, times, turn) in seen or name not in bodies:
            continue
        seen.add((name, times, turn))
        yield name, times, turn
        for line in bodies[name]:
            if loop := _WHILE.search(line):
                length = _length(bodies, loop[1], line)
                waiting.append((loop[2], times * length if length else 1 if not turn else times, turn or not length))
            else:
                waiting += [(called, times, turn) for called in _CALLED.findall(line)]


def _length(bodies: dict[str, list[str]], condition: str, line: str) -> int:
    """Turns of a loop: the compiler's own count, or the constant that its counter is compared with; 0 where a value decides."""
    if known := _KNOWN.search(line):
        return int(known[1])
    names, lines = [condition], []
    while names:
        body = bodies.get(names.pop(), [])
        lines += body
        names += [called for text in body for called in _CALLED.findall(text)]
    if any(re.search(r" (and|reduce|all-reduce|not)\(", text) for text in lines):
        return 0
    bounds = [int(match[1]) for text in lines if (match := re.search(r"= s32\[\]\S* constant\((\d+)\)", text))]
    return bounds[0] if len(bounds) == 1 else 0
