"""What only a GPU can show, against the CPU of the same process: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_on_gpu.py"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proglora_jax.adapters.lowrank import pooled_low_rank
from proglora_jax.models.layers import attention
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training.attention_choice import choose_attention
from proglora_jax.training.loop_choice import ALL, choose_unroll
from proglora_jax.training.settings import from_config

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda,cpu")]
# Heads of 128, as LLaVA's: what cuDNN's attention is made for. Not all layers are alike in what they run: the last one is cut.
TEXT = LlamaConfig(vocab_size=96, hidden_size=256, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2)
VISION = ClipConfig(hidden_size=64, intermediate_size=96, projection_dim=32, num_hidden_layers=3, num_attention_heads=2, image_size=56,
                    patch_size=14)
CONFIG = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_id=3, pad_token_id=0)
ROWS, POSITIONS, LABELS = 4, 64, 6


@pytest.fixture(scope="module")
def sides(load_benchmark):
    """benchmarks/sides, the programs of a run at any size."""
    return load_benchmark("sides.ours"), load_benchmark("sides.rows")


def settings_of(platform: str, dtype: str, method: str = "proglora_dynamic", **model):
    config = {"method": {"name": method, "rank": 4, "alpha": 8.0, "a_init": "normal001"}, "data": {"root": "unused"},
              "model": {"dtype": dtype, "param_dtype": dtype, "attention": "auto", "remat": "qkvo_mlp", **model},
              "train": {"loss_norm": "global_token_mean", "learning_rate": 1e-2, "projector_learning_rate": 1e-3}}
    return choose_attention(choose_unroll(from_config(config), platform, {}), platform)[0]


def drawn(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The same numbers on every device."""
    rng = np.random.default_rng(sum(map(ord, path)))
    return jnp.asarray(0.05 * rng.standard_normal(leaf.shape), leaf.dtype)


def llava_for(ours, settings):
    make = lambda path, leaf: drawn(path, jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(settings.model.param_dtype))) + (
        path.endswith("/scale") * jnp.ones((), settings.model.param_dtype))
    return ours.build(CONFIG, make, ours.model_options(settings.model))


def losses_on(sides, device: jax.Device, settings, steps: int = 5) -> list[float]:
    ours, rows = sides
    with jax.default_device(device):
        side = ours.Ours(settings, CONFIG, 3, [device])
        program = side.compile_step(ROWS, (POSITIONS, LABELS))
        side.load(llava_for(ours, settings), drawn)
        batch = side.place(rows.random_batch(CONFIG, ROWS, POSITIONS, LABELS))
        return [float(side.train(program, batch)) for _ in range(steps)]


def cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def test_what_is_chosen_on_a_gpu():
    sixteen, full = settings_of("gpu", "bfloat16"), settings_of("gpu", "float32")
    assert (sixteen.model.attention, full.model.attention) == ("cudnn", "xla"), "cuDNN's kernel compiles, in 16 bits"
    assert sixteen.model.unroll == ALL and settings_of("cpu", "bfloat16").model.unroll == 1


