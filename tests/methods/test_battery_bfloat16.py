"""The battery's check in half precision, which compiles programs of its own."""

from __future__ import annotations

import battery
import pytest

from proglora_jax.methods.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_trains(name):
    battery.check_half_precision_trains(name)
