"""The first stage of every method with a pool is plain LoRA, to the last bit."""

from __future__ import annotations

import functools

import harness
import jax
import numpy as np
import pytest
from quick import quick_compiles  # noqa: F401

from proglora_jax.core import tree as trees
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.proglora_static import ProgLoRAStatic

SIZES = dict(rank=16, alpha=32.0, a_init="normal001")


@functools.cache
def five_steps(method):
    """(losses, hash of what LoRA has too, names of the rest, whether the rest is as it was)."""
    run = harness.Harness(method, backbone="stub")
    state, mask = run.begin(run.initial(), 0)
    first = jax.tree.map(np.array, state.params)
    state, losses = run.fit(state, mask, 0, 5)
    last = jax.tree.map(np.asarray, state.params)
    shared = {name: last[name] for name in ("block", "mm_projector")}
    rest = sorted(set(last) - set(shared))
    before, after = ({name: params[name] for name in rest} for params in (first, last))
    return losses, trees.digest(shared), rest, trees.digest(before) == trees.digest(after)


@pytest.mark.parametrize("cls", [ProgLoRADynamic, ProgLoRAStatic])
def test_first_stage_is_plain_lora_bit_for_bit(cls):
    """Same seed, same start, same dropout: losses and blocks agree; keys and query projector stay as they were."""
    method = cls(pool_chunk=1)
    assert (method.rank, method.alpha, method.a_init, method.dropout) == (*SIZES.values(), 0.05)
    losses, blocks, _, _ = five_steps(LoRA(**SIZES))
    mine, same, rest, untouched = five_steps(method)
    assert mine == losses and len(set(losses)) == 5
    assert same == blocks
    assert untouched and rest == (["key", "keys", "pool", "query_projector"] if method.name == "proglora_dynamic" else ["pool"])


def test_empty_slots_change_the_first_stage_by_rounding_only():
    losses = five_steps(LoRA(**SIZES))[0]
    np.testing.assert_allclose(five_steps(ProgLoRAStatic())[0], losses, rtol=1e-5)