def test_the_fused_attention_is_that_of_the_plain_one_forward_and_backward():
    """Causal with right padding and no mask: no array of positions by positions is made."""
    rng = np.random.default_rng(0)
    query, key, value, weight = (jnp.asarray(rng.standard_normal((2, 704, 4, 128)), jnp.float32) for _ in range(4))

    def loss(query, key, value, kind, dtype):
        mixed = attention(*(x.astype(dtype) for x in (query, key, value)), implementation=kind, causal=True)
        return (mixed.astype(jnp.float32) * weight).sum()

    gradients = {}
    for kind, dtype in (("cudnn", "bfloat16"), ("xla", "float32")):
        gradient = jax.jit(jax.value_and_grad(lambda *x, k=kind, d=dtype: loss(*x, k, d), argnums=(0, 1, 2)))
        program = gradient.lower(query, key, value).compile()
        gradients[kind] = program(query, key, value)
        text = program.as_text()
        assert ("fmha" in text) == (kind == "cudnn")
        assert bool(re.search(r"\[2,4,704,704\]|\[8,704,704\]", text)) == (kind == "xla"), "the scores"
    for fused, plain in zip(*(jax.tree.leaves(gradients[kind]) for kind in ("cudnn", "xla")), strict=True):
        assert float(jnp.linalg.norm(fused - plain) / jnp.linalg.norm(plain)) < 1e-2


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_fused_pool_is_a_loop_over_blocks(dtype, tolerance):
    """Values and gradients against float64 on the host, by relative norms."""
    rng, rank, blocks, d_in, d_out = np.random.default_rng(1), 16, 7, 256, 384
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)
    x, dy, pool_a, pool_b = draw(2, 64, d_in), draw(2, 64, d_out), draw(d_in, blocks * rank), draw(blocks * rank, d_out)
    a, b, gates, own = draw(d_in, rank), draw(rank, d_out), rng.uniform(size=(2, 1, blocks)), rng.uniform(size=(2, 1, 1))
    y = 2.0 * own * (x @ a @ b)
    for block in range(blocks):
        at = slice(block * rank, (block + 1) * rank)
        y = y + 2.0 * gates[..., block : block + 1] * (x @ pool_a[:, at] @ pool_b[at])
    wanted = {"y": y, "a": 2.0 * np.einsum("bti,btr->ir", x, own * (dy @ b.T)), "b": 2.0 * np.einsum("btr,bto->ro", own * (x @ a), dy)}

    def loss(a, b):
        gate = jnp.repeat(jnp.asarray(gates, jnp.float32), rank, -1), jnp.repeat(jnp.asarray(own, jnp.float32), rank, -1)
        y = pooled_low_rank(jnp.asarray(x, dtype), jnp.float32(pool_a), jnp.float32(pool_b), gate[0], a, b, gate[1], 2.0)
        return (y.astype(jnp.float32) * dy.astype(np.float32)).sum(), y

    with jax.default_matmul_precision("highest"):
        (_, y), (da, db) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(jnp.float32(a), jnp.float32(b))
    for name, found in (("y", y), ("a", da), ("b", db)):
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted[name]) / np.linalg.norm(wanted[name])
        assert error < tolerance, (name, error)


def test_training_is_that_of_the_cpu(sides):
    """Five steps in float32 with XLA's attention and a loop, in bfloat16 with cuDNN's and without one."""
    wanted = losses_on(sides, cpu(), settings_of("cpu", "float32"))
    assert wanted[0] - wanted[-1] > 0.1, "it learns"
    full = losses_on(sides, jax.devices()[0], settings_of("gpu", "float32", unroll=1))
    np.testing.assert_allclose(full, wanted, rtol=2e-4)
    sixteen = losses_on(sides, jax.devices()[0], settings_of("gpu", "bfloat16"))
    np.testing.assert_allclose(sixteen, wanted, rtol=2e-2)


def test_no_matmul_is_done_twice(sides):
    """A layer more is so many matmuls more, and a loop's body has one layer's: a compiler that copies them into fusions does them again."""
    ours, _ = sides

    def count(layers: int, micro_batches: int = 1, **model) -> int:
        config = dataclasses.replace(CONFIG, text_config=dataclasses.replace(TEXT, num_hidden_layers=layers))
        settings = settings_of("gpu", "bfloat16", **model)
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, micro_batches=micro_batches))
        program = ours.Ours(settings, config, 3).compile_step(ROWS, (POSITIONS, LABELS))
        return program.as_text().count('custom_call_target="__cublas')

    three, four, looped = count(3), count(4), count(3, unroll=1)
    assert four - three == three - looped == LAYER_MATMULS - JOINED  # two layers run before the last one, which is cut
    assert count(4, micro_batches=2) - count(3, micro_batches=2) == LAYER_MATMULS - JOINED  # the loop over them is no loop over layers


# Of seven linears: forward x W, h B; backward dy W', dy B', and dB = h' dy; and for the four groups that read the same x: x A, du A', and
# dA = x' du.
LAYER_MATMULS = 7 * 5 + 4 * 3
JOINED = 3
"""XLA makes x W of q, k and v one matmul, and of gate and up, where they are as small as here."""


def test_answers_are_those_of_the_cpu(sides):
    ours, rows = sides
    found = []
    for device, platform in ((cpu(), "cpu"), (jax.devices()[0], "gpu")):
        with jax.default_device(device):
            settings = settings_of(platform, "float32")
            side = ours.Ours(settings, CONFIG, 3, [device])
            program = side.compile_generator(ROWS, POSITIONS, 8)
            side.load(llava_for(ours, settings), drawn)
            found.append(np.asarray(side.generate(program, side.place(rows.random_batch(CONFIG, ROWS, POSITIONS, 0)))))
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 1


@pytest.mark.slow
def test_the_main_job_runs(tmp_path):
    pytest.importorskip("grain")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "XLA_FLAGS": "",
                   "JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "proglora_jax.main", "--config=configs/coin_mini.py:smoke", f"--workdir={tmp_path}",
               "--config.model.dtype=bfloat16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["tasks"]) == 3 and "attention cudnn" in done.stdout + done.stderr
