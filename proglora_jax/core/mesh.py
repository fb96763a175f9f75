"""The mesh and every sharding: the only file that makes one.

From these shardings the compiler splits a run's programs (GSPMD). `jax.shard_map` stands only where it cannot: around splash attention,
whose kernel it does not know how to split (models/splash.py). Elsewhere it would win nothing or too little:

- Gradients of the adapters in a loop over layers are summed over the devices once in each micro-batch, by hand that would be once a step:
  by benchmarks/results/scaling.md 11 of 3984 ms of seven parts on eight H100, if nothing hides them, and on more chips there are fewer
  parts. But what a loss says of a whole batch (means over its rows, random draws) would become one function for each number of devices.
- Image features are put in their places, and label positions taken, along a row: no device needs another's
  (tests/training/test_meshes.py counts the messages of every mesh).
- Weights split over `fsdp` are gathered layer by layer as the loop over layers goes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from proglora_jax.core import gpus
from proglora_jax.core.types import PyTree

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
FLAG = "flag"
"""A field of a batch that is no row's but the process's own: processes that hold the same rows may say different things in it."""
LARGE = 1 << 20

# Paths of the backbone's parameters -> how they lie on the mesh. Kernels are [L, d_in, d_out] in stacked layers.
BACKBONE_RULES = (
    (r"language/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)", PartitionSpec(None, "fsdp", "model")),
    (r"language/.*(o_proj|down_proj)", PartitionSpec(None, "model", "fsdp")),
    (r"embed_tokens", PartitionSpec("model", "fsdp")),
    (r"lm_head", PartitionSpec("fsdp", "model")),
    (r"vision/.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)/kernel", PartitionSpec(None, "fsdp", None)),
    (r"vision", PartitionSpec()),
    (r"mm_projector", PartitionSpec()),
    (r"norm", PartitionSpec()),
)


def make_mesh(shape: Mapping[str, int], devices=None) -> Mesh:
    """A mesh with the axes data, fsdp, model.

    Args:
        shape: size of each axis; one of them may be -1, which takes the devices that the others leave.
        devices: the devices to use; all by default.

    Raises:
        ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices.reshape(_sizes(shape, devices.size)), AXES)


def described_devices(topology: str) -> list:
    """Devices of a machine that need not be there, to compile for: "v5e:4x4" are 16 chips of a TPU v5e slice, "h100:8" eight GPUs.

    Raises:
        ValueError: in one sentence, for a topology that the compiler does not know and where there is no compiler.
    """
    from jax.experimental import topologies

    platform, options = ("cuda", gpus.plugin_options(topology)) if gpus.names_gpus(topology) else ("tpu", {})
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=topology, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # JAX's own errors are RuntimeErrors
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def abstract_mesh(shape: Mapping[str, int], count: int) -> AbstractMesh:
    """The mesh that `count` devices would make, to plan with: shardings have shapes on it, and no array can be placed.

    Raises:
        ValueError: as `make_mesh`.
    """
    return AbstractMesh(tuple(_sizes(shape, count)), AXES)


def _sizes(shape: Mapping[str, int], count: int) -> list[int]:
    """Sizes of the axes over `count` devices."""
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"config.mesh={dict(shape)}: sizes must be positive, at most one may be -1 (takes the rest)")
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        if count % rest:
            raise ValueError(f"config.mesh={dict(shape)}: {count} devices cannot be divided by {rest}")
        sizes[sizes.index(-1)] = count // rest
    if int(np.prod(sizes)) != count:
        raise ValueError(f"config.mesh={dict(zip(AXES, sizes))}: needs {int(np.prod(sizes))} devices, {count} are there")
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def row_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(number of the part of a batch's rows that a process puts on its devices, number of such parts).

    Processes whose devices hold the same rows have the same part: those along the axis model.

    Args:
        mesh: of a run.
        process: this one by default.

    Raises:
        ValueError: "config.mesh={...}: ..." where processes would hold unequal or overlapping parts.
    """
    process, ways, held = jax.process_index() if process is None else process, batch_ways(mesh), {}
    for place, devices in enumerate(mesh.devices.reshape(ways, -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(place)
    size = len(held[process])
    if any(set(range(min(own) // size * size, min(own) // size * size + size)) != own for own in held.values()):
        raise ValueError(
            f"config.mesh={dict(mesh.shape)}: splits the rows so that processes would hold unequal parts; let config.mesh.model divide the "
            f"devices of a process, or be a multiple of them ({mesh.devices.size // len(held)})")
    return min(held[process]) // size, ways // size


def replicate(value: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside jit: asks for the whole array on every device."""
    return jax.lax.with_sharding_constraint(value, replicated(mesh))


def on_mesh(function: Callable, mesh: Mesh | AbstractMesh) -> Callable:
    """A function to be jitted, traced with the mesh known to `split_rows` and `gather_weights` below it."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def split_rows(tree: PyTree, axis: int = 0) -> PyTree:
    """Under `on_mesh`: asks that an axis (the rows of a batch) be split over the batch axes and the others be whole; else nothing.

    Without it the compiler lets the split of a kernel spread into the activations: on 16 chips it then computes all rows on every chip,
    a sixteenth of each sum, and sums activations over the chips, which moves a hundred times the bytes of the weights themselves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))
    even = lambda leaf: leaf.shape[axis] % batch_ways(mesh) == 0  # a single row, of which only the shape is asked, stays as it is
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding) if even(leaf) else leaf, tree)


