"""Greedy generation in batches: prompts are read once, then one token per row and step until every row has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Answers of a batch.

    Attributes:
        tokens: i32[B, max_new_tokens] the answer, then EOS where the row ended, then padding.
        count: i32[B] number of tokens of the answer; EOS is not counted.
        hit_cap: bool[B] the row was cut off before it ended.
        contexts: what the layers decided at prefill, stacked [L, ...]; see `Adapter.layer_gate`.
    """

    tokens: jax.Array
    count: jax.Array
    hit_cap: jax.Array
    contexts: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    step: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    cache: Any


def generate(
    llava: Any,
    batch: Mapping[str, jax.Array],
    make_adapter: Callable | None = None,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    vocab_limit: int | None = None,
    projector: Mapping | None = None,
    with_images: bool = True,
    regate: bool = False,
    embedded: jax.Array | None = None,
    prefix: Any = None,
    start: int = 0,
) -> Generated:
    """Generates the most probable next token until EOS or the cap; pure, to be called under jax.jit.

    Rows of different lengths may share a batch: a row's tokens are those that it gets alone.

    Args:
        llava: object with encode_image, project, embed, decode and logits (`proglora_jax.models.llava.Llava`).
        batch: tokens i32[B, T] right padded, length i32[B], image f32[B, H, W, 3]; where there, valid bool[B] is False on rows that
            only fill the batch: these get no tokens and do not prolong the loop.
        make_adapter: (embeddings[B, T, D], batch) -> Adapter; called once, so that its gates are those of the whole prompt and travel
            with the cache. None runs the bare model.
        max_new_tokens: cap on the answer, EOS included; static.
        eos_id: id that ends a row.
        pad_id: id that fills tokens after the end.
        vocab_limit: ids from this one on are never chosen (rows of the embedding table that no token uses); None allows all.
        projector: projector in place of the model's own, see `Llava.project`.
        with_images: False skips the vision tower for a batch without images; static.
        regate: ask `make_adapter` again for every new token, with that token's embedding alone and {"new_token": True} in the batch
            (what ProgLoRA's released code does); static.
        embedded: [B, T, D] embeddings of the prompts where the caller has made them; the vision tower is not asked then.
        prefix: keys and values [L, B, S, K, H] of the beginnings of all prompts where the caller has read them, with at least
            start + T + max_new_tokens places; the batch holds what follows, and its lengths count that alone.
        start: positions in `prefix`; static.

    Returns:
        Generated(tokens, count, hit_cap).
    """
    if embedded is None:
        features = llava.project(llava.encode_image(batch["image"]), projector) if with_images else None
        embedded = llava.embed(batch["tokens"], features)
    x = embedded  # [B, T, D]
    adapter = None if make_adapter is None else make_adapter(x, batch)
    length = batch["length"]
    rows, prompt = batch["tokens"].shape
    valid = batch.get("valid", jnp.ones((rows,), bool))

    last = jnp.maximum(length - 1, 0)[:, None]  # [B, 1], the positions that predict the first tokens
    if prefix is None:
        output = llava.decode(x, adapter=adapter, cache_size=prompt + max_new_tokens, positions=last)
    else:
        output = llava.decode(x, adapter=adapter, cache=prefix, start=start, positions=last)
    contexts = output.contexts

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        position = start + length + state.step - 1  # where the token of the step before goes
        embedded = llava.embed(state.token[:, None], None)
        own = make_adapter(embedded, {**batch, "new_token": True}) if regate and make_adapter is not None else adapter
        output = llava.decode(embedded, adapter=own, cache=state.cache, position=position, contexts=None if regate else contexts)
        token = _choose(llava.logits(output.hidden[:, 0]), vocab_limit)
        return _write(state, token, output.cache, eos_id, pad_id)

    tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    state = _State(jnp.int32(0), jnp.zeros((rows,), jnp.int32), ~valid, tokens, output.cache)
    state = _write(state, _choose(llava.logits(output.hidden[:, 0]), vocab_limit), output.cache, eos_id, pad_id)
    state = jax.lax.while_loop(unfinished, advance, state)
    # A filler row is done from the start and holds padding only, so its count is 0 whatever the padding id is.
    ended = jnp.any(state.tokens == eos_id, axis=1)
    count = jnp.where(ended, jnp.argmax(state.tokens == eos_id, axis=1), max_new_tokens)
    return Generated(state.tokens, jnp.where(valid, count, 0).astype(jnp.int32), valid & ~ended, contexts)


def _choose(logits: jax.Array, vocab_limit: int | None) -> jax.Array:
    """The most probable id per row, i32[B], among the first `vocab_limit`."""
    if vocab_limit is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_limit, logits, -jnp.inf)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _write(state: _State, token: jax.Array, cache: Any, eos_id: int, pad_id: int) -> _State:
    """The state after one more token per row; rows that have ended get padding."""
    token = jnp.where(state.done, pad_id, token)
    tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, axis=1)
    return _State(state.step + 1, token, state.done | (token == eos_id), tokens, cache)
