"""Invariants of MoELoRA, BranchLoRA, SEMA and PCLR: degenerate routers, first stages, generation as one pass, what rests, exports."""

from __future__ import annotations

import dataclasses

import battery
import harness
import jax
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data import batch as codes
from proglora_jax.methods.base import Method
from proglora_jax.methods.branchlora import BranchLoRA
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.sema import SEMA
from proglora_jax.training import step as steps_of

NAMES = ("moelora", "branchlora", "sema", "pclr")


def started(method: Method, seed: int = 3, **how) -> tuple[harness.Harness, CLState]:
    """The tiny LLaVA and a state after two stages whose parameters are random."""
    run, rng = harness.Harness(method, total=2, **how), np.random.default_rng(seed)
    state = run.initial()
    for index in range(2):
        state = method.start_task(state, run.info(index), run.probe)
        moved = lambda leaf: (np.array(leaf) + 0.2 * rng.standard_normal(np.shape(leaf))).astype(np.float32)
        state = dataclasses.replace(state, params=jax.tree.map(moved, state.params))
        if "errors" in state.carry.get("running", {}):  # SEMA's: without records nothing is new to a module
            errors = rng.uniform(0.1, 0.2, state.carry["running"]["errors"].shape).astype(np.float32)
            state = dataclasses.replace(state, carry={"running": {"errors": errors, "count": np.int32(20)}})
        for phase in method.phases(run.info(index)):
            state = method.after_phase(state, run.info(index), phase, run.probe)
        state = method.end_task(state, run.info(index), run.probe)
    return run, state


CASES = [("moelora", {"router_input": "token"}), ("moelora", {"router_input": "first_token"}), ("sema", {}), ("pclr", {})]
CASES += [("branchlora", {"router_input": "mean_prompt"})]


@pytest.mark.parametrize("name, fields", CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value.values()))
def test_generation_word_by_word_is_one_pass_over_the_whole(name, fields):
    """What routers decided from the prompt serves the later tokens; shown gates are shares that sum to 1."""
    run, state = started(harness.small(name, **fields))
    rows = [dataclasses.replace(row, tokens=row.tokens[row.segments != codes.ANSWER], segments=row.segments[row.segments != codes.ANSWER])
            for row in run.rows(1)[:4]]  # fmt: skip
    params, memory = meshes.put_replicated((state.params, state.memory), run.mesh)
    generate = steps_of.make_generator(run.method, run.mesh, 4, tiny_llava.VOCAB, tiny_llava.PAD, tiny_llava.VOCAB)
    out = generate(params, memory, run.llava, meshes.put_batch(tiny_llava.batch(rows, 18, 0), run.mesh), state.stage)
    gates = np.asarray(out["gates"])
    np.testing.assert_allclose(gates.sum(axis=1), 1.0, rtol=1e-5)
    same = np.abs(gates - gates[:1]).max() < 1e-6
    assert (gates > 1e-3).any(axis=0).sum() > 1 and same == (fields.get("router_input") == "first_token")
    answered = []
    for row, tokens in zip(rows, np.asarray(out["tokens"])):
        whole = np.concatenate([row.tokens, tokens[:4]]).astype(np.int32)
        segments = np.concatenate([row.segments, np.full(4, codes.ANSWER, np.int8)])
        answered.append(dataclasses.replace(row, tokens=whole, segments=segments))
    batch = tiny_llava.batch(answered, 22, 4)
    best = run.answer(state, batch)["logits"].argmax(-1)
    np.testing.assert_array_equal(best, np.asarray(out["tokens"]))
    assert len(np.unique(best)) > 1


@pytest.mark.parametrize("name", ["moelora", "branchlora"])
def test_a_router_that_reads_the_first_token_sees_the_same_in_every_sample(name):
    """BOS sees only itself, so that its activations, and the mixture, are constants; a token's own activation is none."""
    spread = {}
    for kind in ("first_token", "token"):
        method = harness.small(name, router_input=kind)
        run, state = started(method)
        observe = lambda *state, method=method, run=run: method.shown_gates(*seen(method, run, *state))
        batch = tiny_llava.batch(run.rows(1)[:6] + run.rows(0)[:2])
        gates = np.asarray(jax.jit(observe)(state.params, state.memory, batch, state.stage))
        spread[kind] = np.abs(gates - gates[:1]).max()
    assert spread["first_token"] < 1e-5 < 1e-3 < spread["token"]


def seen(method, run, params, memory, batch, stage):
    """(gates, contexts) of the current task's routers."""
    sight = steps_of.look(run.llava, method, params, memory, batch, stage, probing=True)
    x = sight.inputs.embeddings
    out = run.llava.decode(x, adapter=method.adapter(params, sight.gates, None), cache_size=x.shape[1])
    return sight.gates, out.contexts


def test_frozen_branches_rest_bit_by_bit_and_the_others_move():
    """With weight decay, in training, linear by linear and layer by layer; tokens may still be routed to them."""
    run, state = started(harness.small("branchlora", topk=1), backbone="stub", train=battery.TRAIN)
    before = jax.tree.map(np.array, state)
    after, _ = run.fit(state, run.method.trainable_mask(state, run.info(1)), 1, 3)
    frozen = before.memory["frozen"]
    assert 0 < sum(mask.sum() for mask in frozen.values()) < sum(mask.size for mask in frozen.values())
    for name, mask in frozen.items():
        same = (before.params["branches"][name] == np.asarray(after.params["branches"][name])).all(axis=(2, 3))
        np.testing.assert_array_equal(same, mask > 0)
    again = run.method.end_task(after, run.info(1), run.probe).memory["frozen"]
    assert all(np.all(again[name] >= mask) for name, mask in frozen.items())


def test_a_trunk_that_is_frozen_after_some_tasks():
    run = harness.Harness(harness.small("branchlora", freeze_a_after=1), backbone="stub")
    assert [("trunk" in run.method.trainable(run.info(index))) for index in range(3)] == [True, False, False]
    assert "trunk" in BranchLoRA().trainable(run.info(2))


@pytest.mark.parametrize("name", NAMES)
def test_each_says_why_it_cannot_be_one_adapter(name):
    run, state = started(harness.small(name), backbone="stub")
    method = run.method
    with pytest.raises(ValueError, match=f"^{name} cannot be folded into one adapter: "):
        method.fold(state, 0)
    with pytest.raises(ValueError, match=f"^{name} has (no block 99|ranks in the mm_projector)"):
        method.block(state, 99)


@pytest.mark.parametrize("name", ["moelora", "branchlora", "sema"])
def test_blocks_one_by_one_are_the_method_without_gates(name):
    """The blocks' plain sum is the method with every gate at 1."""
    run, state = started(harness.small(name), backbone="stub")
    method, x = run.method, np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    blocks = [method.block(state, index)["q_proj"] for index in range(method.blocks(state))]
    plain = sum(method.scale * (x @ block["a"][0]) @ block["b"][0] for block in blocks)
    params = state.params
    if name == "branchlora":
        expected = method.scale * sum((x @ params["trunk"]["q_proj"][0]) @ branch for branch in params["branches"]["q_proj"][0])
    else:
        pool = params.get("pool", params["block"])["q_proj"]
        expected = method.scale * (x @ np.asarray(params["block"]["q_proj"]["a"][0])) @ np.asarray(params["block"]["q_proj"]["b"][0])
        expected = expected + (method.scale * (x @ np.asarray(pool["a"][0])) @ np.asarray(pool["b"][0]) if name == "sema" else 0)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)
