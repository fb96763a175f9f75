"""Counts the matmuls of a traced program in floating-point operations, loops by their lengths, before any compiler has seen it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class MatmulWork(NamedTuple):
    """Floating-point operations of the matmuls of a program, of all devices together.

    Attributes:
        total: with every scan taken as often as it turns, and loops that end by a condition (decoding) left out.
        turn: of one turn of the loops that end by a condition, scans inside them included.
        once: with every loop's body taken once, which is how XLA's own cost analysis counts.
    """

    total: float
    turn: float
    once: float

    def plus(self, other: MatmulWork, times: int = 1) -> MatmulWork:
        """The sum with a part that runs so many times."""
        return MatmulWork(self.total + times * other.total, self.turn + times * other.turn, self.once + other.once)


def matmul_work(jaxpr: Any) -> MatmulWork:
    """Work of a jaxpr; what a policy recomputes in the backward pass is in it, what a custom kernel does inside is not.

    Args:
        jaxpr: a (closed) jaxpr, e.g. `jax.jit(f).trace(...).jaxpr`.
    """
    work = MatmulWork(0.0, 0.0, 0.0)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name == "dot_general":
            flops = _dot(equation)
            work = work.plus(MatmulWork(flops, 0.0, flops))
        elif name == "cond":
            work = work.plus(max((matmul_work(branch) for branch in equation.params["branches"]), key=lambda part: part.total))
        elif name == "while":
            body = matmul_work(equation.params["body_jaxpr"])
            work = work.plus(MatmulWork(0.0, body.total + body.turn, body.once))
        elif name != "pallas_call":
            times = equation.params["length"] if name == "scan" else 1
            for part in _inner(equation.params):
                work = work.plus(matmul_work(part), times)
    return work


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
