"""First half of the base model's recipe: vision tower and projector learn to name what lies under each patch, and where it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proglora_jax.data.synthetic.canvas import SIDE_PX
from proglora_jax.data.synthetic.generic import draw_scene
from proglora_jax.data.synthetic.scenes import Scene
from proglora_jax.data.synthetic.stencils import CELL_PX
from proglora_jax.data.synthetic.words import named_rng
from proglora_jax.models.llava import Llava
from proglora_jax.models.presets import LlavaConfig

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PADDING = (122, 116, 104)
# Words a patch may stand for, and pixels from which a thing counts as being under a patch.
MOST_WORDS = 6
LEAST_PX = 6


class Pictures(NamedTuple):
    """A pool of pictures with what the patches show; N pictures, P patches, W = MOST_WORDS.

    Attributes:
        pixels: u8[N, H, W, 3], padded to squares.
        words: i16[N, P, W] ids of the words under a patch, -1 where fewer.
        boxes: i16[N, P, 4] ids of the number words of the main thing's box, -1 on background.
        scenes: what was drawn.
    """

    pixels: np.ndarray
    words: np.ndarray
    boxes: np.ndarray
    scenes: list[Scene]


def normalise(pixels: jax.Array) -> jax.Array:
    """u8[B, H, W, 3] to what the vision tower takes, f32[B, H, W, 3]."""
    return (pixels.astype(jnp.float32) / 255 - MEAN) / STD


def pad_square(array: np.ndarray, fill: Any) -> np.ndarray:
    """Centres [h, w, ...] on a square of side max(h, w)."""
    height, width = array.shape[:2]
    side = max(height, width)
    out = np.empty((side, side, *array.shape[2:]), array.dtype)
    out[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = array
    return out


def element_words(scene: Scene, index: int) -> list[str]:
    """The words that an element stands for: colour, name, kind, and what a diagram says of it."""
    one = scene.elements[index]
    words = [one.colour] if one.colour else []
    if one.kind == "sign":
        return [*words, "board"]
    words.append(one.name)
    if one.kind == "object":
        words.append(one.name.capitalize())
    if one.kind in ("arrow", "thermometer"):
        words.append(one.kind)
    if one.kind == "bar":
        words += [extreme for extreme in ("tallest", "shortest") if scene.facts[extreme] == one.colour]
    if one.kind == "thermometer":
        words.append("higher" if scene.facts["warmer"] == one.name else "lower")
    if scene.facts.get("words") and len(scene.facts["words"]) == 2:
        words.append(("top", "bottom")[scene.facts["words"].index(one.name)])
    return words


def patch_labels(scene: Scene, ids: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Words and boxes of every patch.

    Args:
        scene: a picture.
        ids: piece -> id; words are looked up with a leading metaspace, letters of signs without.

    Returns:
        (words i16[P, W], boxes i16[P, 4]) as in `Pictures`.
    """
    grid = SIDE_PX // CELL_PX
    count = len(scene.elements)
    owner = pad_square(scene.canvas.owner, 0)
    cells = np.arange(SIDE_PX) // CELL_PX
    flat = ((cells[:, None] * grid + cells) * (count + 1) + owner).ravel()
    areas = np.bincount(flat, minlength=grid * grid * (count + 1)).reshape(grid * grid, count + 1)[:, 1:]
    words = np.full((grid * grid, MOST_WORDS), -1, np.int16)
    boxes = np.full((grid * grid, 4), -1, np.int16)
    useless = scene.quality == "useless"
    letters = {row * grid + column: ids[char] for row, column, char in scene.canvas.letters}
    names = [[ids["\u2581" + w] for w in element_words(scene, i)] for i in range(count)]
    corners = [[ids[f"\u2581{v:.2f}"] for v in box_of(scene, i)] for i in range(count)]
    plain = [ids["\u2581" + (scene.quality if scene.quality != "sharp" else "picture")]]
    for patch in range(grid * grid):
        there = [] if useless else [int(i) for i in np.argsort(-areas[patch]) if areas[patch, i] >= LEAST_PX]
        found = [word for i in there for word in names[i]]
        if patch in letters and not useless:
            found.insert(1, letters[patch])
        found = list(dict.fromkeys(found))[:MOST_WORDS] or plain
        words[patch, : len(found)] = found
        if there:
            boxes[patch] = corners[there[0]]
    return words, boxes


