"""The benchmark of the pool: its forms are one function, its counts are those of the shapes, and a tiny call writes all files."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def pool(load_benchmark):
    """benchmarks/pool.py as a module."""
    return load_benchmark("pool")


def test_the_forms_of_eight_blocks_are_one_function(pool, rng):
    given = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), pool.arguments_of((2, 3, 5, 7), 8, "float32"))
    gates = np.repeat(rng.random((2, 1, 8)), pool.RANK, axis=-1).astype(np.float32)  # a gate for each block
    given["pair"] = dataclasses.replace(given["pair"], pool_gate=gates[..., : -pool.RANK], gate=gates[..., -pool.RANK :])
    found = [pool.both(delta, **given) for blocks, delta, _ in pool.FORMS.values() if blocks == 8]
    assert len(found) == 3
    for y, (dx, trained) in found[1:]:
        first, (first_dx, first_trained) = found[0]
        np.testing.assert_allclose(y, first, rtol=2e-5, atol=1e-3)
        np.testing.assert_allclose(dx, first_dx, rtol=2e-5, atol=1e-3)
        for name in ("a", "b"):
            np.testing.assert_allclose(trained[name], first_trained[name], rtol=2e-5, atol=1e-3)
    pair = given["pair"]
    whole = np.concatenate([pair.pool_a, pair.a], -1).astype(np.float64), np.concatenate([pair.pool_b, pair.b]).astype(np.float64)
    by_hand = given["x"] @ given["kernel"] + pool.SCALE * ((given["x"] @ whole[0]) * gates) @ whole[1]
    np.testing.assert_allclose(found[0][0], by_hand, rtol=2e-5, atol=1e-3)


def test_counts_by_hand(pool):
    shape = (2, 8, 16, 24)
    once, whole = pool.ideal(shape, 8)
    assert once == 2 * 16 * (16 * 24 + 8 * 16 * 40) and whole == 2 * once + 2 * 16 * 16 * 40
    rows = {name: pool.count(shape, name) for name in pool.FORMS}
    matmuls = {name: (row["forward_matmuls"], row["both_matmuls"]) for name, row in rows.items()}
    assert matmuls == {"N=1": (3, 8), "N=8, fused": (3, 8), "N=8, fused, plain autodiff": (3, 8), "N=8, loop over blocks": (17, 36)}
    assert all(row["forward_by_ideal"] == 1 for row in rows.values())
    assert rows["N=8, fused"]["both_by_ideal"] == 1 < rows["N=8, fused, plain autodiff"]["both_by_ideal"]


def test_a_tiny_call_writes_all_files(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "compile_step", lambda sizes, layers, in_loop: {
        "layers": layers, "in_loop": in_loop, "width": 32, "cpu_s": 1.0, "wall_s": 2.0, "lines": 3})
    found = pool.measure(pool.TINY)
    assert [row["form"] for row in found["timed"]] == list(pool.FORMS) and all(row["ratio"] > 0 for row in found["timed"])
    assert [(row["layers"], row["in_loop"]) for row in found["compiled"]] == [(2, True), (2, False)]
    pool.write(found | {"jax": "0", "cores": 1, "load": 0.5}, tmp_path)
    assert "| 2 | " in (tmp_path / "pool.md").read_text() and (tmp_path / "pool.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_loop_over_layers_makes_a_shorter_program(pool):
    loop, none = (pool.compile_step(pool.TINY.sizes, 4, in_loop) for in_loop in (True, False))
    assert 0 < loop["lines"] < none["lines"] and loop["cpu_s"] > 0 and (loop["in_loop"], none["in_loop"]) == (True, False)


def test_the_committed_numbers_hold_what_the_pool_promises(pool):
    found = pool.read(pool.RESULTS, "pool")
    own = [row for row in found["counted"] if row["form"] in ("N=1", "N=8, fused")]
    assert own and all(row["both_by_ideal"] <= 1.001 and (row["forward_matmuls"], row["both_matmuls"]) == (3, 8) for row in own)
