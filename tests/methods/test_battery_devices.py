"""The battery's checks that compile programs of their own: several devices, half precision."""

from __future__ import annotations

import battery
import pytest
from quick import quick_compiles  # noqa: F401

from proglora_jax.methods.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", battery.COSTLY_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_method(name, check):
    check(name)
