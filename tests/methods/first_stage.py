"""The first stage of every method with a pool has plain LoRA's losses, to the last bit; test_first_stage.py runs these tests.

So have the parameters, but for SEMA, whose program holds more than LoRA's in the first stage too: there last bits differ, by the order in
which the compiler fuses a product with a sum; without LLVM's costly optimisations they do not.
"""

from __future__ import annotations

import functools

import harness
import jax
import numpy as np
import pytest

from proglora_jax.core import tree as trees
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.lwf import LwF
from proglora_jax.methods.mocl import MoCL
from proglora_jax.methods.olora import OLoRA
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.proglora_light import ProgLoRALight
from proglora_jax.methods.proglora_static import ProgLoRAStatic
from proglora_jax.methods.sema import SEMA

SIZES = dict(rank=16, alpha=32.0, a_init="normal001")
KAIMING = SIZES | {"a_init": "kaiming"}


@functools.cache
def five_steps(method):
    """(losses, what LoRA has too, names of the rest, whether the rest is as it was)."""
    run = harness.Harness(method, backbone="stub")
    state, mask = run.begin(run.initial(), 0)
    first = jax.tree.map(np.array, state.params)
    state, losses = run.fit(state, mask, 0, 5)
    last = jax.tree.map(np.asarray, state.params)
    factors = {name: {"a": leaf["a"], "b": leaf["b"]} for name, leaf in jax.tree.map(np.asarray, method.leaves(last)).items()}
    shared = {"block": factors, "mm_projector": last["mm_projector"]}
    rest = sorted(set(last) - {"shared", *shared})
    before, after = ({name: params[name] for name in rest} for params in (first, last))
    return losses, shared, rest, trees.digest(before) == trees.digest(after)


def assert_equal(one, other):
    """To the last bit."""
    assert trees.digest(one) == trees.digest(other)


def assert_alike(one, other):
    """To last bits of the largest; values near zero keep fewer digits of their own (seen: 1e-7, and 5e-5 of a value)."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), one, other)


ROUTED = ["key", "keys", "pool", "query_projector"]
FAMILY = [
    (ProgLoRADynamic(pool_chunk=1), ROUTED), (ProgLoRALight(pool_chunk=1, shared_layers=1), ROUTED),
    (ProgLoRAStatic(pool_chunk=1), ["pool"]),
    (OLoRA(pool_chunk=1), ["pool"]), (MoCL(pool_chunk=1, match_weight=0.0), ["key", "keys", "pool"]),
]  # fmt: skip


@pytest.mark.parametrize("method, names", FAMILY, ids=lambda value: getattr(value, "name", ""))
def test_first_stage_is_plain_lora_bit_for_bit(method, names):
    """Same seed, same start, same dropout: losses and blocks agree; keys and query projector stay as they were."""
    sizes = SIZES | {"a_init": "kaiming" if method.name in ("olora", "mocl") else "normal001"}
    assert (method.rank, method.alpha, method.a_init, method.dropout) == (*sizes.values(), 0.05)
    losses, blocks, _, _ = five_steps(LoRA(**sizes))
    mine, same, rest, untouched = five_steps(method)
    assert mine == losses and len(set(losses)) == 5
    assert_equal(same, blocks)
    assert untouched and rest == names


def test_without_a_past_lwf_is_plain_lora_bit_for_bit():
    """The teacher is not asked in the first stage."""
    losses, blocks, _, _ = five_steps(LoRA(**KAIMING))
    mine, same, _, _ = five_steps(LwF(**KAIMING))
    assert_equal(same, blocks)
    assert mine == losses


def test_the_first_stage_of_sema_has_the_losses_of_plain_lora_bit_for_bit():
    """Its first phase; router rows do not move, for one module has gate 1."""
    sizes = dict(rank=16, alpha=32.0, a_init="normal001")
    losses, blocks, _, _ = five_steps(LoRA(**sizes))
    method = SEMA(pool_chunk=1)
    assert (method.rank, method.alpha, method.a_init, method.dropout) == (*sizes.values(), 0.05)
    run = harness.Harness(method, backbone="stub")
    state, mask = run.begin(run.initial(), 0)
    first = jax.tree.map(np.array, state.params)
    after, mine = run.fit_phase(state, mask, 0, 5, method.phases(run.info(0))[0])
    params = jax.tree.map(np.asarray, after.params)
    assert mine == losses and len(set(losses)) == 5
    assert_alike({name: params[name] for name in ("block", "mm_projector")}, blocks)
    for name in ("row", "row_bias", "descriptor"):
        assert trees.digest({name: params[name]}) == trees.digest({name: first[name]})
