"""What embeds a task's images, instructions and answers: ViT and BERT as in the paper, or the backbone's own towers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proglora_jax.adapters.gates import mean_feature
from proglora_jax.checkpoints.encoder_import import EncoderSource, find_bert, find_vit, vit_images
from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import chosen_batches
from proglora_jax.core import mesh as meshes
from proglora_jax.data.batch import ANSWER, INSTRUCTION
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.rows import EncodedRows
from proglora_jax.data.word_pieces import load_word_pieces
from proglora_jax.models.encoders import BertEncoder, VitEncoder
from proglora_jax.models.layers import Settings as ModelOptions

PARTS = ("image", "instruction", "answer")
Embedding = Mapping[str, np.ndarray]
# Tokens that texts are padded to, so that a few programs serve all.
_LENGTHS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """How tasks are embedded.

    Attributes:
        fingerprint: hash of everything that decides what a text or an image becomes.
        embed: (rows, i64[n] row numbers) -> {"image": f32[Dv], "instruction": f32[D], "answer": f32[D]}, means over those rows;
            image is zero where none of them has one.
    """

    fingerprint: str
    embed: Callable[[EncodedRows, np.ndarray], dict[str, np.ndarray]]


def open_encoders(session: Session) -> Encoders:
    """The encoders that the config names; nothing is loaded before something is embedded.

    Raises:
        UserError: for folders that are missing or hold something else.
    """
    return {"backbone": _backbone, "vit_bert": _vit_bert}[session.settings.similarity.encoders](session)


# ---- the backbone's own


def _backbone(session: Session) -> Encoders:
    """The vision tower's pooled features and the mean of the language model's word embeddings: no download, no context."""
    pool = "class" if session.settings.similarity.pool == "cls" else "mean"

    def summaries(llava, batch):
        x = llava.embed_tokens(batch["tokens"])
        parts = {
            "image": llava.image_summary(batch["image"], pool=pool),
            "instruction": mean_feature(x, batch["segments"] == INSTRUCTION),
            "answer": mean_feature(x, batch["segments"] == ANSWER),
            "seen": batch["image_mask"],
        }
        return {part: meshes.replicate(value, session.mesh) for part, value in parts.items()}

    features = jax.jit(meshes.on_mesh(summaries, session.mesh))

    def embed(rows: EncodedRows, numbers: np.ndarray) -> dict[str, np.ndarray]:
        means = {part: _Mean() for part in PARTS}
        for positions, batch in chosen_batches(session, rows, numbers, session.settings.evaluate.batch_size):
            found = features(session.llava, meshes.put_batch(batch, session.mesh))
            out = {part: np.asarray(value)[: len(positions)] for part, value in found.items()}
            means["image"].add(out["image"][out["seen"]])
            means["instruction"].add(out["instruction"])
            means["answer"].add(out["answer"])
        return {part: mean.value() for part, mean in means.items()}

    return Encoders(session.base, embed)


# ---- ViT and BERT


def _vit_bert(session: Session) -> Encoders:
    """A ViT's class token (or mean over patches) and the mean over a BERT's last states (or its [CLS])."""
    settings = session.settings.similarity
    vit, bert = find_vit(settings.vit_path), find_bert(settings.bert_path)
    spec = vit_images(vit)
    pieces = load_word_pieces(str(bert.folder), bert.config.vocab_size, bert.config.max_position_embeddings)

    def embed(rows: EncodedRows, numbers: np.ndarray) -> dict[str, np.ndarray]:
        examples = [rows.rows[number].example for number in numbers]
        images = [example.image for example in examples if example.image is not None]
        # Every turn that is trained on counts as an instruction and an answer of its own; an empty answer is none.
        turns = [(human.strip(), gpt.strip()) for example in examples for human, gpt in example.turns if gpt.strip()]
        found = {"image": _mean_image(session, vit, spec, images) if images else np.zeros(vit.config.hidden_size, np.float32)}
        model = meshes.put_replicated(bert.load(), session.mesh)
        for part, place in (("instruction", 0), ("answer", 1)):
            found[part] = _mean_text(session, model, pieces([turn[place] for turn in turns]))
        return found

    return Encoders(f"{vit.fingerprint()} {bert.fingerprint()}", embed)


def _mean_image(session: Session, source: EncoderSource, spec: ImageSpec, paths: Sequence[str]) -> np.ndarray:
    """Mean feature f32[D] of images, each as often as it is listed."""
    settings = session.settings
    loader = ImageLoader(spec, "squash", settings.data.on_bad_image)
    model, mean = meshes.put_replicated(source.load(), session.mesh), _Mean()
    with concurrent.futures.ThreadPoolExecutor(max(1, settings.data.threads)) as threads:
        for positions, share in _batches(len(paths), settings.evaluate.batch_size, session.share):
            batch = {"image": np.stack(list(threads.map(loader, [paths[i] for i in share])))}
            found = _image_features(model, meshes.put_batch(batch, session.mesh), settings.similarity.pool, session.mesh)
            mean.add(np.asarray(found)[: len(positions)])
    return mean.value()


def _mean_text(session: Session, model: BertEncoder, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Mean feature f32[D] of texts, given as token ids, each as often as it is listed."""
    longest = model.config.max_position_embeddings
    texts, mean = sorted(texts, key=len), _Mean()
    for positions, share in _batches(len(texts), session.settings.evaluate.batch_size, session.share):
        members = [texts[i] for i in share]
        needed = len(texts[positions[-1]])  # the longest of the batch, whichever process has it: all must have one shape
        width = next((length for length in _LENGTHS if needed <= length < longest), longest)
        tokens = np.zeros((len(members), width), np.int32)
        for row, ids in zip(tokens, members):
            row[: len(ids)] = ids
        batch = {"tokens": tokens, "lengths": np.asarray([len(ids) for ids in members], np.int32)}
        found = _text_features(model, meshes.put_batch(batch, session.mesh), session.settings.similarity.text_pool, session.mesh)
        mean.add(np.asarray(found)[: len(positions)])
    return mean.value()


# Compiled once for all tasks, since they are functions of the file.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _image_features(model: VitEncoder, batch: Mapping[str, jax.Array], pool: str, mesh: Mesh) -> jax.Array:
    """f32[B, D] of images."""
    states = model(batch["image"], ModelOptions())
    return meshes.replicate(states[:, 0] if pool == "cls" else states[:, 1:].mean(axis=1), mesh)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _text_features(model: BertEncoder, batch: Mapping[str, jax.Array], pool: str, mesh: Mesh) -> jax.Array:
    """f32[B, D] of right-padded texts."""
    states = model(batch["tokens"], batch["lengths"], ModelOptions())
    real = jnp.arange(states.shape[1]) < batch["lengths"][:, None]
    return meshes.replicate(states[:, 0] if pool == "cls" else mean_feature(states, real), mesh)


def _batches(total: int, size: int, share: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions that a batch's first rows answer, this process's share of the batch); the last batch is filled up."""
    part, parts = share
    for start in range(0, total, size):
        positions = np.arange(start, min(total, start + size))
        yield positions, np.split(np.resize(positions, size), parts)[part]


class _Mean:
    """A mean of rows that come in batches, summed in float64 so that the order of a hundred thousand does not show."""

    def __init__(self):
        self._sum, self._count = 0.0, 0

    def add(self, rows: np.ndarray) -> None:
        """Takes in rows[n, D]."""
        self._sum = self._sum + np.asarray(rows, np.float64).sum(axis=0)
        self._count += len(rows)

    def value(self) -> np.ndarray:
        """f32[D]; zero where there were no rows."""
        return np.asarray(self._sum / max(1, self._count), np.float32)
