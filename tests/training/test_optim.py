"""Schedules against transformers and DeepSpeed's formula; AdamW with groups and clipping against torch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR
from proglora_jax.methods.registry import METHODS
from proglora_jax.training import optim
from proglora_jax.training.settings import TrainSettings


def torch_factors(kind: str, warmup: int, total: int) -> list[float]:
    """Factors that transformers' scheduler gives to the optimizer's steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rest = {"num_training_steps": total} if kind == "cosine" else {}
    make = transformers.get_cosine_schedule_with_warmup if kind == "cosine" else transformers.get_constant_schedule_with_warmup
    scheduler = make(optimizer, num_warmup_steps=warmup, **rest)
    factors = []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("total,fraction", [(100, 0.03), (101, 0.03), (7, 0.5), (40, 0.0), (1, 0.03), (3, 0.9)])
def test_schedules_are_transformers_at_every_step(kind, total, fraction):
    settings = TrainSettings(schedule=kind, warmup_fraction=fraction)
    actual = [optim.schedule_factor(settings, step, total) for step in range(total)]
    np.testing.assert_allclose(actual, torch_factors(kind, math.ceil(fraction * total), total), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("total,fraction", [(100, 0.03), (200, 0.1), (10, 0.1), (6, 0.5)])
def test_log_warm_up_is_deepspeeds(total, fraction):
    settings = TrainSettings(schedule="constant_log_warmup", warmup_fraction=fraction)
    warmup = max(2, math.ceil(fraction * total))  # WarmupLR never warms up over fewer than two steps
    expected = [math.log(step + 1) / math.log(warmup) if step < warmup else 1.0 for step in range(total)]
    np.testing.assert_allclose([optim.schedule_factor(settings, step, total) for step in range(total)], expected, rtol=1e-12)
    assert expected[0] == 0


def test_rates_of_the_groups():
    settings = TrainSettings(learning_rate=2e-4, projector_learning_rate=2e-5, warmup_fraction=0.1)
    for method, gate in ((METHODS["lora"](), 2e-4), (METHODS["proglora_dynamic"](gate_lr_multiplier=5.0), 1e-3)):
        half = optim.learning_rates(settings, method, 5, 100)  # half of the warm-up
        np.testing.assert_allclose([half[ADAPTER], half[GATE], half[PROJECTOR]], [1e-4, gate / 2, 1e-5], rtol=1e-12)


PATHS = {ADAPTER: "block/q_proj/a", GATE: "key", PROJECTOR: "mm_projector/linear_1/kernel"}
RATES = {ADAPTER: 3e-3, GATE: 1e-2, PROJECTOR: 4e-4}


def nested(leaves):
    return {"block": {"q_proj": {"a": leaves[ADAPTER]}}, "key": leaves[GATE], "mm_projector": {"linear_1": {"kernel": leaves[PROJECTOR]}}}


def flat(tree):
    return {ADAPTER: tree["block"]["q_proj"]["a"], GATE: tree["key"], PROJECTOR: tree["mm_projector"]["linear_1"]["kernel"]}


@pytest.mark.parametrize("clip", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_five_steps_are_torchs_adamw_with_groups(rng, decay, clip):
    shapes = {ADAPTER: (4, 3), GATE: (5,), PROJECTOR: (2, 6)}
    start = {group: rng.standard_normal(shape).astype(np.float32) for group, shape in shapes.items()}
    settings = TrainSettings(weight_decay=decay, grad_clip=clip, beta1=0.8, beta2=0.95, epsilon=1e-4)
    method = METHODS["proglora_dynamic"]()
    assert {group: method.group(path) for group, path in PATHS.items()} == {group: group for group in PATHS}
    parameters = {group: torch.nn.Parameter(torch.tensor(value)) for group, value in start.items()}
    groups = [{"params": [parameter], "lr": RATES[group]} for group, parameter in parameters.items()]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-4, weight_decay=decay)
    transform, ours = optim.transform(settings), nested(start)
    state = transform.init(ours)

    @jax.jit
    def update(ours, state, gradient, rates):
        updates, state = transform.update(gradient, state, ours)
        return optax.apply_updates(ours, optim.apply_rates(updates, method, rates, {})), state, optim.global_norm(gradient)

    for step in range(5):
        gradient = {group: rng.standard_normal(shape).astype(np.float32) for group, shape in shapes.items()}
        factor = 1.0 / (step + 1)  # rates change from step to step
        for group, parameter in zip(theirs.param_groups, parameters):
            group["lr"] = RATES[parameter] * factor
        for group, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[group])
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip or 1e9)
        theirs.step()
        rates = {group: np.float32(rate * factor) for group, rate in RATES.items()}
        ours, state, actual_norm = update(ours, state, nested(gradient), rates)
        np.testing.assert_allclose(actual_norm, norm.item(), rtol=1e-6)
        for group, value in flat(ours).items():
            np.testing.assert_allclose(value, parameters[group].detach(), rtol=1e-5, atol=1e-6, err_msg=f"{group} after step {step}")


def test_clipping_is_by_the_norm_over_all_groups(rng):
    gradient = {group: rng.standard_normal(3).astype(np.float32) * 10 for group in PATHS}
    tensors = [torch.nn.Parameter(torch.zeros(3)) for _ in gradient]
    for tensor, value in zip(tensors, gradient.values()):
        tensor.grad = torch.tensor(value)
    torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(nested(gradient), clip.init(nested(gradient)))
    for group, tensor in zip(gradient, tensors):
        np.testing.assert_allclose(flat(clipped)[group], tensor.grad, rtol=1e-5)
    # What the first step of Adam sees: without clipping its moments would be those of the raw gradient.
    for settings, expected in ((TrainSettings(grad_clip=1.0), clipped), (TrainSettings(), nested(gradient))):
        transform = optim.transform(settings)
        _, state = transform.update(nested(gradient), transform.init(nested(gradient)), nested(gradient))
        adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
        np.testing.assert_allclose(adam.mu["key"], 0.1 * flat(expected)[GATE], rtol=1e-5)
        assert adam.mu["key"].dtype == jnp.float32
