"""The battery's checks in half precision: one compiles programs of its own, one only traces them."""

from __future__ import annotations

import battery
import jax
import pytest

from proglora_jax.methods.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_trains(name):
    battery.check_half_precision_trains(name)


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_in_full_precision(name):
    with jax.default_matmul_precision(None):  # as in a run
        battery.check_routing_is_in_full_precision(name)
