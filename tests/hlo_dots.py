"""Counts the matmuls in the text of a compiled XLA program: how many, and how many multiplications and additions."""

from __future__ import annotations

import math
import re

import jax

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_VALUE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\((?:\w+\[[\d,]*\]\S* )?%([\w.\-]+), .*lhs_contracting_dims=\{([\d,]*)\}")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")


def compiled_text(function, *arguments) -> str:
    """The optimised program of a function of (abstract) arrays."""
    return jax.jit(function).lower(*arguments).compile().as_text()


def computations(text: str) -> dict[str, list[str]]:
    """Name of each computation of a program -> its lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match[1]] = []
        lines.append(line)
    return found


def reachable(text: str, start: str) -> list[str]:
    """The computations that one computation runs, itself among them."""
    parts, seen, waiting = computations(text), [], [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.append(name)
            waiting += [called for line in parts[name] for called in _CALLED.findall(line)]
    return seen


def loop_bodies(text: str) -> list[str]:
    """Names of the bodies of the program's loops."""
    return re.findall(r" while\(.*body=%([\w.\-]+)", text)


def dots(text: str, names=None) -> list[int]:
    """FLOPs of each matmul: 2 * (size of its result) * (length of the sum), in the computations of these names (default: all)."""
    flops = []
    for name, lines in computations(text).items():
        if names is not None and name not in names:
            continue
        shapes = {match[1]: [int(n) for n in match[2].split(",") if n] for line in lines if (match := _VALUE.match(line))}
        for line in lines:
            if match := _DOT.search(line):
                summed = [shapes[match[1]][int(axis)] for axis in match[2].split(",") if axis]
                flops.append(2 * math.prod(shapes[_VALUE.match(line)[1]]) * math.prod(summed))
    return flops
