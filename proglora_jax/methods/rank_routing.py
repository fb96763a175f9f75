"""PCLR's choice of ranks as data for an export: keys, the ranks of all tasks in one block, the shared ranks beside them."""

from __future__ import annotations

import jax
import numpy as np

from proglora_jax.adapters import keys
from proglora_jax.core.types import CLState, PyTree
from proglora_jax.methods.rank_method import RankMethod
from proglora_jax.methods.routing import Block, RankRouting

RANKS = "ranks"


def of_ranks(method: RankMethod, state: CLState) -> RankRouting:
    """The routing of the ranks that the pool holds; the shared ones belong to it once they take part.

    Args:
        method: PCLR.
        state: at the end of a stage.
    """
    params, memory = jax.tree.map(np.asarray, (state.params, state.memory))
    count = int(memory["count"])
    shared = Block(params["shared"], projector=params["projector_shared"]) if memory["sharing"] else None
    return RankRouting(
        params["keys"]["text"][:, :count], params["keys"]["image"][:, :count], memory["origin"][:count], int(state.stage) + 1,
        method.top_ranks, float(method.image_weight_of(params)), keys.DIGITS, tokens="start_and_instruction",
        blocks={RANKS: Block(_first(params["pool"], count), projector=_first(params["projector_pool"], count))},
        shared=shared, shared_gate=method.top_ranks / method.shared_ranks,
    )  # fmt: skip


def _first(pool: PyTree, count: int) -> PyTree:
    """The first ranks of a pool, which are those that are filled."""
    return {name: {"a": leaf["a"][..., :count], "b": leaf["b"][..., :count, :]} for name, leaf in pool.items()}
