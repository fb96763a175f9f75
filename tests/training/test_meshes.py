"""The training step on eight devices in every shape of the mesh: the numbers of one device, and only the messages that it needs."""

from __future__ import annotations

import dataclasses
import functools
import re
import types

import harness
import jax
import numpy as np
import pytest
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.models.llava import random_llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training import loop
from proglora_jax.training import step as steps_of
from proglora_jax.training.collectives import collectives

TRAIN = dataclasses.replace(harness.TRAIN, epsilon=1e-2)
SHAPES = ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "model": 2}, {"fsdp": 4, "model": 2})
SCALARS = 64  # bytes of losses and counts, which are summed over the devices too


@functools.cache
def stepped(*sizes: tuple[str, int]):
    """(text of the compiled step, loss, trainable parameters after one step, bytes of what trains, the model) on a mesh."""
    run = harness.Harness(harness.small("lora", train_mm_projector=False, dropout=0.0), shape=dict(sizes), train=TRAIN)
    state, mask = run.begin(run.initial(), 0)
    # B is drawn as well: where it is zero, A has no gradient
    rng = np.random.default_rng(5)
    moved = lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    trainable, frozen = trees.partition(jax.tree.map(moved, state.params), mask)
    phase = loop.start_phase(trainable, TRAIN, run.mesh)
    # two long rows with images, six text-only ones: with a row a device, most devices see no image at all
    rows = [tiny_llava.row(np.random.default_rng(i), image=i in (0, 5), example=i) for i in range(8)]
    frozen = meshes.put_replicated(frozen, run.mesh)
    arguments = phase.trainable, phase.optimizer, frozen, {}, run.llava, meshes.put_batch(tiny_llava.batch(rows), run.mesh)
    compiled = run.step(False).lower(*arguments, run.control(0, 0, 2)).compile()
    after, _, metrics = compiled(*arguments, run.control(0, 0, 2))
    return compiled.as_text(), float(metrics["loss"]), trees.flatten(meshes.to_host(after)), trees.count_bytes(trainable), run.llava


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_devices_give_what_one_gives(shape):
    _, loss, params, _, _ = stepped()
    _, also, spread, _, _ = stepped(*shape.items())
    np.testing.assert_allclose(also, loss, rtol=2e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(spread[path], leaf, rtol=1e-4, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "model" not in shape], ids=str)
def test_devices_sum_the_adapters_gradients_and_gather_weights_and_say_nothing_else(shape):
    text, _, _, trainable, llava = stepped(*shape.items())
    found = collectives(text)
    summed = sum(one.bytes * one.times for one in found if one.kind in ("all-reduce", "reduce-scatter"))
    assert trainable <= summed <= trainable + SCALARS
    gathered = [one for one in found if one.kind == "all-gather"]
    tree = trees.flatten(llava.to_tree())
    split = [path for path, leaf in tree.items() if not leaf.sharding.is_fully_replicated]
    assert bool(split) == ("fsdp" in shape)
    layers = llava.config.text_config.num_hidden_layers
    kernels = sum(tree[path].nbytes for path in split if path.startswith("language/layers"))
    # every kernel of the decoder once forward and once backward; the head, embeddings and the vision tower's layers once
    rest = sum(tree[path].nbytes for path in split) - kernels
    assert sum(one.bytes * one.times for one in gathered) <= 2 * kernels + 2 * rest
    assert max((one.bytes for one in gathered), default=0) <= max((tree[path].nbytes // (layers if "layers" in path else 1)
                                                                   for path in split), default=0)


