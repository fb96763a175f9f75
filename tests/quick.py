"""Quicker compiles, for tests that compile more than they compute."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Import it into a test file: its programs are compiled without the costly optimisations, in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
