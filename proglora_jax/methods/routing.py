"""How a method's gates follow from a prompt, as plain data: what an export hands to other programs beside the blocks.

There are four ways, a dataclass each: gates per prompt (`Routing`), per token and linear (`LinearRouting`), per prompt and layer
(`LayerRouting`), and single ranks that are on or off (`RankRouting`). `assets/torch/gated_routers.py` computes exactly these in torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from proglora_jax.core.types import CLState, PyTree

TOKENS = ("instruction", "text_prompt", "multimodal_prompt", "start_and_instruction")
POOLS = ("max", "mean")
QUERIES = ("none", "paper", "code")
SCORES = ("dot", "cosine")
WEIGHTS = ("softmax", "scores")
# Fields of ProgLoRA that must have these values: the others are for parity studies with the released code, or gate layer by layer.
_PLAIN = {"routing_scope": "global", "routing_decode": "prefill_cached", "routing_layer": 0, "split_max_quirk": False}


@dataclasses.dataclass(frozen=True)
class Block:
    """Low-rank factors as they are exported, one PEFT adapter.

    Attributes:
        weights: {linear: {"a": [L, d_in, r], "b": [L, r, d_out]}}.
        layers: the layers that have it; None for all.
        projector: {linear of the mm_projector: {"a": [d_in, r], "b": [r, d_out]}}, or empty.
    """

    weights: PyTree
    layers: tuple[int, ...] | None = None
    projector: PyTree = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """What all ways have in common.

    Attributes:
        kind: its name in routing.json.
        tokens: one of TOKENS, the positions that route: the human text, all text of the prompt, the whole prompt with its image
            features, or the human text and the first token.
        blocks: {folder: Block} where these are not the method's own: one per gate, or one with all the ranks that are gated singly.
        shared: a block beside the others whose gate does not depend on the prompt, or None.
        shared_gate: that gate.
    """

    kind: ClassVar[str]

    tokens: str = "instruction"
    blocks: dict[str, Block] = dataclasses.field(default_factory=dict)
    shared: Block | None = None
    shared_gate: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What is no array, for "routing" in routing.json."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": self.kind} | {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool)}

    def tensors(self) -> dict[str, np.ndarray]:
        """What is, as routing.safetensors has it."""
        raise NotImplementedError

    def _check(self, **choices: tuple[str, ...]) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{type(self).__name__}.{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class Routing(Way):
    """Gates w f32[B, M] of a prompt, one per block, the same in every layer and for every new token.

        z = pool over the positions of `tokens` of the input embeddings (zeros where there is none)
        h = z, or the query projector of z
        s = score(h, keys) / temperature
        w = softmax(s), or s itself

    Attributes:
        keys: f32[M, D], one per block, in the order of the blocks.
        temperature: the scores are divided by it.
        pool: one of POOLS.
        query: one of QUERIES: no projector, or its variant, see `adapters.gates.query_projector`.
        query_projector: as `adapters.gates.init_query_projector` returns; empty for "none".
        score: one of SCORES.
        weights: one of WEIGHTS.
    """

    kind: ClassVar[str] = "prompt"

    keys: np.ndarray
    temperature: float = 1.0
    pool: str = "max"
    query: str = "none"
    query_projector: PyTree = dataclasses.field(default_factory=dict)
    score: str = "dot"
    weights: str = "softmax"

    def __post_init__(self):
        self._check(tokens=TOKENS, pool=POOLS, query=QUERIES, score=SCORES, weights=WEIGHTS)
        if bool(self.query_projector) != (self.query != "none"):
            raise ValueError(f"Routing.query={self.query!r}: a query projector belongs to 'paper' and 'code' only")

    def tensors(self) -> dict[str, np.ndarray]:
        """keys; linear_1 and linear_2 as torch lays them out, norm."""
        found = {"keys": self.keys}
        for name, leaves in self.query_projector.items():
            found |= {f"{name}.{_NAMES[leaf]}": np.asarray(value).T for leaf, value in leaves.items()}
        return found


_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class LinearRouting(Way):
    """A router without bias in every linear: gates = softmax of the `top` largest of W x, one per block.

    With several tasks a prompt takes the routers of the task with the largest cos(mean embedding over `tokens`, text key) + cos(class
    token of the image, image key), the latter where there is an image.

    Attributes:
        routers: {linear: f32[L, N, d_in, M]} of N tasks, or of one for all.
        input: one of "token", "first_token" and "mean_prompt", see `adapters.experts.pick_positions`; "token" for gates per token.
        top: gates that are not 0.
        renormalise: softmax over those; else their share of a softmax over all.
        text_keys: f32[N, D], empty for one task.
        image_keys: f32[N, Dv], empty for one task.
    """

    kind: ClassVar[str] = "linear"

    routers: PyTree
    input: str
    top: int
    renormalise: bool = True
    text_keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 0), np.float32))
    image_keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 0), np.float32))

    def __post_init__(self):
        self._check(tokens=TOKENS, input=("token", "first_token", "mean_prompt"))

    def settings(self) -> dict[str, Any]:
        """The number of tasks too."""
        return super().settings() | {"tasks": len(self.text_keys)}

    def tensors(self) -> dict[str, np.ndarray]:
        """router.<linear> f32[L, N, M, d_in]; the keys where there are several tasks."""
        found = {f"router.{name}": np.asarray(router).swapaxes(-1, -2) for name, router in self.routers.items()}
        return found | ({"text_keys": self.text_keys, "image_keys": self.image_keys} if len(self.text_keys) > 1 else {})


@dataclasses.dataclass(frozen=True)
class LayerRouting(Way):
    """A router in every layer: gates = softmax(W xbar + b) over the blocks that the layer has.

    xbar is the mean over the whole prompt of the residual stream before the layer.

    Attributes:
        weight: f32[L, M, D].
        bias: f32[L, M].
        exists: f32[L, M], 1 where a layer has a block.
        growing: number of layers, from the top, whose mean gates are recorded.
    """

    kind: ClassVar[str] = "layer"

    weight: np.ndarray
    bias: np.ndarray
    exists: np.ndarray
    growing: int

    def tensors(self) -> dict[str, np.ndarray]:
        """rows.weight, rows.bias, exists."""
        return {"rows.weight": self.weight, "rows.bias": self.bias, "exists": self.exists}


@dataclasses.dataclass(frozen=True)
class RankRouting(Way):
    """The `top` ranks of each layer, and of the mm_projector, whose keys score highest have gate 1, the others 0.

    A score is <text, text key> + image_weight <image, image key> of unit vectors, rounded to `digits`; of equal ones the first rank is
    taken. Text is the mean word embedding over `tokens`, image the class token, zeros without an image.

    Attributes:
        text_keys: f32[L + 1, R, D]; the last are the mm_projector's.
        image_keys: f32[L + 1, R, Dv].
        origin: i32[R], the task that each rank was learned for.
        tasks: number of tasks.
        top: ranks that are on.
        image_weight: of the image's part.
        digits: that scores keep.
    """

    kind: ClassVar[str] = "rank"

    text_keys: np.ndarray
    image_keys: np.ndarray
    origin: np.ndarray
    tasks: int
    top: int
    image_weight: float
    digits: int

    def tensors(self) -> dict[str, np.ndarray]:
        """text_keys, image_keys, origin."""
        return {"text_keys": self.text_keys, "image_keys": self.image_keys, "origin": self.origin}


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
    if method.routing_tokens not in TOKENS[:3]:
        raise ValueError(
            f"{method.name} with config.method.routing_tokens={method.routing_tokens!r} routes a prompt by the rows beside it as well"
        )
    params, stage = jax.tree.map(np.asarray, state.params), int(state.stage)
    keys = np.concatenate([params["keys"][:stage], params["key"][None]])  # [M, D]
    return Routing(keys, temperature(keys.shape[-1]), "max", method.proj_variant, params["query_projector"], tokens=method.routing_tokens)
