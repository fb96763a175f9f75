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
from proglora_jax.models.layers import gather_positions
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

    def image_parts(self, image):
        features = self.encode_image(image)
        return features, features.astype(jnp.float32).mean(axis=1)

    def project(self, features, projector, adapter=None):
        def linear(name, x):
            y = x @ projector[name]["kernel"].astype(x.dtype) + projector[name]["bias"].astype(x.dtype)
            if adapter is None:
                return y
            return y + adapter.delta((name,), adapter.leaves, adapter.layer, adapter.gates, x)[0].astype(y.dtype)

        return linear("linear_2", jax.nn.gelu(linear("linear_1", features)))

    def embed(self, tokens, features):
        x = self.table[tokens].astype(self.dtype)
        if features is None:
            return x
        here = tokens == tiny_llava.IMAGE_TOKEN
        order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, tiny_llava.PATCHES - 1)
        return jnp.where(here[..., None], jnp.take_along_axis(features.astype(x.dtype), order[..., None], axis=1), x)

    def decode(self, x, *, adapter=None, remat="none", cache_size=0, positions=None):
        mean = np.tril(np.ones((x.shape[1],) * 2, np.float32)) / np.arange(1, x.shape[1] + 1, dtype=np.float32)[:, None]
        leaves, once = ({}, {}) if adapter is None else (adapter.leaves, adapter.layer)

        def body(h, scanned):
            layer, own, once = scanned
            context = once if adapter is None or adapter.layer_gate is None else adapter.layer_gate(once, adapter.gates, h)

            seen = {}

            def linear(name, x):
                if cache_size and name in own and adapter.observe is not None:
                    seen[name] = adapter.observe(name, own[name], context, adapter.gates, x)
                y = x @ layer[name].astype(x.dtype)
                return y + adapter.delta((name,), own, context, adapter.gates, x)[0].astype(y.dtype) if name in own else y

            h = h + (mean @ linear("q_proj", h).astype(jnp.float32)).astype(h.dtype)
            h = h + jnp.tanh(linear("up_proj", h)) @ layer["down"].astype(h.dtype)
            return h, ({**context, "linears": seen} if seen else context) if cache_size else None

        h, contexts = jax.lax.scan(body, x, (self.layers, leaves, once))
        h = (h if positions is None else gather_positions(h, positions)).astype(jnp.float32)
        return Output((h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)).astype(x.dtype), None, contexts)

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
