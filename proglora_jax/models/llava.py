"""LLaVA-1.5: vision tower, two-layer projector and language model in one object that goes through jax.jit, jax.grad and jax.lax.scan.

A `Llava` is a pytree. Its parameters are also there as a nested dict, which is the form to optimise, to mask and to save:

    llava = random_llava(config, seed=0)
    tree = llava.to_tree()                                   # {"language": {"layers": {"q_proj": {"kernel": ...}}}, ...}

    def loss(tree, batch):
        llava = Llava.from_tree(config, tree, settings)
        image = llava.project(llava.encode_image(batch["image"], trainable=True))
        hidden = llava.decode(llava.embed(batch["tokens"], image)).hidden
        return cross_entropy(llava.logits(hidden), batch)

    gradients = jax.jit(jax.grad(loss))(tree, batch)         # the same nested dict
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import Adapter, Targets
from proglora_jax.models.clip import ClipVision
from proglora_jax.models.layers import Linear, Make, Settings, activation, dense, fill, path_of, trained_dense
from proglora_jax.models.llama import TARGETS, Cache, Llama, Output
from proglora_jax.models.presets import LlavaConfig


class Projector(nnx.Module):
    """Two linears with a GELU between, from the vision tower's width to the language model's."""

    def __init__(self, make: Make, config: LlavaConfig):
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = Linear(make, config.vision_config.hidden_size, width, bias=bias)
        self.linear_2 = Linear(make, width, width, bias=bias)


class Llava(nnx.Module):
    """LLaVA-1.5. `config` and `settings` are static; all else is arrays.

    Attributes:
        vision: CLIP's vision transformer.
        mm_projector: the projector.
        language: the Llama decoder.
        config: sizes.
        settings: compute dtype and attention.
    """

    def __init__(self, make: Make, config: LlavaConfig, settings: Settings):
        self.vision = ClipVision(make, config.vision_config)
        self.mm_projector = Projector(make, config)
        self.language = Llama(make, config.text_config, tied=config.tie_word_embeddings)
        self.config = config
        self.settings = settings

    # ---- images

    def vision_states(self, image: jax.Array, *, trainable: bool = False) -> jax.Array:
        """Hidden states of the feature layer, class token first.

        Args:
            image: f32[B, H, W, 3] normalised pixels.
            trainable: let gradients into the vision tower; else they stop here and nothing of it is kept for the backward pass.

        Returns:
            [B, 1+P, Dv] in the compute dtype.
        """
        states = self.vision(image, self.config.vision_layers_run, self.settings)
        return states if trainable else jax.lax.stop_gradient(states)

    def encode_image(self, image: jax.Array, *, trainable: bool = False) -> jax.Array:
        """Image features for the projector, [B, P, Dv]; the class token is dropped unless the config's strategy is "full"."""
        states = self.vision_states(image, trainable=trainable)
        return states if self.config.vision_feature_select_strategy == "full" else states[:, 1:]

    def image_parts(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features for the projector and the class token as a summary, one pass of the tower: ([B, P, Dv], f32[B, Dv])."""
        states = self.vision_states(image)
        full = self.config.vision_feature_select_strategy == "full"
        return states if full else states[:, 1:], states[:, 0].astype(jnp.float32)

    def image_summary(self, image: jax.Array, *, pool: str = "class") -> jax.Array:
        """One vector per image from the feature layer, f32[B, Dv].

        Args:
            image: f32[B, H, W, 3] normalised pixels.
            pool: "class" takes the class token, "mean" the mean over patches.

        Raises:
            ValueError: "pool='<pool>' is unknown: choose class or mean"
        """
        states = self.vision_states(image).astype(jnp.float32)
        if pool == "class":
            return states[:, 0]
        if pool == "mean":
            return jnp.mean(states[:, 1:], axis=1)
        raise ValueError(f"pool={pool!r} is unknown: choose class or mean")

    def project(self, features: jax.Array, projector: Mapping | None = None, adapter: Adapter | None = None) -> jax.Array:
        """Maps image features to the language model's width.

        Args:
            features: [B, P, Dv].
            projector: {"linear_1": {"kernel", "bias"}, "linear_2": {...}}, float32, in place of the stored projector, and gradients are
                summed as such; None takes the stored one.
            adapter: low-rank adapter of the two linears, named as above; its leaves have no leading axis.

        Returns:
            [B, P, D] in the compute dtype.
        """
        parts, of = (self.projector_params(), dense) if projector is None else (projector, trained_dense)

        def linear(name: str, x: jax.Array) -> jax.Array:
            y = of(x, parts[name]["kernel"], parts[name].get("bias"))
            if adapter is None or name not in adapter.leaves:
                return y
            delta = adapter.delta((name,), {name: adapter.leaves[name]}, adapter.layer, adapter.gates, x)[0]
            return y + delta.astype(y.dtype)

        x = linear("linear_1", features.astype(self.settings.dtype))
        return linear("linear_2", activation(self.config.projector_hidden_act)(x))

    def projector_params(self) -> dict[str, dict[str, jax.Array]]:
        """The stored projector as a nested dict, the form that `project` takes."""
        return _nested(self.mm_projector)

    # ---- language

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeddings of tokens i32[B, T], [B, T, D] in the compute dtype."""
        return self.language.embed(tokens, self.settings.dtype)

    def embed(self, tokens: jax.Array, image_features: jax.Array | None) -> jax.Array:
        """Embeddings with the projected image features, in order, where the token is the image token.

        Args:
            tokens: i32[B, T], the image token repeated once per feature.
            image_features: [B, P, D] projected features, or None for a batch without images.

        Returns:
            [B, T, D] in the compute dtype. A row without image tokens ignores its features.
        """
        x = meshes.split_rows(self.embed_tokens(tokens))
        if image_features is None:
            return x
        here = tokens == self.config.image_token_id  # [B, T]
        order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, image_features.shape[1] - 1)
        placed = jnp.take_along_axis(image_features.astype(x.dtype), order[..., None], axis=1)  # [B, T, D]
        return jnp.where(here[..., None], placed, x)

    def decode(
        self,
        x: jax.Array,
        *,
        length: jax.Array | None = None,
        adapter: Adapter | None = None,
        remat: str = "none",
        cache: Cache | None = None,
        position: jax.Array | None = None,
        contexts: Any = None,
        cache_size: int = 0,
        positions: jax.Array | None = None,
        start: int = 0,
    ) -> Output:
        """Runs the decoder: a training step, prefill (`cache_size` > 0), the rest of prompts whose beginnings are in a cache (`cache` and
        `start`), or one step of generation (`cache` and `position`).

        Args:
            x: [B, T, D] embeddings; T = 1 in a step of generation.
            length: i32[B], hides the padded keys from this index on. Not needed where rows are padded at the right: no real
                position sees a padded one then; it only makes the padded positions see what they would in transformers.
            adapter: low-rank adapter, see `proglora_jax.core.types.Adapter`.
            remat: rematerialisation policy, see `proglora_jax.core.stack.remat`.
            cache: keys and values from prefill or the step before; with `start` they have places for the T new positions too.
            position: i32[B], the index where the row's new token goes; keys after it are hidden.
            contexts: the `contexts` that prefill returned: `adapter.layer_gate` is not asked again.
            cache_size: number of positions S in the cache that prefill returns, at least T.
            positions: i32[B, K], where hidden states are wanted, in training and prefill: the last layer then computes nothing but keys
                and values for the others (exact), unless the adapter needs more than that (`by_position`, `observe`). None: all.
            start: number of positions that every row of `cache` holds; x goes behind them, each position sees them and those of x up to
                its own. The adapter must not depend on what was read: no `layer_gate`, no `observe`, and `by_position`.

        Returns:
            Output(hidden[B, T, D], or [B, K, D], after the final norm, cache, contexts).

        Raises:
            ValueError: "cache_size=<n> is smaller than the <T> positions to store"; "the cache has <S> places, <n> are needed";
                "the adapter depends on the whole prompt, which is not there"
        """
        x = x.astype(self.settings.dtype)
        if cache is not None and position is None:
            if cache.key.shape[2] < start + x.shape[1]:
                raise ValueError(f"the cache has {cache.key.shape[2]} places, {start + x.shape[1]} are needed")
            if adapter is not None and (adapter.layer_gate is not None or adapter.observe is not None or not adapter.by_position):
                raise ValueError("the adapter depends on the whole prompt, which is not there")
            return self.language.extend(x, cache=cache, start=start, adapter=adapter, settings=self.settings, positions=positions)
        if cache is not None:
            return self.language.step(x, cache=cache, position=position, adapter=adapter, contexts=contexts, settings=self.settings)
        if cache_size and cache_size < x.shape[1]:
            raise ValueError(f"cache_size={cache_size} is smaller than the {x.shape[1]} positions to store")
        return self.language.full(x, length=length, adapter=adapter, remat=remat, cache_size=cache_size,
                                  settings=self.settings, positions=positions)

    def hidden_after(self, x: jax.Array, count: int) -> jax.Array:
        """The residual stream after the first `count` layers of the bare model, [B, T, D], from embeddings x[B, T, D].

        Raises:
            ValueError: "hidden_after: <count> layers asked for, the model has <L>"
        """
        layers = self.config.text_config.num_hidden_layers
        if not 0 < count <= layers:
            raise ValueError(f"hidden_after: {count} layers asked for, the model has {layers}")
        return self.language.hidden_after(x.astype(self.settings.dtype), count, self.settings)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the vocabulary, f32[..., V], from hidden[..., D] as `decode` returns it."""
        return self.language.logits(hidden)

    # ---- structure

    def targets(self) -> Targets:
        """The seven linears of a decoder layer, which is all that a method knows of the model."""
        layers, text = _nested(self.language.layers), self.config.text_config
        linears = {name: tuple(layers[name]["kernel"].shape[1:]) for name in TARGETS}
        return Targets(text.num_hidden_layers, linears, text.hidden_size, self.config.vision_config.hidden_size)

    def to_tree(self) -> dict[str, Any]:
        """All parameters as a nested dict of arrays."""
        return _nested(self)

    @classmethod
    def from_tree(cls, config: LlavaConfig, tree: Mapping, settings: Settings | None = None) -> Llava:
        """A model from a nested dict as `to_tree` gives it; the arrays may be tracers.

        Raises:
            ValueError: "no parameter at <path>"
        """
        return build(config, lambda path, abstract: _lookup(tree, path), settings)

    def with_settings(self, settings: Settings) -> Llava:
        """The same parameters under other settings."""
        return Llava.from_tree(self.config, self.to_tree(), settings)


def build(config: LlavaConfig, leaf: Callable[[str, jax.ShapeDtypeStruct], Any], settings: Settings | None = None) -> Llava:
    """A model whose parameters come from a function of their path, one call each.

    Args:
        config: sizes.
        leaf: (path such as "language/layers/q_proj/kernel", shape and dtype) -> array.
        settings: compute dtype and attention; default float32.
    """
    return fill(abstract_llava(config, settings=settings), leaf)


def abstract_llava(config: LlavaConfig, dtype: Any = jnp.float32, settings: Settings | None = None) -> Llava:
    """A model of shapes without arrays, all of one dtype: for planning memory, sharding and checkpoints."""
    return Llava(lambda shape, kind: jax.ShapeDtypeStruct(shape, dtype), config, settings or Settings())


def random_llava(config: LlavaConfig, seed: int = 0, dtype: Any = jnp.float32, settings: Settings | None = None) -> Llava:
    """A model with random parameters from numpy's generator, one stream per parameter (so a new parameter changes no other).

    Args:
        config: sizes.
        seed: of the generators.
        dtype: of the stored parameters.
        settings: compute dtype and attention; default: computes in `dtype`.

    Returns:
        Kernels normal with variance 1 / d_in, embeddings normal with deviation 0.02, norms the identity, biases 0.
    """
    settings = settings or Settings(dtype=jnp.dtype(dtype).name)
    kinds = _kinds(config)

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        kind, shape = kinds[path], abstract.shape
        if kind in ("ones", "zeros"):
            return jnp.asarray(np.full(shape, kind == "ones", dtype))
        generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
        deviation = 0.02 if kind == "embedding" else shape[-2] ** -0.5
        return jnp.asarray((generator.standard_normal(shape, dtype=np.float32) * np.float32(deviation)).astype(dtype))

    return build(config, leaf, settings)


def _kinds(config: LlavaConfig) -> dict[str, str]:
    """Path of a parameter -> its kind (kernel, embedding, ones, zeros)."""
    # Strings are not arrays, but a pytree holds them as well.
    kinds = Llava(lambda shape, kind: kind, config, Settings())
    return {path_of(keys): kind for keys, kind in jax.tree_util.tree_flatten_with_path(kinds)[0]}


def _nested(module: nnx.Module) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
        *folders, last = path_of(keys).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _lookup(tree: Mapping, path: str) -> Any:
    node: Any = tree
    for name in path.split("/"):
        if name not in node:
            raise ValueError(f"no parameter at {path}")
        node = node[name]
    return node
