"""FLOPs and collectives read out of programs: against XLA's own count, against the roofline, and against messages that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_memory import BLOCKS, last_stage, settings_of

from proglora_jax.core import mesh as meshes
from proglora_jax.models.presets import PRESETS
from proglora_jax.training import programs, roofline, shapes
from proglora_jax.training.collectives import collectives
from proglora_jax.training.flops import matmul_work


def test_matmuls_are_counted_as_xla_counts_them_and_loops_by_their_lengths():
    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0].sum()

    def looped(x, stack):
        return jax.lax.while_loop(lambda state: state.sum() < 9.0, lambda state: state @ stack[0], x)

    x, stack = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((5, 128, 128), jnp.float32)
    one = 2 * 64 * 128 * 128
    forward = matmul_work(jax.jit(layers).trace(x, stack).jaxpr)
    assert forward == (5 * one, 0.0, one)
    assert matmul_work(jax.jit(looped).trace(x, stack).jaxpr) == (0.0, one, one)
    gradient = jax.jit(jax.grad(lambda x, stack: layers(x, stack)))
    work = matmul_work(gradient.trace(x, stack).jaxpr)
    assert work.total == 10 * one
    unrolled = jax.jit(jax.grad(lambda x, stack: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack, unroll=5)[0].sum()))
    counted = unrolled.lower(x, stack).compile().cost_analysis()["flops"]
    assert work.total <= counted <= 1.02 * work.total  # XLA counts additions too


@pytest.mark.parametrize("remat", ["qkvo_mlp", "full"])
def test_the_7b_step_computes_what_the_roofline_says(remat):
    settings = settings_of(model__remat=remat, model__attention="xla", train__loss_groups=0)
    llava = shapes.abstract_backbone(PRESETS["llava15_7b"](), settings.model)
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    stage = last_stage(settings, llava)
    traced = programs.trace_train_step(settings, llava, stage, 8, (704, 64), mesh)
    planned = roofline.training_work(llava.config, llava.targets(), 704, 64, remat, BLOCKS, "xla")
    total = matmul_work(traced.jaxpr).total / 8
    # XLA's attention computes both halves of the causal square, and what is over the diagonal is thrown away
    square = 2 * 704**2 * 4096 * 31 * (4 if remat == "full" else 3.5)
    assert total == pytest.approx(planned.total + square, rel=0.002)


def test_collectives_are_found_with_their_sizes_and_how_often_they_run():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4}, jax.devices())

    def local(x, w):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x = jax.lax.scan(layer, x, w)[0]
        return jax.lax.psum(x, ("data", "fsdp"))

    split = jax.shard_map(local, mesh=mesh, in_specs=(P(("data", "fsdp")), P(None, "fsdp")), out_specs=P())
    text = jax.jit(split).lower(np.zeros((16, 32), np.float32), np.zeros((6, 32, 32), np.float32)).compile().as_text()
    found = {one.kind: one for one in collectives(text)}
    assert set(found) == {"all-gather", "all-reduce"} and len(collectives(text)) == 2
    gathered, summed = found["all-gather"], found["all-reduce"]
    assert (gathered.bytes, gathered.group, gathered.times, gathered.turn) == (32 * 32 * 4, 4, 6, False)
    assert (summed.bytes, summed.group, summed.times) == (2 * 32 * 4, 8, 1)
    assert gathered.moved == 6 * 32 * 32 * 4 * 3 / 4 and summed.moved == 2 * (2 * 32 * 4) * 7 / 8


TPU = """HloModule jit_step, entry_computation_layout={()->f32[]}

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%start (p: f32[2]) -> f32[8] {
  ROOT %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=16,'b'=2] {'a'}
}

%piece (p: f32[2]) -> f32[8] {
  ROOT %all-gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=16,'b'=2] {'a'}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async.1 = f32[8] fusion(%a), kind=kCustom, calls=%start
  ROOT %async.2 = f32[8] fusion(%a), kind=kCustom, calls=%piece
}

%open (p: (s32[], pred[8])) -> pred[] {
  %cap = s32[]{:T(128)} constant(128)
  %less = pred[] compare(%counter, %cap), direction=LT
  ROOT %both = pred[] and(%less, %unfinished)
}

%token (p: (s32[], pred[8])) -> (s32[], pred[8]) {
  ROOT %all-reduce.3 = (f32[4,8]{1,0}, f32[8]{0}) all-reduce(%a, %b), channel_id=9, replica_groups=[2,8]<=[16], to_apply=%add
}

ENTRY %main (p: f32[2]) -> f32[] {
  %while.1 = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  ROOT %while.2 = (s32[], pred[8]) while(%init), condition=%open, body=%token
}
"""


def test_the_pieces_of_an_asynchronous_collective_count_once_and_an_open_loop_per_turn():
    gathered, summed = collectives(TPU)
    assert (gathered.kind, gathered.bytes, gathered.group, gathered.times, gathered.turn) == ("all-gather", 64 * 128 * 2, 16, 32, False)
    assert (summed.kind, summed.bytes, summed.group, summed.times, summed.turn) == ("all-reduce", 4 * (32 + 8), 8, 1, True)


GPU = """HloModule jit_step, entry_computation_layout={()->f32[]}

ENTRY %main (p: f32[2]) -> f32[2] {
  %s.1 = ((bf16[64,64], bf16[4,16]), (bf16[256,64], bf16[16,16])) all-gather-start(%a, %b), channel_id=1, replica_groups=[1,4]<=[4]
  %all-gather-done = (bf16[256,64], bf16[16,16]) all-gather-done(%s.1)
  %all-reduce-start = ((bf16[70144]), bf16[70144]) all-reduce-start(%c), channel_id=2, replica_groups=[1,4]<=[4]
  %all-reduce-done = bf16[70144] all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((f32[32,64]), f32[8,64]) reduce-scatter-start(%d), channel_id=3, replica_groups=[1,4]<=[4]
  %reduce-scatter-done = f32[8,64] reduce-scatter-done(%reduce-scatter-start)
  %all-to-all-start = ((bf16[8,1,4,64]), bf16[8,1,4,64]) all-to-all-start(%e), channel_id=4, replica_groups=[1,4]<=[4]
  %all-to-all-done = bf16[8,1,4,64] all-to-all-done(%all-to-all-start)
  %all-reduce.9 = f32[32,1]{1,0} all-reduce(%f), channel_id=5, replica_groups=mesh['axis_0'=4] {'axis_0'}
}
"""


def test_asynchronous_collectives_of_gpus_count_their_results_and_not_their_operands():
    found = {(one.kind, one.shapes): one for one in collectives(GPU)}
    assert {key: (one.bytes, one.group, one.times) for key, one in found.items()} == {
        ("all-gather", ("bf16[256,64]", "bf16[16,16]")): (2 * (256 * 64 + 16 * 16), 4, 1),
        ("all-reduce", ("bf16[70144]",)): (2 * 70144, 4, 1),
        ("reduce-scatter", ("f32[8,64]",)): (4 * 8 * 64, 4, 1),
        ("all-to-all", ("bf16[8,1,4,64]",)): (2 * 8 * 4 * 64, 4, 1),
        ("all-reduce", ("f32[32,1]",)): (4 * 32, 4, 1),
    }
    assert found[("reduce-scatter", ("f32[8,64]",))].moved == 3 * 4 * 8 * 64
