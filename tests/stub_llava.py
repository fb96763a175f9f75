"""A stand-in for the tiny LLaVA with two linears per layer, for tests that compile many programs: same doors, a fifth of the compile."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_llava

from proglora_jax.core.types import Targets
from proglora_jax.models.llama import Output

LAYERS, WIDTH, INNER, VISION = 2, 32, 40, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stub:
    """Two layers of a running mean over positions and an MLP; only what the training step and the probe ask of a Llava."""

    table: Any
    layers: Any
    patches: Any
    projector: Any
    dtype: str = dataclasses.field(metadata=dict(static=True))

    def targets(self) -> Targets:
        linears = {name: self.layers[name].shape[1:] for name in ("q_proj", "up_proj")}
        return Targets(self.layers["down"].shape[0], linears, self.table.shape[1], self.patches.shape[1])

    def projector_params(self):
        return self.projector

    def encode_image(self, image):
        rows, size = image.shape[0], tiny_llava.SIDE // 2
        cut = image.reshape(rows, 2, size, 2, size, 3).swapaxes(2, 3).reshape(rows, 4, -1)
        return jnp.tanh(cut @ self.patches).astype(self.dtype)

    def project(self, features, projector):
        first, second = projector["linear_1"], projector["linear_2"]
        cast = lambda leaf: leaf.astype(features.dtype)
        return jax.nn.gelu(features @ cast(first["kernel"]) + cast(first["bias"])) @ cast(second["kernel"]) + cast(second["bias"])

    def embed(self, tokens, features):
        x = self.table[tokens].astype(self.dtype)
        here = tokens == tiny_llava.IMAGE_TOKEN
        order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, tiny_llava.PATCHES - 1)
        return jnp.where(here[..., None], jnp.take_along_axis(features.astype(x.dtype), order[..., None], axis=1), x)

    def decode(self, x, *, adapter=None, remat="none"):
        mean = np.tril(np.ones((x.shape[1],) * 2, np.float32)) / np.arange(1, x.shape[1] + 1, dtype=np.float32)[:, None]
        leaves, once = ({}, {}) if adapter is None else (adapter.leaves, adapter.layer)

        def body(h, scanned):
            layer, own, once = scanned
            context = once if adapter is None or adapter.layer_gate is None else adapter.layer_gate(once, adapter.gates, h)

            def linear(name, x):
                y = x @ layer[name].astype(x.dtype)
                return y + adapter.delta(name, own[name], context, adapter.gates, x).astype(y.dtype) if name in own else y

            h = h + (mean @ linear("q_proj", h).astype(jnp.float32)).astype(h.dtype)
            return h + jnp.tanh(linear("up_proj", h)) @ layer["down"].astype(h.dtype), None

        h = jax.lax.scan(body, x, (self.layers, leaves, once))[0].astype(jnp.float32)
        return Output((h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)).astype(x.dtype))

    def logits(self, hidden):
        return hidden.astype(jnp.float32) @ self.table.T


@functools.cache
def stub(dtype: str = "float32", layers: int = LAYERS, width: int = WIDTH, inner: int = INNER) -> Stub:
    """The stand-in with random numbers."""
    rng = np.random.default_rng(9)
    draw = lambda *shape: (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(np.float32)
    stacked = {"q_proj": draw(layers, width, width), "up_proj": draw(layers, width, inner), "down": draw(layers, inner, width)}
    projector = {
        "linear_1": {"kernel": draw(VISION, width), "bias": np.zeros(width, np.float32)},
        "linear_2": {"kernel": draw(width, width), "bias": np.zeros(width, np.float32)},
    }
    table = 0.5 * rng.standard_normal((tiny_llava.VOCAB, width)).astype(np.float32)
    return Stub(table, stacked, draw(48, VISION), projector, dtype)
