"""How PCLR compresses a full pool: which ranks stay, whose queries their keys take over, and the teacher that is asked afterwards."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from proglora_jax.adapters import keys, rank_pool
from proglora_jax.core import precise
from proglora_jax.core.types import CLState
from proglora_jax.methods.rank_method import RankMethod
from proglora_jax.methods.views import TaskInfo


def compress(method: RankMethod, state: CLState, info: TaskInfo, turn: rank_pool.Turn, parts: tuple[str, ...]) -> CLState:
    """Drops ranks, moves the keys of the others toward the queries that need them, and sets the teacher up.

    Args:
        method: PCLR.
        state: after the task's ranks have joined the pool.
        info: the task.
        turn: what it does to the pool.
        parts: the parameters that the integration trains; the teacher has them as they were.
    """
    params, memory, kept = state.params, dict(state.memory), turn.kept()
    size = memory["origin"].shape[0]
    if method.integrate:
        newest = (jnp.arange(size) >= turn.before) & (jnp.arange(size) < turn.merged)
        teacher = {name: params[name] for name in (*parts, "keys")}
        memory["teacher"] = teacher | {"count": memory["count"], "newest": newest, "sharing": memory["sharing"]}
        memory["sharing"] = jnp.float32(1)
    own = {kind: rank_pool.keep_rows(keys.unit(leaf), kept) for kind, leaf in params["keys"].items()}
    asked = {kind: leaf[: info.index + 1] for kind, leaf in memory["queries"].items()}
    score = keys.rank_scores(asked["text"], asked["image"], own["text"], own["image"], method.image_weight_of(params))  # [L + 1, t, C]
    chosen = keys.top_ranks(score, jnp.arange(size) < len(kept), method.top_ranks)
    own = {kind: keys.unit(leaf + precise.einsum("ltr,td->lrd", chosen, asked[kind])) for kind, leaf in own.items()}
    memory |= {"count": jnp.int32(len(kept)), "origin": rank_pool.keep_rows(memory["origin"][:, None], kept)[:, 0]}
    smaller = {name: rank_pool.keep(params[name], kept) for name in ("pool", "projector_pool")}
    carry = state.carry | ({"running": {"weights": jnp.ones(info.total, jnp.float32)}} if method.integrate else {})
    return dataclasses.replace(state, params=params | smaller | {"keys": own}, memory=memory, carry=carry)
