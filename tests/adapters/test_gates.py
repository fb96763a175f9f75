"""Routing: the pooled feature, the query projector against torch, the softmaxes, the bonus, and the recall divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from proglora_jax.adapters import gates


@pytest.fixture
def embedded(rng):
    """Embeddings f32[3, 6, 4] and a mask with a full, a short and an empty row."""
    x = rng.standard_normal((3, 6, 4)).astype(np.float32) - 2.0  # mostly negative: a maximum that is floored at 0 would show
    mask = np.array([[True] * 6, [False, True, True, False, False, False], [False] * 6])
    return x, mask


def test_route_feature_is_the_maximum_over_the_mask(embedded):
    x, mask = embedded
    z = gates.route_feature(x, mask)
    np.testing.assert_array_equal(z, np.stack([x[0].max(0), x[1, 1:3].max(0), np.zeros(4)]))
    assert z.dtype == jnp.float32
    assert gates.route_feature(jnp.asarray(x, jnp.bfloat16), mask).dtype == jnp.float32


def test_mean_feature_is_the_mean_over_the_mask(embedded):
    x, mask = embedded
    np.testing.assert_allclose(gates.mean_feature(x, mask), np.stack([x[0].mean(0), x[1, 1:3].mean(0), np.zeros(4)]), rtol=1e-6)


@pytest.mark.parametrize("feature", [gates.route_feature, gates.mean_feature])
def test_features_do_not_see_padding_or_other_rows(embedded, feature, rng):
    x, mask = embedded
    whole = feature(x, mask)
    noisy = np.where(mask[..., None], x, 1e6 * rng.standard_normal(x.shape).astype(np.float32))
    wide = np.pad(noisy, ((0, 0), (0, 5), (0, 0)), constant_values=1e6), np.pad(mask, ((0, 0), (0, 5)))
    np.testing.assert_allclose(feature(*wide), whole, rtol=1e-6)
    for row in range(3):
        np.testing.assert_allclose(feature(noisy[row : row + 1], mask[row : row + 1]), whole[row : row + 1], rtol=1e-6)


def random_projector(rng, width=6, inner=5):
    params = gates.init_query_projector(rng, width, inner)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)


def torch_projector(params, variant):
    """nn.Linear, SiLU and LayerNorm with the same numbers."""
    first, second, norm = params["linear_1"], params["linear_2"], params["norm"]
    width, inner = first["kernel"].shape
    bias = variant == "paper"
    linears = torch.nn.Linear(width, inner, bias=bias), torch.nn.Linear(inner, width, bias=bias)
    for module, leaf in zip(linears, (first, second)):
        module.weight.data = torch.tensor(leaf["kernel"].T)
        if bias:
            module.bias.data = torch.tensor(leaf["bias"])
    last = torch.nn.LayerNorm(width, eps=1e-5)
    last.weight.data, last.bias.data = torch.tensor(norm["scale"]), torch.tensor(norm["bias"])
    silu = torch.nn.SiLU()
    order = (linears[0], silu, linears[1]) if bias else (linears[0], linears[1], silu)
    return torch.nn.Sequential(*order, last)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_query_projector_and_its_gradient_are_torchs(rng, variant):
    params, z = random_projector(rng), rng.standard_normal((4, 3, 6)).astype(np.float32)
    weight = rng.standard_normal((4, 3, 6)).astype(np.float32)
    module, z_torch = torch_projector(params, variant), torch.tensor(z, requires_grad=True)
    expected = module(z_torch)
    (expected * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(gates.query_projector(params, z, variant), expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda params, z: (gates.query_projector(params, z, variant) * weight).sum(), (0, 1))(params, z)
    np.testing.assert_allclose(gradient[1], z_torch.grad, rtol=1e-4, atol=1e-5)
    modules = [m for m in module if isinstance(m, torch.nn.Linear)]
    for name, linear in zip(("linear_1", "linear_2"), modules):
        np.testing.assert_allclose(gradient[0][name]["kernel"], linear.weight.grad.T, rtol=1e-4, atol=1e-5)
        if variant == "paper":
            np.testing.assert_allclose(gradient[0][name]["bias"], linear.bias.grad, rtol=1e-4, atol=1e-5)
        else:
            assert not np.any(gradient[0][name]["bias"])
    np.testing.assert_allclose(gradient[0]["norm"]["scale"], module[3].weight.grad, rtol=1e-4, atol=1e-5)


def test_projector_starts_xavier_uniform_with_an_identity_norm(rng):
    params = gates.init_query_projector(rng, 300, 100)
    bound = np.sqrt(6 / 400)
    for name, shape in (("linear_1", (300, 100)), ("linear_2", (100, 300))):
        kernel = params[name]["kernel"]
        assert kernel.shape == shape and kernel.dtype == np.float32 and not np.any(params[name]["bias"])
        assert 0.999 * bound < np.abs(kernel).max() <= bound * 1.000001
        assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(kernel.size)
    assert np.all(params["norm"]["scale"] == 1) and not np.any(params["norm"]["bias"])
    assert not np.array_equal(params["linear_1"]["kernel"], params["linear_2"]["kernel"].T)


def test_a_key_is_xavier_uniform_on_one_row(rng):
    key, bound = gates.init_key(rng, 5000), np.sqrt(6 / 5001)
    assert key.shape == (5000,) and key.dtype == np.float32
    assert 0.99 * bound < np.abs(key).max() <= bound * 1.000001
    assert abs(key.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(5000)
    first, second = (gates.init_key(np.random.default_rng(1), 8, scale) for scale in (1.0, 2.5))
    np.testing.assert_allclose(second, 2.5 * first, rtol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_block_softmax_ignores_later_blocks_exactly(rng, stage):
    logits = 5 * rng.standard_normal((4, 4)).astype(np.float32)
    w = np.asarray(jax.jit(gates.block_softmax)(logits, jnp.int32(stage)))
    np.testing.assert_allclose(w[:, : stage + 1], torch.softmax(torch.tensor(logits[:, : stage + 1]), -1), rtol=1e-5)
    assert np.all(w[:, stage + 1 :] == 0)
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-6)
    gradient = jax.grad(lambda logits: gates.block_softmax(logits, jnp.int32(stage))[:, 0].sum())(logits)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, stage + 1 :])
    assert np.any(gradient[:, : stage + 1]) == (stage > 0)  # one block has weight 1 whatever its logit


def test_split_softmax_reproduces_the_released_codes_example():
    logits, stage = jnp.asarray([[1.2, 0.1, 3.0]]), jnp.int32(2)
    np.testing.assert_allclose(gates.block_softmax(logits, stage), [[0.1355, 0.0451, 0.8195]], atol=6e-5)
    np.testing.assert_allclose(gates.split_max_softmax(logits, stage), [[0.4287, 0.1427, 0.4287]], atol=6e-5)


def test_split_softmax_shifts_by_maxima_over_the_batch(rng):
    logits, stage = rng.standard_normal((5, 6)).astype(np.float32), 3
    old, current = logits[:, :stage] - logits[:, :stage].max(), logits[:, stage : stage + 1] - logits[:, stage].max()
    expected = torch.softmax(torch.tensor(np.concatenate([old, current], 1)), -1)
    w = gates.split_max_softmax(logits, jnp.int32(stage))
    np.testing.assert_allclose(w[:, : stage + 1], expected, rtol=1e-5)
    assert not np.any(w[:, stage + 1 :])
    np.testing.assert_array_equal(gates.split_max_softmax(logits, jnp.int32(0))[:, 0], 1)
    gradient = jax.grad(lambda logits: (gates.split_max_softmax(logits, jnp.int32(0)) ** 2).sum())(logits)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("progress,expected", [(0.0, 8.0), (0.1, 6.4), (0.25, 4.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)])
def test_the_bonus_falls_linearly_and_stays_gone(progress, expected):
    np.testing.assert_allclose(gates.newest_bonus(8.0, 0.5, jnp.float32(progress)), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def stored(rng):
    """Logits f32[3, 4, 5] at stage 3 (four blocks known), zero-padded targets of tasks 0, 1, 2, and a mask."""
    logits = 2 * rng.standard_normal((3, 4, 5)).astype(np.float32)
    target = np.zeros((3, 4, 5), np.float32)
    for task in range(3):
        target[task, :, : task + 1] = rng.dirichlet(np.ones(task + 1), 4)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    return logits, target, mask


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["target_pred", "pred_target_eps"])
def test_recall_divergence_and_its_gradient_are_torchs(stored, kind, reduction):
    logits, target, mask = stored
    free = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_pred, known = torch.log_softmax(free[..., :4], -1), torch.tensor(target[..., :4], dtype=torch.float64)
    if kind == "target_pred":
        kl = torch.nn.functional.kl_div(log_pred, known, reduction="none").sum(-1)
    else:
        smooth = (known + 1e-8) / (known + 1e-8).sum(-1, keepdim=True)
        kl = torch.nn.functional.kl_div(smooth.log(), log_pred.exp(), reduction="none").sum(-1)
    expected = (kl * torch.tensor(mask)).sum() / (mask.sum() if reduction == "mean" else 1)
    expected.backward()
    function = lambda logits: gates.recall_divergence(logits, target, mask, jnp.int32(3), kind, reduction)
    value, gradient = jax.jit(jax.value_and_grad(function))(logits)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, free.grad, rtol=1e-4, atol=1e-6)
    assert not np.any(gradient[..., 4])  # the block that does not exist yet
    assert not np.any(gradient[0, 3]) and not np.any(gradient[1, 1:])  # samples that do not count


def test_recall_is_zero_while_the_router_is_as_it_was(stored):
    logits, _, mask = stored
    logits = logits.copy()
    target = np.zeros_like(logits)
    for task in range(3):  # every later key far away, as the newest key with a logit of minus infinity
        target[task] = gates.block_softmax(logits[task], jnp.int32(task))
        logits[task, :, task + 1 :] = -1e30
    value = gates.recall_divergence(jnp.asarray(logits), target, mask, jnp.int32(3), "target_pred", "sum")
    np.testing.assert_allclose(value, 0, atol=1e-6)
    logits[2, :, 3] = 0.0
    assert gates.recall_divergence(jnp.asarray(logits), target, mask, jnp.int32(3), "target_pred", "sum") > 0.1


@pytest.mark.parametrize("kind", ["target_pred", "pred_target_eps"])
def test_recall_is_zero_with_nothing_stored_and_finite_for_far_keys(stored, kind):
    logits, target, mask = stored
    function = lambda logits, mask: gates.recall_divergence(logits, target, mask, jnp.int32(3), kind, "mean")
    assert function(logits, 0 * mask) == 0
    value, gradient = jax.value_and_grad(function)(80 * logits, mask)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