@pytest.mark.parametrize("shape, each, parts", [
    ((4, 1, 1), 1, [0, 1, 2, 3]), ((2, 2, 1), 2, [0, 1]), ((2, 1, 2), 1, [0, 0, 1, 1]), ((1, 1, 4), 1, [0, 0, 0, 0]),
    ((1, 2, 2), 2, [0, 1]), ((2, 2, 4), 8, [0, 1]), ((1, 1, 2), 1, [0, 0]), ((2, 1, 3), 2, None), ((3, 1, 2), 3, None),
])  # fmt: skip
def test_processes_along_the_axis_model_load_the_same_rows(shape, each, parts):
    """`each` devices a process, in order; the last two meshes cut a process's devices between two parts of the rows."""
    devices = np.asarray([types.SimpleNamespace(process_index=number // each) for number in range(int(np.prod(shape)))])
    mesh = types.SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(meshes.AXES, shape)))
    processes = range(len(devices) // each)
    if parts is None:
        for process in processes:
            with pytest.raises(ValueError, match=f"would hold unequal parts; .* multiple of them .{each}."):
                meshes.row_share(mesh, process)
        return
    assert [meshes.row_share(mesh, process) for process in processes] == [(part, max(parts) + 1) for part in parts]


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_new_token_moves_activations_and_no_weights(shape):
    run = harness.Harness(harness.small("lora"), shape=shape)
    state = run.initial()
    batch = tiny_llava.batch([tiny_llava.row(np.random.default_rng(i), answer=0, image=i != 3) for i in range(8)], 20, 0)
    single = harness.Harness(harness.small("lora"))
    answers, text = [], ""
    for one in (single, run):
        generate = steps_of.make_generator(one.method, one.mesh, 4, tiny_llava.EOS, tiny_llava.PAD, tiny_llava.VOCAB)
        arguments = (*meshes.put_replicated((state.params, state.memory), one.mesh), one.llava, meshes.put_batch(batch, one.mesh),
                     state.stage)  # fmt: skip
        text = (compiled := generate.lower(*arguments).compile()).as_text()
        answers.append(np.asarray(compiled(*arguments)["tokens"]))
    np.testing.assert_array_equal(*answers)
    turn = [one for one in collectives(text) if one.turn]
    text_config, rank = run.llava.config.text_config, run.method.rank
    # nothing is larger than what the linears of one input give for all rows (low-rank part beside), or the scores of the vocabulary
    widest = max(3 * (text_config.hidden_size + rank), 2 * (text_config.intermediate_size + rank), tiny_llava.VOCAB)
    assert turn and max(one.bytes for one in turn) <= 8 * widest * 4
    # weights do move once, when the prompts are read
    assert any(one.kind == "all-gather" and not one.turn for one in collectives(text))


# No two widths are alike, and none is a number of positions, so that a kernel's gradient is known by its shape.
UNLIKE = LlavaConfig(
    text_config=LlamaConfig(vocab_size=tiny_llava.VOCAB, hidden_size=52, intermediate_size=60, num_hidden_layers=3, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=12),
    vision_config=ClipConfig(hidden_size=36, intermediate_size=44, projection_dim=8, num_hidden_layers=2, num_attention_heads=2,
                             image_size=8, patch_size=4),
    image_token_id=tiny_llava.IMAGE_TOKEN, pad_token_id=tiny_llava.PAD,
)  # fmt: skip


@pytest.mark.parametrize("name, stage, shape", [
    ("lora", 0, {}), ("proglora_dynamic", 2, {}), ("proglora_dynamic", 2, {"data": 2, "fsdp": 4}),
], ids=str)  # fmt: skip
def test_nothing_frozen_has_a_gradient_or_optimizer_state(monkeypatch, name, stage, shape):
    """Neither any kernel of the backbone nor, where there is a pool, the blocks of earlier tasks."""
    monkeypatch.setattr(tiny_llava, "CONFIG", UNLIKE)
    run = harness.Harness(harness.small(name, dropout=0.0, rank=5), shape=shape, train=TRAIN)
    run.llava = tiny_llava.place(random_llava(UNLIKE, seed=3), run.mesh)
    state = run.initial()
    for index in range(stage + 1):
        state, mask = run.begin(state, index)
    trainable, frozen = trees.partition(state.params, mask)
    phase = loop.start_phase(trainable, TRAIN, run.mesh)
    batch = meshes.put_batch(tiny_llava.batch([tiny_llava.row(np.random.default_rng(i)) for i in range(8)]), run.mesh)
    arguments = (phase.trainable, phase.optimizer, *meshes.put_replicated((frozen, state.memory), run.mesh), run.llava, batch)
    text = run.step(False).lower(*arguments, run.control(0, stage, 2)).compile().as_text()
    either = lambda shape: {shape[-2:], shape[-2:][::-1]}
    projector = set().union(*(either(leaf["kernel"].shape) for leaf in meshes.to_host(run.llava.projector_params()).values()))
    kernels = [leaf.shape for path, leaf in trees.flatten(run.llava.to_tree()).items()
               if path.endswith(("kernel", "embed_tokens")) and "mm_projector" not in path]
    # a kernel's gradient would be a product of its shape or of its shape turned, of one layer, or of them all if summed over the stack
    products = {tuple(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)}
    found = products & (set().union(*map(either, kernels)) - projector)
    assert len(kernels) == 16 and not found, found
    # the trainable block's are there, so the words above are those of this compiler; frozen blocks of the pool beside it have none
    block = {path: leaf.shape for path, leaf in trees.flatten(trainable).items() if leaf.ndim == 3}
    assert len(block) == 14 and products & set().union(*(either(shape) for shape in block.values()))
    # what comes out: what trains and two moments of it, and metrics
    outputs = re.search(r"entry_computation_layout=\{\(.*\)->(.*)\}", text)[1]
    given = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", outputs)]
    assert len([dims for dims in given if len(dims) >= 2]) == 3 * len([leaf for leaf in jax.tree.leaves(trainable) if leaf.ndim >= 2])
