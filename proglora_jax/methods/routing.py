"""How a method's gates follow from a prompt, as plain data: what an export hands to other programs beside the blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from proglora_jax.core.types import CLState, PyTree

TOKENS = ("instruction", "text_prompt", "multimodal_prompt")
POOLS = ("max", "mean")
QUERIES = ("none", "paper", "code")
SCORES = ("dot", "cosine")
WEIGHTS = ("softmax", "scores")
# Fields of ProgLoRA that must have these values: the others are for parity studies with the released code, or gate layer by layer.
_PLAIN = {"routing_scope": "global", "routing_decode": "prefill_cached", "routing_layer": 0, "split_max_quirk": False}


@dataclasses.dataclass(frozen=True)
class Routing:
    """Gates w f32[B, M] of a prompt, one per block, the same in every layer and for every new token.

        z = pool over the positions of `tokens` of the input embeddings (zeros where there is none)
        h = z, or the query projector of z
        s = score(h, keys) / temperature
        w = softmax(s), or s itself

    `assets/torch/gated_llava.py` computes exactly this in torch; what does not fit is no Routing.

    Attributes:
        keys: f32[M, D], one per block, in the order of the blocks.
        temperature: the scores are divided by it.
        tokens: one of TOKENS: the human text, all text of the prompt, or the whole prompt with its image features.
        pool: one of POOLS.
        query: one of QUERIES: no projector, or its variant, see `adapters.gates.query_projector`.
        query_projector: as `adapters.gates.init_query_projector` returns; empty for "none".
        score: one of SCORES.
        weights: one of WEIGHTS.
        shared: a block {linear: {"a": [L, d_in, r], "b": [L, r, d_out]}} beside the others whose gate is always 1, or empty.
    """

    keys: np.ndarray
    temperature: float = 1.0
    tokens: str = "instruction"
    pool: str = "max"
    query: str = "none"
    query_projector: PyTree = dataclasses.field(default_factory=dict)
    score: str = "dot"
    weights: str = "softmax"
    shared: PyTree = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, choices in (("tokens", TOKENS), ("pool", POOLS), ("query", QUERIES), ("score", SCORES), ("weights", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Routing.{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, choices))}")
        if bool(self.query_projector) != (self.query != "none"):
            raise ValueError(f"Routing.query={self.query!r}: a query projector belongs to 'paper' and 'code' only")


def of_prompt(method: Any, state: CLState, temperature: Callable[[int], float]) -> Routing:
    """The routing of ProgLoRA's dynamic methods.

    Args:
        method: with `routing_*`, `split_max_quirk` and `proj_variant` of ProgLoRADynamic.
        state: with "key", "keys" and "query_projector" among its parameters.
        temperature: width of a key -> temperature of the softmax.

    Raises:
        ValueError: "<name> with config.method.<field>=<value> ..." for settings whose gates are no function of the prompt's embeddings.
    """
    for field, plain in _PLAIN.items():
        if getattr(method, field) != plain:
            raise ValueError(
                f"{method.name} with config.method.{field}={getattr(method, field)!r} has not one set of gates per prompt that follows "
                f"from its input embeddings, as with {plain!r}"
            )
    if method.routing_tokens not in TOKENS:
        raise ValueError(
            f"{method.name} with config.method.routing_tokens={method.routing_tokens!r} routes a prompt by the rows beside it as well"
        )
    params, stage = jax.tree.map(np.asarray, state.params), int(state.stage)
    keys = np.concatenate([params["keys"][:stage], params["key"][None]])  # [M, D]
    return Routing(keys, temperature(keys.shape[-1]), method.routing_tokens, "max", method.proj_variant, params["query_projector"])
