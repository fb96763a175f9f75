"""The programs of a run from shapes alone: the training step and the generator, traced for any mesh as a run would call them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import PyTree
from proglora_jax.data.batch import PREFIX_FIELDS, QUESTION_FIELDS
from proglora_jax.models.llava import Llava
from proglora_jax.training import optim, shapes
from proglora_jax.training.loop_choice import compiler_options
from proglora_jax.training.prefix import make_prefix_generator
from proglora_jax.training.settings import Settings
from proglora_jax.training.shapes import StageShapes
from proglora_jax.training.step import make_generator, make_train_step


def trace_train_step(settings: Settings, llava: Llava, stage: StageShapes, rows: int, bucket: tuple[int, int], mesh: Mesh) -> Any:
    """The training step as a jax.stages.Traced; nothing is allocated.

    Args:
        settings: the config.
        llava: from `shapes.abstract_backbone`.
        stage: a stage of `shapes.abstract_stages`, or one of its phases.
        rows: rows of a whole batch.
        bucket: (positions, label slots).
        mesh: of devices that are there, or of a topology that is only described (`meshes.described_devices`).
    """
    same = meshes.replicated(mesh)
    trainable, frozen = trees.partition(stage.state.params, stage.mask)
    moments = jax.eval_shape(optim.transform(settings.train).init, trainable)
    batch = shapes.abstract_batch(rows, bucket, llava.config.vision_config.image_size)
    options = compiler_options(settings.model.unroll, llava.config.text_config.num_hidden_layers, mesh)
    step = make_train_step(settings.method, settings.train, settings.model.remat, False, mesh, stage.phase.program(), options)
    held = [placed(part, same) for part in (trainable, moments, frozen, stage.state.memory)]
    control = placed(_control(settings, stage), same)
    return step.trace(*held, place_backbone(llava, mesh), placed(batch, meshes.batch_sharding(mesh)), control)


def trace_generator(settings: Settings, llava: Llava, stage: StageShapes, rows: int, positions: int, new_tokens: int, mesh: Mesh) -> Any:
    """The generator, prefill and decoding in one program; arguments as for `trace_train_step`.

    Args:
        settings, llava, stage, mesh: as there.
        rows: questions of a whole batch.
        positions: padded length of the prompts.
        new_tokens: cap on an answer.
    """
    config, same = llava.config, meshes.replicated(mesh)
    batch = shapes.abstract_batch(rows, (positions, 0), config.vision_config.image_size)
    # Which ids end and fill a row are constants that change neither work nor memory.
    generator = make_generator(settings.method, mesh, new_tokens, 2, config.pad_token_id, config.text_config.vocab_size)
    held = [placed(part, same) for part in (stage.state.params, stage.state.memory)]
    stage_number = placed(jax.ShapeDtypeStruct((), jnp.int32), same)
    return generator.trace(*held, place_backbone(llava, mesh), placed(batch, meshes.batch_sharding(mesh)), stage_number)


class Shared(NamedTuple):
    """Questions that share images, as `data.image_groups` puts them into batches.

    Attributes:
        rows: questions of a whole batch.
        images: images of a whole batch.
        start: positions that all prompts begin with.
        rest: positions behind them, padded.
    """

    rows: int
    images: int
    start: int
    rest: int


def trace_prefix_generator(settings: Settings, llava: Llava, stage: StageShapes, load: Shared, new_tokens: int, mesh: Mesh) -> Any:
    """The generator where questions share images; arguments as for `trace_generator`, `load` for its rows and positions.

    Raises:
        ValueError: where the method's adapter depends on the prompt.
    """
    config, same = llava.config, meshes.replicated(mesh)
    size = config.vision_config.image_size
    own, whole = (shapes.abstract_batch(*sizes, size) for sizes in ((load.rows, (load.rest, 0)), (load.images, (load.start, 0))))
    batch = {name: own[name] for name in QUESTION_FIELDS} | {"slot": own["length"], "image": whole["image"]}
    batch |= {f"prefix_{name}": whole[name] for name in PREFIX_FIELDS}
    generator = make_prefix_generator(settings.method, mesh, new_tokens, 2, config.pad_token_id, config.text_config.vocab_size)
    held = [placed(part, same) for part in (stage.state.params, stage.state.memory)]
    stage_number = placed(jax.ShapeDtypeStruct((), jnp.int32), same)
    return generator.trace(*held, place_backbone(llava, mesh), placed(batch, meshes.batch_sharding(mesh)), stage_number)


def placed(tree: PyTree, sharding: Any) -> PyTree:
    """The shapes of a tree as they would lie under a sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def place_backbone(llava: Llava, mesh: Mesh) -> Llava:
    """The backbone's shapes as they would lie on a mesh."""
    flat = trees.flatten(llava.to_tree())
    tree = {path: placed(leaf, meshes.backbone_sharding(path, leaf.shape, mesh)) for path, leaf in flat.items()}
    return Llava.from_tree(llava.config, trees.unflatten(tree), llava.settings)


def _control(settings: Settings, stage: StageShapes) -> PyTree:
    """What a step is told beside its batch, as shapes."""
    rates = optim.learning_rates(settings.train, settings.method, 0, 1)
    return {
        "stage": jax.ShapeDtypeStruct((), jnp.int32), "step": jax.ShapeDtypeStruct((), jnp.int32),
        "progress": jax.ShapeDtypeStruct((), jnp.float32), "key": jax.eval_shape(lambda: jax.random.key(0)),
        "rates": {name: jax.ShapeDtypeStruct((), jnp.float32) for name in rates}, "running": stage.state.carry.get("running", {}),
    }