def box_of(scene: Scene, index: int) -> tuple[float, ...]:
    """An element's box in the padded-square frame."""
    width, height = scene.canvas.size
    side, dx, dy = max(width, height), max(height - width, 0) / 2, max(width - height, 0) / 2
    return tuple((v + d) / side for v, d in zip(scene.elements[index].box, (dx, dy, dx, dy), strict=True))


def draw_pictures(seed: int, name: str, count: int, ids: Mapping[str, int]) -> Pictures:
    """A pool of `count` pictures of the generic mixture; `name` names the random stream."""
    scenes = [draw_scene(named_rng(seed, "pictures", name, i)) for i in range(count)]
    labels = [patch_labels(scene, ids) for scene in scenes]
    pixels = np.stack([pad_square(scene.canvas.pixels, PADDING) for scene in scenes])
    return Pictures(pixels, np.stack([w for w, _ in labels]), np.stack([b for _, b in labels]), scenes)


def align(
    tree: dict, config: LlavaConfig, pictures: Pictures, held_out: Pictures, *, seed: int, steps: int, batch: int, rate: float,
    log: Callable[[str], None],
) -> tuple[dict, float]:
    """Trains vision tower, projector and word embeddings so that a projected patch is close to the words under it.

    Args:
        tree: the model's parameters.
        config: its sizes.
        pictures: training pool.
        held_out: pictures to measure on.
        seed: of the order of batches and of the four box heads (thrown away afterwards).
        steps: optimizer steps.
        batch: pictures a step.
        rate: peak learning rate (3 % warm-up, cosine).
        log: takes progress lines.

    Returns:
        (the trained parameters, share of words that held-out patches find).
    """
    width = config.text_config.hidden_size
    rng = named_rng(seed, "alignment")
    heads = jnp.asarray(rng.normal(0, width**-0.5, (4, width, width)).astype(np.float32))
    summary = jnp.asarray(rng.normal(0, 0.1, (config.vision_config.hidden_size, width)).astype(np.float32))
    trained = {"vision": tree["vision"], "mm_projector": tree["mm_projector"], "embed": tree["language"]["embed_tokens"], "heads": heads,
               "summary": summary}
    vocabulary = config.text_config.vocab_size
    names, pools = _compact([pictures.words, held_out.words], vocabulary)
    numbers, boxes = _compact([pictures.boxes, held_out.boxes], vocabulary)
    data = (pictures.pixels, pools[0], boxes[0])
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps * 3 // 100), steps, rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon(schedule))

    def loss_of(trained, pixels, words, boxes):
        model = Llava.from_tree(config, {**tree, "vision": trained["vision"], "mm_projector": trained["mm_projector"]})
        return _alignment_loss(model, trained, trained["embed"][names], trained["embed"][numbers], pixels, words, boxes)

    @jax.jit
    def step(trained, state, pixels, words, boxes):
        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, pixels, words, boxes)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, metrics

    evaluate = jax.jit(lambda *args: loss_of(*args)[1])
    state, start = optimizer.init(trained), time.time()
    for i in range(steps):
        rows = rng.integers(len(pictures.pixels), size=batch)
        trained, state, metrics = step(trained, state, *(part[rows] for part in data))
        if (i + 1) % 100 == 0 or i + 1 == steps:
            values = ", ".join(f"{k} {float(v):.3f}" for k, v in metrics.items())
            log(f"alignment step {i + 1}/{steps}: {values}; {(time.time() - start) / (i + 1):.3f} s/step")
    metrics = evaluate(trained, held_out.pixels, pools[1], boxes[1])
    log("alignment, held-out pictures: " + ", ".join(f"{k} {float(v):.3f}" for k, v in metrics.items()))
    language = {**tree["language"], "embed_tokens": trained["embed"]}
    return {**tree, "vision": trained["vision"], "mm_projector": trained["mm_projector"], "language": language}, float(metrics["words"])


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the linears (stacked ones layer by layer), Adam for the rest; updates have the size of Adam's."""

    def dimensions(params):
        def of_leaf(path, leaf):
            kernel = path[-1].key == "kernel"
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if kernel else None

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    return optax.contrib.muon(
        schedule, weight_decay=0.01, adam_b2=0.98, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions
    )


