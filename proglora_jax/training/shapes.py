"""What a run holds, as shapes: the backbone, a batch and the method's state stage by stage, without an array; and tables of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, PyTree
from proglora_jax.data.batch import collate
from proglora_jax.methods.base import Method, Phase, TaskInfo
from proglora_jax.methods.views import Probe
from proglora_jax.models.llava import Llava, abstract_llava
from proglora_jax.models.presets import LlavaConfig
from proglora_jax.training import fisher
from proglora_jax.training.attention_choice import model_options
from proglora_jax.training.console import ParameterRow, parameter_table
from proglora_jax.training.settings import ModelSettings
from proglora_jax.training.step import make_probe


class StageShapes(NamedTuple):
    """A stage as its training begins, or as one of its phases does.

    Attributes:
        info: the task.
        state: its leaves are shapes.
        mask: {path: whether it trains}.
        phase: the phase; of a stage as a whole, the first one of the language model.
        phases: each phase of the stage on its own; empty for one of these.
    """

    info: TaskInfo
    state: CLState
    mask: Mapping[str, bool]
    phase: Phase = Phase()
    phases: tuple[StageShapes, ...] = ()


def abstract_backbone(config: LlavaConfig, settings: ModelSettings) -> Llava:
    """The backbone as a run would hold it, leaves are jax.ShapeDtypeStruct."""
    return abstract_llava(config, jnp.dtype(settings.param_dtype), model_options(settings))


def abstract_batch(rows: int, bucket: tuple[int, int], image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of (T, K) positions and label slots, with the fields and dtypes of data/batch.py."""
    # No rows take no memory, and show which fields there are.
    fields = collate([], bucket, 0, (image_size, image_size))
    return {name: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype) for name, field in fields.items()}


def abstract_stages(method: Method, llava: Llava, tasks: Sequence[str], sizes: Sequence[int], mesh: Mesh) -> Iterator[StageShapes]:
    """The states of a whole sequence, as the method's own hooks make them grow.

    Args:
        method: the method.
        llava: from `abstract_backbone`.
        tasks: names of the stages.
        sizes: training examples of each.
        mesh: any mesh; nothing is placed on it.
    """
    targets, total = llava.targets(), len(tasks)
    state = jax.eval_shape(lambda projector: method.init(targets, projector, total, trees.SHAPES_ONLY), llava.projector_params())
    probe = abstract_probe(method, llava, mesh)
    for index, (name, size) in enumerate(zip(tasks, sizes, strict=True)):
        info = TaskInfo(index, name, total, size, np.zeros(index, np.float32), trees.SHAPES_ONLY)
        begun = state = jax.eval_shape(lambda state: method.start_task(state, info, probe), state)
        phases = []
        for phase in method.phases(info) if size else ():
            phases.append(StageShapes(info, state, method.phase_mask(state, info, phase), phase))
            state = jax.eval_shape(lambda state: method.after_phase(state, info, phase, probe), state)
        first = next((one.phase for one in phases if not one.phase.features), Phase())
        yield StageShapes(info, begun, method.trainable_mask(begun, info), first, tuple(phases))
        if size:
            state = jax.eval_shape(lambda state: method.end_task(state, info, probe), state)


def abstract_probe(method: Method, llava: Llava, mesh: Mesh) -> Probe:
    """The probe on any number of samples, for its shapes: zeros, or tracers under jax.eval_shape."""

    def samples(state: CLState, rows: np.ndarray) -> dict[str, jax.Array]:
        batch = abstract_batch(1, (llava.config.image_tokens + 1, 1), llava.config.vision_config.image_size)
        like = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)
        out = jax.eval_shape(make_probe(method, mesh), like(state.params), like(state.memory), llava, batch, like(state.stage))
        return {name: jnp.zeros((len(rows), *leaf.shape[1:]), leaf.dtype) for name, leaf in out.items()}

    def squared_gradients(state: CLState, rows: np.ndarray, size: int, kind: str, names: tuple[str, ...]) -> PyTree:
        return fisher.zeros(state.params, names)

    return Probe(samples, squared_gradients, lambda task: Probe(samples, squared_gradients))


def parameter_rows(method: Method, stage: StageShapes, backbone: Mapping[str, Any]) -> list[ParameterRow]:
    """One row per group of parameters that train or rest together: the method's first, then the backbone's; arguments as below."""
    rows, fill = [], method.fill(stage.state.params, stage.info)
    counts = trainable_counts(method, stage.state, stage.mask)
    for (name, trains), leaves in _groups(stage.state.params, stage.mask).items():
        size, label = trees.count_parameters(leaves), f"{name}, {fill[name]}" if name in fill else name
        if trains and counts[name] < size:
            label += f", {counts[name]:,} of it"
        rows.append(ParameterRow(label, len(leaves), size, trees.count_bytes(leaves), trains))
    return rows + [
        ParameterRow(f"backbone/{name}", len(jax.tree.leaves(part)), trees.count_parameters(part), trees.count_bytes(part), False)
        for name, part in backbone.items()
    ]


def trainable_counts(method: Method, state: CLState, mask: Mapping[str, bool]) -> dict[str, int]:
    """{group: parameters} of what trains, without entries that `Method.update_factors` holds still where the state is arrays."""
    counts: dict[str, int] = {}
    resting = _resting(method, state)
    for path, leaf in trees.flatten(state.params).items():
        if mask[path]:
            name = path.split("/")[0]
            counts[name] = counts.get(name, 0) + trees.count_parameters(leaf) - resting.get(path, 0)
    return counts


def _resting(method: Method, state: CLState) -> dict[str, int]:
    """{path: entries} that have the factor 0; of shapes nothing is known."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state.memory)):
        return {}
    found = {}
    for prefix, factor in method.update_factors(state.memory).items():
        still = np.count_nonzero(np.asarray(factor) == 0)
        for path, leaf in trees.flatten(state.params).items():
            if path == prefix or path.startswith(prefix + "/"):
                found[path] = still * trees.count_parameters(leaf) // factor.size
    return found


def describe_parameters(method: Method, stage: StageShapes, backbone: Mapping[str, Any]) -> str:
    """The table that a stage begins with, and the counts by the papers' conventions below it.

    Args:
        method: the method.
        stage: as its training begins; leaves are arrays or shapes.
        backbone: the frozen model's tree.
    """
    counts = trainable_counts(method, stage.state, stage.mask)
    lines = [parameter_table(parameter_rows(method, stage, backbone))]
    adapter = sum(count for name, count in counts.items() if name != "mm_projector")
    if adapter:
        stored = method.stored_parameters(stage.state, stage.info)
        most = "at most " if method.grows_by_data and isinstance(jax.tree.leaves(stage.state.memory)[0], jax.ShapeDtypeStruct) else ""
        lines.append(f"as the papers count, without the mm_projector: {adapter:,} train ({adapter / 1e6:.1f} M); "
                     f"blocks learned so far and now: {most}{stored:,} ({stored / 1e6:.1f} M)")
    return "\n".join(lines)


def _groups(params: PyTree, mask: Mapping[str, bool]) -> dict[tuple[str, bool], list]:
    groups: dict[tuple[str, bool], list] = {}
    for path, leaf in trees.flatten(params).items():
        groups.setdefault((path.split("/")[0], mask[path]), []).append(leaf)
    return groups
