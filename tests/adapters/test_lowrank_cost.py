"""What the pair costs, read from compiled programs: 3 matmuls per linear forward, 8 with its backward, and no FLOP for what is frozen.

FLOPs are those of the matmuls in the optimised program, from their shapes: `cost_analysis` would add elementwise work, whose count
depends on how the backend fuses, and would count the body of a loop over layers once.
"""

from __future__ import annotations

import dataclasses
import functools

import hlo_dots
import jax
import jax.numpy as jnp
import pytest
import tiny_llava

from proglora_jax.adapters import lowrank
from proglora_jax.methods.registry import METHODS

BATCH, STEPS, D_IN, D_OUT, RANK = 4, 128, 320, 448, 16
TOKENS = BATCH * STEPS


def shapes(slots: int, dtype=jnp.float32):
    """Abstract inputs of one linear: x, its kernel, and the pair's six arrays."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return dict(
        x=jax.ShapeDtypeStruct((BATCH, STEPS, D_IN), dtype), kernel=jax.ShapeDtypeStruct((D_IN, D_OUT), dtype),
        pool_a=f32(D_IN, slots * RANK), pool_b=f32(slots * RANK, D_OUT), pool_gate=f32(BATCH, 1, slots * RANK),
        a=f32(D_IN, RANK), b=f32(RANK, D_OUT), gate=f32(BATCH, 1, RANK),
    )  # fmt: skip


def linear(x, kernel, pool_a, pool_b, pool_gate, a, b, gate, mix):
    return x @ kernel + lowrank.pooled_low_rank(x, pool_a, pool_b, pool_gate, a, b, gate, 2.0, mix)


def gradient(mix):
    """Value and gradient with respect to x, the trainable factors and both gates; the kernel and the pool are frozen."""

    def loss(free, frozen):
        return jnp.square(linear(**free, **frozen, mix=mix).astype(jnp.float32)).sum()

    return jax.value_and_grad(loss)


def frozen_apart(arguments):
    names = ("kernel", "pool_a", "pool_b")
    return {k: v for k, v in arguments.items() if k not in names}, {k: arguments[k] for k in names}


@pytest.mark.parametrize("mix", ["delta", "factor"])
@pytest.mark.parametrize("slots", [0, 7])
def test_forward_takes_three_matmuls(slots, mix):
    arguments = shapes(slots)
    flops = hlo_dots.dots(hlo_dots.compiled_text(functools.partial(linear, mix=mix), *arguments.values()))
    ranks = (slots + 1) * RANK
    assert sorted(flops) == sorted([2 * TOKENS * D_IN * D_OUT, 2 * TOKENS * D_IN * ranks, 2 * TOKENS * ranks * D_OUT])


def test_linears_that_read_the_same_input_share_what_touches_it():
    """Of three linears: one matmul down, one back and one of the gradient of A instead of three each, and the same work."""
    arguments, widths = shapes(7), (448, 192, 64)
    one = {name: arguments[name] for name in ("pool_a", "pool_gate", "a", "gate")}
    up = lambda rank, width: jax.ShapeDtypeStruct((rank, width), jnp.float32)
    pairs = tuple(lowrank.Pair(**one, pool_b=up(7 * RANK, width), b=up(RANK, width)) for width in widths)

    def loss(x, trained, pairs):
        whole = tuple(dataclasses.replace(pair, a=a, b=b) for pair, (a, b) in zip(pairs, trained, strict=True))
        return sum(jnp.square(y).sum() for y in lowrank.pooled_low_rank_group(x, whole, 2.0, "delta"))

    trained = tuple((pair.a, pair.b) for pair in pairs)
    flops = hlo_dots.dots(hlo_dots.compiled_text(jax.value_and_grad(loss, (0, 1)), arguments["x"], trained, pairs))
    assert len(flops) == (1 + 3) + (3 + 1 + 1 + 3)
    down, every = 3 * D_IN, 3 * D_IN + sum(widths)
    assert sum(flops) == 2 * TOKENS * (2 * 8 * RANK * every + RANK * (down + sum(widths)))


@pytest.mark.parametrize("mix", ["delta", "factor"])
@pytest.mark.parametrize("slots", [0, 7])
def test_forward_and_backward_take_eight_matmuls_and_none_for_what_is_frozen(slots, mix):
    text = hlo_dots.compiled_text(gradient(mix), *frozen_apart(shapes(slots)))
    flops, ranks = hlo_dots.dots(text), (slots + 1) * RANK
    assert len(flops) == 8
    kernel = 2 * 2 * D_IN * D_OUT  # forward and dx, per token; a third one would be dW
    pair = 2 * 2 * ranks * (D_IN + D_OUT)  # down, up, and both backward to the input
    factors = 2 * RANK * (D_IN + D_OUT)  # dA and dB of the trainable ranks alone
    assert sum(flops) <= 1.001 * TOKENS * (kernel + pair + factors)
    assert sum(flops) >= TOKENS * (kernel + pair + factors)


def test_the_loop_that_it_replaces_takes_more(rng):
    """The counter sees what the test above forbids: a loop over blocks under autodiff, with a trainable kernel."""

    def loop(x, kernel, blocks):
        y = x @ kernel + sum((x @ a) @ b for a, b in blocks)
        return jnp.square(y).sum()

    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    blocks = [(f32(D_IN, RANK), f32(RANK, D_OUT)) for _ in range(3)]
    text = hlo_dots.compiled_text(jax.value_and_grad(loop, (0, 1, 2)), f32(TOKENS, D_IN), f32(D_IN, D_OUT), blocks)
    flops = hlo_dots.dots(text)
    # Forward 1 + 2 * 3; backward dx and dW of the kernel and of each of six factors.
    assert len(flops) == 7 + 14
    assert sum(flops) == 2 * TOKENS * 3 * (D_IN * D_OUT + 3 * RANK * (D_IN + D_OUT))


def test_half_precision_has_no_extra_matmul():
    text = hlo_dots.compiled_text(gradient("delta"), *frozen_apart(shapes(3, jnp.bfloat16)))
    assert len(hlo_dots.dots(text)) == 8


@functools.cache
def decoder_text(name: str | None, unroll: int, backward: bool = False) -> str:
    """The program of the tiny model's decoder with the adapter of a method that is in its third stage."""
    llava = tiny_llava.model(unroll=unroll)
    x = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
    if name is None:
        return hlo_dots.compiled_text(lambda llava, x: llava.decode(x).hidden, llava, x)
    method = METHODS[name](rank=4)
    state = jax.eval_shape(lambda: method.init(llava.targets(), llava.projector_params(), 3, 0))
    gates = {"pool": jnp.ones((2, 1, 8)), "new": jnp.ones((2, 1, 4)), "blocks": jnp.ones((2, 3))}
    if name == "lora":
        gates = method.gates({}, {}, None)

    def hidden(free, params, llava, x):
        return llava.decode(x, adapter=method.adapter(params | {"block": free}, gates, None)).hidden.sum()

    run = jax.value_and_grad(hidden) if backward else hidden
    return hlo_dots.compiled_text(run, state.params["block"], state.params, llava, x)


