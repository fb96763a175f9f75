"""Generation where questions share images: what prompts about one image have in common is read once, the questions behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import Adapter, PyTree
from proglora_jax.evaluation.generate import generate
from proglora_jax.methods.base import PROJECTOR, Method
from proglora_jax.training.step import Batch, answers_of, gate_inputs, without_flag


def make_prefix_generator(method: Method, mesh: Mesh, max_new_tokens: int, eos_id: int, pad_id: int, vocab_limit: int) -> Callable:
    """As `step.make_generator`, for the batches of `data.image_groups`.

    Keys and values of the common beginnings are read by image, copied to the rows, and the rows go on from there. It is the same
    function: a position's keys and values depend on nothing behind it, and the adapter on nothing in the prompt.

    Raises:
        ValueError: "<name>: the adapter depends on the prompt, so prompts cannot share their beginnings"
    """
    if not method.fixed_at_test:
        raise ValueError(f"{method.name}: the adapter depends on the prompt, so prompts cannot share their beginnings")

    def answer(params, memory, llava, batch, stage) -> dict[str, jax.Array]:
        batch, flag = without_flag(batch)
        shared = {name: batch[f"prefix_{name}"] for name in ("tokens", "segments", "task_id")}
        (images, start), (rows, own) = shared["tokens"].shape, batch["tokens"].shape

        def adapted(x: jax.Array, part: Batch) -> tuple[PyTree, Adapter | None]:
            gates = method.gates(params, memory, gate_inputs(llava, method, x, part, stage))
            return gates, method.adapter(params, gates, None)

        x = llava.embed(shared["tokens"], llava.project(llava.encode_image(batch["image"]), params[PROJECTOR]))  # [G, P, D]
        last = jnp.full((images, 1), start - 1)  # keys and values are all that is wanted: the last layer is cut to one position
        cache = llava.decode(x, adapter=adapted(x, shared)[1], cache_size=start, positions=last).cache
        cache = for_rows(cache, batch["slot"], start + own + max_new_tokens)
        x = llava.embed(batch["tokens"], None)  # [B, T, D]
        gates, adapter = adapted(x, batch)
        out = generate(
            llava, batch, lambda x, part: adapter, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id,
            vocab_limit=vocab_limit, embedded=x, prefix=cache, start=start,
        )
        return answers_of(method, gates, out, batch, flag)

    return jax.jit(meshes.on_mesh(answer, mesh), out_shardings=meshes.replicated(mesh))


def for_rows(cache: Any, slot: jax.Array, size: int) -> Any:
    """Keys and values of images, copied to the rows that ask about them; under `on_mesh` no device needs those of another.

    Args:
        cache: pytree of [L, G, P, ...].
        slot: i32[B], the row's image among those of its own device.
        size: places S for each row.

    Returns:
        The same pytree of [L, B, S, ...], zeros behind the first P.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else meshes.batch_ways(mesh)

    def copy(leaf: jax.Array) -> jax.Array:
        apart = leaf.reshape(leaf.shape[0], ways, -1, *leaf.shape[2:])  # [L, devices, images, P, ...]
        taken = jax.vmap(lambda part, own: jnp.take(part, own, axis=1, mode="clip"), (1, 0), 1)(apart, slot.reshape(ways, -1))
        taken = taken.reshape(leaf.shape[0], -1, *leaf.shape[2:])  # [L, B, P, ...]
        return jnp.pad(taken, [(0, 0), (0, 0), (0, size - leaf.shape[2])] + [(0, 0)] * (leaf.ndim - 3))

    return jax.tree.map(copy, cache)