def split_width(x: jax.Array) -> jax.Array:
    """Under `on_mesh`: asks that the last axis be split over fsdp, as the kernels' inputs are, and rows over data alone; else nothing.

    For one position a row: each chip multiplies its part of the kernel, and sums of a few rows are sent instead of weights.
    """
    return _narrow(x, "fsdp")


def share_rows(x: jax.Array) -> jax.Array:
    """Under `on_mesh`: asks that the devices along fsdp hold the same rows, whole; else nothing."""
    return _narrow(x, None)


def _narrow(x: jax.Array, last: str | None) -> jax.Array:
    if not gathers():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec("data", *[None] * (x.ndim - 2), last)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fit(spec, x.shape, mesh)))


def gather_weights(tree: PyTree, path: str, *, stacked: bool = False) -> PyTree:
    """Under `on_mesh`: asks for the backbone's weights whole along the axis fsdp, where they are used; else nothing.

    Args:
        tree: parameters below `path`; a layer of a stack, or a parameter that is not stacked.
        path: where they lie in the backbone, as in BACKBONE_RULES.
        stacked: whether the rules speak of stacks of these, with a leading axis.
    """
    if not gathers():
        return tree
    mesh = jax.sharding.get_abstract_mesh()

    def gather(keys: tuple, leaf: jax.Array) -> jax.Array:
        names = [str(getattr(key, "name", key)) for key in keys]
        spec = list(_rule("/".join([path, *names])) or ())[1 if stacked else 0 :]
        if "fsdp" not in spec:
            return leaf
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _fit(whole, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(gather, tree)


def gathers() -> bool:
    """Whether `gather_weights` has something to ask for here: under `on_mesh`, with an axis fsdp of more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies host (or device) arrays to every device of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh, split over the batch axes; the result is the global batch.

    Args:
        batch: rows of the part that `row_share` names; in a run of several processes also FLAG, of which the first element counts.
        mesh: of the run.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {name: jax.device_put(value, sharding) for name, value in batch.items()}
    put = {name: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for name, value in batch.items() if name != FLAG}
    if FLAG in batch:
        each = NamedSharding(mesh, PartitionSpec(AXES))
        put[FLAG] = jax.make_array_from_callback((mesh.size,), each, lambda index: np.asarray(batch[FLAG][:1]))
    return put


def to_host(tree: PyTree) -> PyTree:
    """Device arrays -> numpy; arrays that are split over processes are gathered first."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return jax.tree.map(
            lambda leaf: np.asarray(leaf) if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
            else multihost_utils.process_allgather(leaf, tiled=True), tree)
    return jax.tree.map(np.asarray, tree)


def backbone_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter of the backbone, by the first rule that matches its path.

    Raises:
        ValueError: "no sharding rule matches the large parameter '...'" for more than 2**20 scalars without a rule.
    """
    spec = _rule(path)
    if spec is not None:
        return NamedSharding(mesh, _fit(spec, shape, mesh))
    if int(np.prod(shape)) > LARGE:
        raise ValueError(f"no sharding rule matches the large parameter '{path}' of shape {shape}: add one to core/mesh.py")
    return replicated(mesh)


def without_leading_axis(sharding: NamedSharding) -> NamedSharding:
    """The sharding of one layer of a stacked parameter, whose leading axis is not split."""
    return NamedSharding(sharding.mesh, PartitionSpec(*list(sharding.spec)[1:]))


def _rule(path: str) -> PartitionSpec | None:
    """What the first rule that matches a path says."""
    return next((spec for pattern, spec in BACKBONE_RULES if re.search(pattern, path)), None)


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops the axes of a spec that do not divide the array's shape (odd widths of small models)."""
    names = list(spec)[: len(shape)] + [None] * (len(shape) - len(spec))
    return PartitionSpec(*(axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in zip(names, shape)))


def _put(leaf, sharding: NamedSharding):
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
