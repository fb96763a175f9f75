"""The method that the README shows under "Add a method" is short, complete, and does what it says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import harness
import jax
import numpy as np
import pytest

from proglora_jax.core import tree as trees
from proglora_jax.methods.base import Method

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def code() -> str:
    """The code block of the section."""
    section = README.read_text(encoding="utf-8").partition("### Add a method\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_it_is_under_sixty_lines_with_a_first_sentence(code):
    assert len(code.splitlines()) < 60 and code.startswith('"""')


def test_it_freezes_the_block_after_the_first_task(code, monkeypatch):
    """As a module of its own, trained on two tasks: the block moves in the first stage, and rests bit by bit in the second."""
    module = types.ModuleType("readme_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "README.md", "exec"), module.__dict__)
    method, = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Method) and kind is not Method)
    run = harness.Harness(method(rank=4, alpha=8.0, dropout=0.0), backbone="stub", count=16)
    assert run.method.name == "first_task"
    start = run.initial()
    first, losses = run.stage(start, 0, 8)
    second, _ = run.stage(first, 1, 3)
    block = [{path: np.asarray(leaf) for path, leaf in trees.flatten(state.params["block"]).items()} for state in (start, first, second)]
    assert losses[-1] < losses[0]
    assert all(np.any(block[0][path] != leaf) for path, leaf in block[1].items())
    jax.tree.map(np.testing.assert_array_equal, block[1], block[2])
    projector = [np.asarray(jax.tree.leaves(state.params["mm_projector"])[0]) for state in (first, second)]
    assert np.any(projector[0] != projector[1]), "the projector goes on training"