def _compact(pools: list[np.ndarray], vocabulary: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids that occur in arrays of ids (-1 for none), and the arrays with positions in that list in place of ids.

    Scores over the words that occur, instead of the whole vocabulary, halve the time of a step.
    """
    ids = np.unique(np.concatenate([pool[pool >= 0] for pool in pools]))
    place = np.full(vocabulary + 1, -1, np.int16)
    place[ids] = np.arange(len(ids))
    return ids, [place[pool] for pool in pools]


def _alignment_loss(
    model: Llava, trained: dict, names: jax.Array, numbers: jax.Array, pixels: jax.Array, words: jax.Array, boxes: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of a patch's words, of its box's four numbers and of the whole picture's words; and hit rates.

    The rate of words is the share of a patch's n words that are among its n best guesses.

    Args:
        model: the model to train.
        trained: holds `heads` [4, D, D] and `summary` [Dv, D].
        names: embeddings of the words that patches may show, [U, D].
        numbers: embeddings of the numbers that boxes may hold, [C, D].
        pixels: u8[B, H, W, 3].
        words: i16[B, P, W] indices into `names`, -1 where fewer.
        boxes: i16[B, P, 4] indices into `numbers`, -1 on background.
    """
    states = model.vision_states(normalise(pixels), trainable=True)
    z = _unit(model.project(states[:, 1:]))  # [B, P, D]
    there = words >= 0  # [B, P, W]
    logp = jax.nn.log_softmax(z @ names.T)
    picked_words = jnp.take_along_axis(logp, jnp.maximum(words, 0), -1)
    word_loss = -jnp.mean(jnp.sum(jnp.where(there, picked_words, 0), -1) / jnp.sum(there, -1))
    rows = jnp.arange(len(words))[:, None]
    columns = jnp.where(there, words, len(names)).reshape(len(words), -1)
    of_picture = jnp.zeros((len(words), len(names))).at[rows, columns].set(1, mode="drop")
    summary = jax.nn.log_softmax(_unit(states[:, 0] @ trained["summary"]) @ names.T)
    summary_loss = -jnp.mean(jnp.sum(of_picture * summary, -1) / jnp.sum(of_picture, -1))
    boxed = boxes >= 0  # [B, P, 4]
    scores = jnp.einsum("bpd,kde,ve->bpkv", z, trained["heads"], numbers)
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.maximum(boxes, 0)[..., None], -1)[..., 0]
    box_loss = -jnp.sum(jnp.where(boxed, picked, 0)) / jnp.maximum(jnp.sum(boxed), 1)
    loss = word_loss + 0.5 * box_loss + 0.2 * summary_loss
    # Background would flatter the rate, so only patches with something on them count.
    things = boxed[..., 0]
    count = jnp.sum(there, -1)  # [B, P]
    bar = jnp.take_along_axis(-jnp.sort(-logp, -1), count[..., None] - 1, -1)
    found = jnp.sum((picked_words >= bar) & there, -1) / count
    box_hits = jnp.sum((jnp.argmax(scores, -1) == boxes) & boxed) / jnp.maximum(jnp.sum(boxed), 1)
    return loss, {"loss": loss, "words": jnp.sum(found * things) / jnp.maximum(jnp.sum(things), 1), "numbers": box_hits}


def _unit(x: jax.Array) -> jax.Array:
    """x[..., D] scaled to mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)
