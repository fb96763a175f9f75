"""The one exception for what a user can mend: its message is shown as it is, without a stack trace."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """An error in the user's input (a config field, a file, a record); the message says what, where and what to do."""


def raise_collected(problems: Sequence[str], what: str, advice: str, shown: int = 10) -> None:
    """Raises one UserError for a list of problems, naming the first few and the count; does nothing if there are none.

    Args:
        problems: one short sentence each.
        what: what was being read, e.g. "weights of model.safetensors".
        advice: what the user should do.
        shown: how many problems the message spells out.

    Raises:
        UserError: "<what>: <count> problem(s): <first ones>. <advice>"
    """
    if not problems:
        return
    listed = "; ".join(problems[:shown])
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    raise UserError(f"{what}: {len(problems)} problem(s): {listed}{rest}. {advice}")
