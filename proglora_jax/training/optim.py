"""AdamW with a learning rate per group of parameters, and the schedules."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree
from proglora_jax.methods.base import ADAPTER, GATE, PROJECTOR, Method, Phase
from proglora_jax.training.settings import TrainSettings


def transform(settings: TrainSettings) -> optax.GradientTransformation:
    """Clipping (off by default), Adam's direction and decoupled weight decay; the step multiplies by the learning rates."""
    steps = [optax.clip_by_global_norm(settings.grad_clip)] if settings.grad_clip > 0 else []
    steps.append(optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon))
    if settings.weight_decay:
        steps.append(optax.add_decayed_weights(settings.weight_decay))
    return optax.chain(*steps)


def schedule_factor(settings: TrainSettings, step: int, total: int) -> float:
    """Factor on the learning rate at a step counted from 0.

    Linear warm-up over ceil(warmup_fraction * total) steps, then cosine to 0 or constant, as transformers' schedulers;
    "constant_log_warmup" is ln(t + 1) / ln(max(2, warm-up steps)) during warm-up.

    Source: CoIN's launch scripts and DeepSpeed's WarmupLR (the effective schedule of the published baselines).
    """
    warmup = math.ceil(settings.warmup_fraction * total)
    if step < warmup:
        if settings.schedule == "constant_log_warmup":
            return math.log(step + 1) / math.log(max(2, warmup))
        return step / warmup
    if settings.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
    return 1.0


def learning_rates(settings: TrainSettings, method: Method, step: int, total: int, phase: Phase | None = None) -> dict[str, float]:
    """Learning rate of each group at a step: adapter (a phase may have its own), gate (times the method's multiplier), mm_projector."""
    factor = schedule_factor(settings, step, total)
    rate = (phase.learning_rate if phase else 0.0) or settings.learning_rate
    return {
        ADAPTER: rate * factor,
        GATE: rate * method.gate_multiplier() * factor,
        PROJECTOR: settings.projector_learning_rate * factor,
    }


def apply_rates(updates: PyTree, method: Method, rates: dict[str, jax.Array], memory: PyTree) -> PyTree:
    """Multiplies each update by minus the learning rate of its group, and by the method's factors on single entries."""
    factors = method.update_factors(memory)
    scaled = {path: -rates[method.group(path)] * update for path, update in trees.flatten(updates).items()}
    # Chosen, not multiplied: an entry that rests must stay as it is even where its update is not finite.
    for prefix, factor in factors.items():
        for path in [path for path in scaled if path == prefix or path.startswith(prefix + "/")]:
            own = factor.reshape(factor.shape + (1,) * (scaled[path].ndim - factor.ndim))
            scaled[path] = jnp.where(own != 0, own * scaled[path], 0.0)
    return trees.unflatten(scaled)


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, f32[]."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
