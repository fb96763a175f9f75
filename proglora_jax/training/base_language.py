"""Second half of the base model's recipe: the language model learns the generic mixture on top of a frozen vision tower."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.data.synthetic.generic import draw_turns
from proglora_jax.data.synthetic.words import named_rng
from proglora_jax.data.templates import get_template
from proglora_jax.models.layers import Settings
from proglora_jax.models.llava import Llava
from proglora_jax.models.presets import LlavaConfig
from proglora_jax.training.base_alignment import Pictures, muon, normalise

LENGTH = 112
MOST_LABELS = 40
# Share of conversations without a picture: many in the first pass, for looking things up is learned from text first.
TEXT_ONLY, TEXT_FIRST = 0.1, 0.3


class Sequences(NamedTuple):
    """Encoded conversations; N rows of T = LENGTH tokens with at most K = MOST_LABELS supervised ones.

    Attributes:
        tokens: i16[N, T], image positions expanded, right padded.
        label_index: i16[N, K] positions whose hidden state predicts a label.
        labels: i16[N, K].
        turn: i8[N, K] number of the turn that a label belongs to, -1 where unused.
    """

    tokens: np.ndarray
    label_index: np.ndarray
    labels: np.ndarray
    turn: np.ndarray


def encode_turns(tokenizer: Tokenizer, turns: list[tuple[str, str]], patches: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """One conversation in the tuning's template.

    Args:
        tokenizer: the base model's.
        turns: (question, answer) pairs; turns that no longer fit are left out.
        patches: image tokens, 0 for text only.

    Returns:
        (ids, [(position that predicts, label, turn)]).
    """
    template = get_template("vicuna_v1_bare")

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    ids, labels = [pieces.BOS], []
    for number, (question, answer) in enumerate(turns):
        before, message, after = template.user_text(question, number == 0, image=bool(patches) and number == 0)
        head, placeholder, tail = (before + message + after).partition("<image>")
        prompt = ids_of(head) + ([pieces.IMAGE] * patches + ids_of(tail) if placeholder and patches else [])
        reply = ids_of(f"{template.assistant} {answer}")[len(ids_of(template.assistant)) :] + [pieces.EOS]
        if len(ids) + len(prompt) + len(reply) > LENGTH or len(labels) + len(reply) > MOST_LABELS:
            break
        ids += prompt
        labels += [(len(ids) - 1 + i, label, number) for i, label in enumerate(reply)]
        ids += reply
    return ids, labels


def draw_sequences(
    seed: int, name: str, pictures: Pictures, tokenizer: Tokenizer, patches: int, text_only: float = TEXT_ONLY
) -> Sequences:
    """One conversation for each picture of a pool (some of them without the picture); `name` names the random stream."""
    count = len(pictures.scenes)
    tokens = np.full((count, LENGTH), pieces.PAD, np.int16)
    index, labels = np.zeros((2, count, MOST_LABELS), np.int16)
    turn = np.full((count, MOST_LABELS), -1, np.int8)
    for row, scene in enumerate(pictures.scenes):
        rng = named_rng(seed, "turns", name, row)
        blind = rng.random() < text_only
        ids, found = encode_turns(tokenizer, draw_turns(rng, None if blind else scene, 5), 0 if blind else patches)
        tokens[row, : len(ids)] = ids
        for k, (position, label, number) in enumerate(found):
            index[row, k], labels[row, k], turn[row, k] = position, label, number
    return Sequences(tokens, index, labels, turn)


def picture_features(tree: dict, config: LlavaConfig, pictures: Pictures, chunk: int = 256) -> np.ndarray:
    """Features of the frozen vision tower for a whole pool, f16[N, P, Dv]."""
    encode = jax.jit(lambda pixels: Llava.from_tree(config, tree).encode_image(normalise(pixels)).astype(jnp.float16))
    parts = [np.asarray(encode(pictures.pixels[i : i + chunk])) for i in range(0, len(pictures.pixels), chunk)]
    return np.concatenate(parts)


def train_language(
    tree: dict, config: LlavaConfig, pictures: Pictures, held_out: Pictures, tokenizer: Tokenizer, *, seed: int, steps: int, batch: int,
    rate: float, log: Callable[[str], None],
) -> tuple[dict, float]:
    """Trains language model and projector on the generic mixture.

    Args:
        tree: parameters after alignment.
        config: sizes; the head is tied to the embeddings while training.
        pictures: training pool; every pass over it asks new questions.
        held_out: pictures to measure on.
        tokenizer: the base model's.
        seed: of questions and order.
        steps: optimizer steps.
        batch: conversations a step.
        rate: peak learning rate (3 % warm-up, cosine).
        log: takes progress lines.

    Returns:
        (the trained parameters, share of held-out answers that are right word for word).
    """
    patches = config.image_tokens
    trained = {"language": tree["language"], "mm_projector": tree["mm_projector"]}
    features, unseen = (picture_features(tree, config, pool) for pool in (pictures, held_out))
    test = draw_sequences(seed, "held out", held_out, tokenizer, patches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps * 3 // 100), steps, rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon(schedule))
    rows_order, passes, sequences = np.empty(0, np.int64), 0, None
    used = None

    def outputs(trained, used, features, tokens, label_index):
        model = Llava.from_tree(config, {**tree, **trained}, Settings(unroll=max(1, config.text_config.num_hidden_layers - 1)))
        x = model.embed(tokens.astype(jnp.int32), model.project(features.astype(jnp.float32)))
        hidden = model.decode(x).hidden
        picked = jnp.take_along_axis(hidden, label_index.astype(jnp.int32)[..., None], 1)  # [B, K, D]
        # Words that no generic answer holds are left alone, so that tuning finds them where they were drawn.
        return jnp.where(used, model.logits(picked), -1e9)

    def loss_of(trained, used, features, tokens, label_index, labels, turn):
        logits = outputs(trained, used, features, tokens, label_index)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
        return jnp.sum(losses * (turn >= 0)) / jnp.sum(turn >= 0)

    @jax.jit
    def step(trained, state, used, *data):
        loss, gradients = jax.value_and_grad(loss_of)(trained, used, *data)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    guess = jax.jit(lambda *args: jnp.argmax(outputs(*args), -1))
    state, start, rng = optimizer.init(trained), time.time(), named_rng(seed, "language")
    for i in range(steps):
        if len(rows_order) < batch:
            share = TEXT_ONLY if passes else TEXT_FIRST
            sequences = draw_sequences(seed, f"pass {passes}", pictures, tokenizer, patches, share)
            used = _used_words(sequences, config.text_config.vocab_size) if used is None else used
            rows_order, passes = rng.permutation(len(features)), passes + 1
        rows, rows_order = rows_order[:batch], rows_order[batch:]
        trained, state, loss = step(trained, state, used, features[rows], *(part[rows] for part in sequences))
        if (i + 1) % 200 == 0 or i + 1 == steps:
            right = exact_match(lambda *a: guess(trained, used, *a), unseen, test)
            log(f"language step {i + 1}/{steps}: loss {float(loss):.3f}, held-out exact match {np.mean(right[0]):.3f}; "
                f"{(time.time() - start) / (i + 1):.3f} s/step")
    right, where = exact_match(lambda *a: guess(trained, used, *a), unseen, test)
    for kind in sorted({scene.kind for scene in held_out.scenes}):
        chosen = [r for r, row in zip(right, where, strict=True) if held_out.scenes[row].kind == kind]
        log(f"language, held-out {kind}: exact match {np.mean(chosen):.3f} of {len(chosen)}")
    return {**tree, **trained}, float(np.mean(right))


def _used_words(sequences: Sequences, vocabulary: int) -> jax.Array:
    """bool[V]: pieces that occur as labels."""
    used = np.zeros(vocabulary, bool)
    used[sequences.labels[sequences.turn >= 0]] = True
    return jnp.asarray(used)


def exact_match(guess: Callable, features: np.ndarray, sequences: Sequences, chunk: int = 100) -> tuple[list[bool], list[int]]:
    """Whether each answer is predicted word for word (which is what greedy decoding would give), and its row.

    Args:
        guess: (features, tokens, label_index) -> ids [B, K].
        features: f16[N, P, Dv].
        sequences: N rows, N a multiple of `chunk`.
        chunk: rows at a time.
    """
    right, where = [], []
    for i in range(0, len(features), chunk):
        part = slice(i, i + chunk)
        wrong = np.asarray(guess(features[part], sequences.tokens[part], sequences.label_index[part])) != sequences.labels[part]
        for row, (misses, turns) in enumerate(zip(wrong, sequences.turn[part], strict=True)):
            for number in range(int(turns.max()) + 1):
                right.append(not misses[turns == number].any())
                where.append(i + row)
    return right, where
