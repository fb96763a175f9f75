"""Our side: the last stage of a method's sequence on a backbone, its step and its generator compiled from shapes as a run has them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import Adapter, each_linear
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.models.llava import Llava, build
from proglora_jax.models.presets import LlavaConfig
from proglora_jax.training import optim, programs, shapes
from proglora_jax.training.attention_choice import model_options
from proglora_jax.training.settings import Settings
from proglora_jax.training.step import make_generator

DEVIATION = 0.02


class Ours:
    """A method's last stage of so many, with random blocks in its pool and a new one that is zero.

    Attributes:
        settings: the config.
        blocks: stages of the sequence.
        mesh: of one device.
        stage: the last stage, as shapes.
    """

    def __init__(self, settings: Settings, config: LlavaConfig, blocks: int, devices: Sequence[jax.Device] | None = None):
        self.settings, self.blocks, self.config = settings, blocks, config
        self.mesh = meshes.make_mesh({"data": 1}, devices or jax.devices()[:1])
        self._llava = shapes.abstract_backbone(config, settings.model)
        tasks = [f"task{index}" for index in range(blocks)]
        *_, self.stage = shapes.abstract_stages(settings.method, self._llava, tasks, [1000] * blocks, self.mesh)

    def compile_step(self, rows: int, bucket: tuple[int, int]) -> Any:
        """The training step of a run, compiled; nothing is allocated."""
        return programs.trace_train_step(self.settings, self._llava, self.stage, rows, bucket, self.mesh).lower().compile()

    def compile_generator(self, rows: int, positions: int, new_tokens: int) -> Any:
        """The generator of a run, compiled, without an end token: all rows get all new tokens."""
        config, same = self.config, meshes.replicated(self.mesh)
        words = config.text_config.vocab_size
        generator = make_generator(self.settings.method, self.mesh, new_tokens, -1, config.pad_token_id, words)
        batch = shapes.abstract_batch(rows, (positions, 0), config.vision_config.image_size)
        held = [programs.placed(part, same) for part in (self.stage.state.params, self.stage.state.memory)]
        number = programs.placed(jax.ShapeDtypeStruct((), jnp.int32), same)
        backbone = programs.place_backbone(self._llava, self.mesh)
        return generator.trace(*held, backbone, programs.placed(batch, meshes.batch_sharding(self.mesh)), number).lower().compile()

    def load(self, llava: Llava, fill: Callable[[str, jax.ShapeDtypeStruct], Any]) -> None:
        """Takes the backbone's weights; fill(path, shape and dtype) makes the blocks, keys and routers."""
        self.llava = llava.with_settings(model_options(self.settings.model))
        flat = trees.flatten(self.stage.state.params)
        zero = lambda path: path.startswith("block/") and path.endswith("/b")
        params = trees.unflatten({path: _zeros(leaf) if zero(path) else fill(path, leaf) for path, leaf in flat.items()})
        # A copy: the step gives its arguments back changed.
        params |= {"mm_projector": jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), llava.projector_params())}
        self.params = meshes.put_replicated(params, self.mesh)
        self.memory = meshes.put_replicated(jax.tree.map(_zeros, self.stage.state.memory), self.mesh)
        self.number = meshes.put_replicated(np.int32(self.blocks - 1), self.mesh)
        self.start()

    def start(self) -> None:
        """Back to the first step."""
        trainable, self.frozen = trees.partition(self.params, self.stage.mask)
        self.trainable = jax.tree.map(jnp.copy, trainable)
        self.optimizer = meshes.put_replicated(optim.transform(self.settings.train).init(self.trainable), self.mesh)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the device, of the last task."""
        return meshes.put_batch(dict(batch) | {"task_id": np.full(len(batch["tokens"]), self.blocks - 1, np.int32)}, self.mesh)

    def train(self, step: Callable, batch: Mapping[str, jax.Array]) -> jax.Array:
        """One step at the config's learning rates; its loss, which may not be there yet."""
        train = self.settings.train
        rates = optim.learning_rates(train, self.settings.method, 1, 2)
        control = {
            "stage": self.number, "step": np.int32(0), "progress": np.float32(0), "key": jax.random.key(0), "running": {},
            "rates": {name: np.float32(rate) for name, rate in rates.items()},
        }  # fmt: skip
        self.trainable, self.optimizer, metrics = step(
            self.trainable, self.optimizer, self.frozen, self.memory, self.llava, batch, control)
        return metrics["loss"]

    def generate(self, generator: Callable, batch: Mapping[str, jax.Array]) -> jax.Array:
        """New tokens i32[B, N] after the batch's rows."""
        return generator(trees.merge(self.frozen, self.trainable), self.memory, self.llava, batch, self.number)["tokens"]


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype)


