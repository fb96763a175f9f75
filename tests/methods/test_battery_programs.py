"""The battery's checks with programs of their own: on eight devices, in half precision, and one that only traces them."""

from __future__ import annotations

import battery
import jax
import pytest

from proglora_jax.methods.registry import NAMES

OWN = [name for name in NAMES if name != "multi_task"]  # which has LoRA's programs


@pytest.mark.parametrize("name", OWN)
def test_eight_devices_equal_one(name):
    battery.check_eight_devices_equal_one(name)


@pytest.mark.parametrize("name", OWN)
def test_half_precision_trains(name):
    battery.check_half_precision_trains(name)


@pytest.mark.parametrize("name", OWN)
def test_routing_is_in_full_precision(name):
    with jax.default_matmul_precision(None):  # as in a run
        battery.check_routing_is_in_full_precision(name)