@pytest.mark.parametrize("name", ["lora", "proglora_dynamic"])
def test_a_scanned_layer_takes_one_matmul_more_per_input_and_one_per_linear(name):
    counts = []
    for which in (None, name):
        text = decoder_text(which, 1)
        (body,) = hlo_dots.loop_bodies(text)
        counts.append(len(hlo_dots.dots(text, hlo_dots.reachable(text, body))))
    attention = 2  # scores and mix
    inputs = 4  # q, k and v read the same, and so do gate and up
    assert counts == [7 + attention, 7 + inputs + 7 + attention]


def test_an_unrolled_decoder_costs_what_its_shapes_say():
    flops = hlo_dots.dots(decoder_text("proglora_dynamic", 2, backward=True))
    targets, tokens, free, ranks = tiny_llava.model().targets(), 32, 4, 12
    size = lambda names: sum(targets.linears[name][0] * targets.linears[name][1] for name in names)
    widths = sum(d_in + d_out for d_in, d_out in targets.linears.values())
    attention = 2 * 2 * 16 * 16 * 32  # two rows, 16 x 16 positions, all 32 channels: scores or mix
    layer = 2 * tokens * (2 * size(targets.linears) + 2 * ranks * widths + free * widths) + 6 * attention
    # Nothing trains before the first layer, so q, k and v need not pass a gradient on there, through neither kernel nor pair.
    first = 2 * tokens * (size(("q_proj", "k_proj", "v_proj")) + 3 * ranks * 32)
    inputs = 4  # one read by q, k and v, one by gate and up: for each a matmul down, one back, and one of the gradient of A
    assert len(flops) == 2 * (7 * (8 - 3) + 3 * inputs + 6) - 4
    assert sum(flops) == 2 * layer - first


def test_in_sixteen_bits_nothing_as_wide_as_an_output_is_of_thirty_two():
    """The scale is on the ranks and the matmul rounds: what is added to the frozen linear's output is one array of its dtype."""
    arguments = shapes(7, jnp.bfloat16)
    text = str(jax.make_jaxpr(gradient("delta"))(*frozen_apart(arguments)))
    deltas = [line for line in text.splitlines() if "dot_general" in line]
    assert len(deltas) == 8 and not any(f"f32[{BATCH},{STEPS},{width}]" in line for line in deltas for width in (D_IN, D_OUT))
