"""The battery's check on a mesh of eight devices, which compiles programs of its own."""

from __future__ import annotations

import battery
import pytest

from proglora_jax.methods.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_equal_one(name):
    battery.check_eight_devices_equal_one(name)
