"""How alike tasks are: mean embeddings of images, instructions and answers, and the product of their cosines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from proglora_jax.adapters.gates import mean_feature
from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import chosen_batches
from proglora_jax.core import mesh as meshes
from proglora_jax.core.tree import named_generator
from proglora_jax.data.batch import ANSWER, INSTRUCTION
from proglora_jax.data.rows import EncodedRows

PARTS = ("image", "instruction", "answer")
Embedding = Mapping[str, np.ndarray]


def task_embedding(session: Session, name: str, rows: EncodedRows, batch_size: int) -> dict[str, np.ndarray]:
    """Mean embeddings of a task's training rows.

    Args:
        session: the session.
        name: the task's name (it seeds the choice of rows).
        rows: the task's rows.
        batch_size: rows at once.

    Returns:
        {"image": f32[Dv], "instruction": f32[D], "answer": f32[D]}; image is zero for a task without images.

    Source: ProgLoRA (Findings of ACL 2025), section 3.2; there with ViT and BERT, here with the vision tower's pooled
    features and the language model's word embeddings, which need no download.
    """
    settings = session.settings.similarity
    count = min(len(rows), settings.max_samples)
    chosen = np.sort(named_generator(session.settings.run.seed, "similarity", name).permutation(len(rows))[:count])
    embed = ENCODERS[settings.encoders](session)
    sums = {part: 0.0 for part in PARTS}
    images = 0
    for positions, batch in chosen_batches(session, rows, chosen, batch_size):
        found = embed(session.llava, meshes.put_batch(batch, session.mesh))
        out = {part: np.asarray(value, np.float64)[: len(positions)] for part, value in found.items()}
        sums["image"] = sums["image"] + (out["image"] * out["seen"][:, None]).sum(0)
        images += int(out["seen"].sum())
        for part in ("instruction", "answer"):
            sums[part] = sums[part] + out[part].sum(0)
    counts = {"image": max(images, 1), "instruction": count, "answer": count}
    return {part: (sums[part] / counts[part]).astype(np.float32) for part in PARTS}


def _backbone(session: Session) -> Callable:
    """(llava, batch) -> features of a batch's rows by the backbone's own vision tower and word embeddings."""
    pool = "class" if session.settings.similarity.pool == "cls" else "mean"

    def embed(llava, batch):
        x = llava.embed_tokens(batch["tokens"])
        parts = {
            "image": llava.image_summary(batch["image"], pool=pool),
            "instruction": mean_feature(x, batch["segments"] == INSTRUCTION),
            "answer": mean_feature(x, batch["segments"] == ANSWER),
        }
        return {part: meshes.replicate(value, session.mesh) for part, value in parts.items()} | {
            "seen": meshes.replicate(batch["image_mask"], session.mesh)}

    return jax.jit(meshes.on_mesh(embed, session.mesh))


ENCODERS = {"backbone": _backbone}


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two vectors; 1 if both are zero (two tasks without images), 0 if one is."""
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if norms[0] == 0.0 or norms[1] == 0.0:
        return float(norms[0] == norms[1])
    return float(np.dot(first.astype(np.float64), second.astype(np.float64)) / (norms[0] * norms[1]))


def similarities(embeddings: Sequence[Embedding], current: Embedding, clamp: bool) -> np.ndarray:
    """Similarity of the current task to each earlier one: f32[i], the product of three cosines.

    Source: ProgLoRA (Findings of ACL 2025), Eq. 2.
    """
    values = [float(np.prod([cosine(earlier[part], current[part]) for part in PARTS])) for earlier in embeddings]
    values = np.asarray(values, np.float32)
    return np.clip(values, 0.0, 1.0) if clamp else values
