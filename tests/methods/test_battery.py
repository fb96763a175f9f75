"""Runs the battery over every method of the registry."""

from __future__ import annotations

import battery
import pytest

from proglora_jax.methods.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_method(name, check):
    check(name)