# ------------------------------------------------------------------------------------------- random weights on the device


def device_normal(path: str, leaf: jax.ShapeDtypeStruct, deviation: float = DEVIATION) -> jax.Array:
    """Normal numbers made on the device, a stream for each path, row by row of the first axis so that little is held beside them."""
    return _normal(zlib.crc32(path.encode()) >> 1, leaf.shape, jnp.dtype(leaf.dtype).name, deviation)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(seed: jax.Array, shape: tuple[int, ...], dtype: str, deviation: float) -> jax.Array:
    key = jax.random.key(seed, impl="rbg")  # quick to compile and quick to run
    one = lambda key, shape: (deviation * jax.random.normal(key, shape)).astype(dtype)
    if len(shape) < 3:
        return one(key, shape)
    return jax.lax.map(lambda index: one(jax.random.fold_in(key, index), shape[1:]), jnp.arange(shape[0]))


def device_llava(config: LlavaConfig, settings: Settings) -> Llava:
    """A random backbone that never was on the host: kernels of variance 1 / d_in, norms the identity, biases 0."""

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        like, kind = jax.ShapeDtypeStruct(abstract.shape, jnp.dtype(settings.model.param_dtype)), path.rpartition("/")[2]
        if kind in ("scale", "bias"):
            return jnp.full(like.shape, float(kind == "scale"), like.dtype)
        return device_normal(path, like, like.shape[-2] ** -0.5 if kind == "kernel" else DEVIATION)

    return build(config, leaf, model_options(settings.model))


# ------------------------------------------------------------------------------------------------------ a loop over blocks


@dataclasses.dataclass(frozen=True)
class LoopedProgLoRA(ProgLoRADynamic):
    """The same sum as a loop over blocks, each with its own pair of matmuls, as the published code has it: oracle and rival."""

    def adapter(self, params, gates, key) -> Adapter | None:
        """The method's adapter with the loop in place of the fused primitive; without dropout."""
        looped = each_linear(partial(looped_delta, scale=self.scale, rank=self.rank))
        return dataclasses.replace(super().adapter(params, gates, None), delta=looped)


def with_loop(settings: Settings) -> Settings:
    """The settings of ProgLoRA (dynamic) with the loop over blocks."""
    fields = {field.name: getattr(settings.method, field.name) for field in dataclasses.fields(settings.method)}
    return dataclasses.replace(settings, method=LoopedProgLoRA(**fields))


def looped_delta(name, leaves, context, gates, x, *, scale: float, rank: int) -> jax.Array:
    """Of one linear: sum over blocks of scale * gate * (x A) B in x's dtype; frozen blocks get no gradient."""
    del name, context
    total = 0.0
    for index in range(leaves["pool_a"].shape[-1] // rank):
        at = slice(index * rank, (index + 1) * rank)
        a, b = jax.lax.stop_gradient((leaves["pool_a"][:, at], leaves["pool_b"][at]))
        total = total + _block(x, a, b, gates["pool"][..., at], scale)
    return total + _block(x, leaves["a"], leaves["b"], gates["new"], scale)


def _block(x: jax.Array, a: jax.Array, b: jax.Array, gate: jax.Array, scale: float) -> jax.Array:
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * (gate[..., :1] * scale).astype(x.dtype)


__all__ = ["DEVIATION", "LoopedProgLoRA", "Ours", "device_llava", "device_normal", "looped_delta", "with_loop"]
