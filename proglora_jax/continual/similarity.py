"""How alike tasks are: mean embeddings of images, instructions and answers, kept in the workdir, and the product of their cosines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from proglora_jax.checkpoints.integrity import CheckpointDamaged, atomic_write_json, read_json
from proglora_jax.continual.session import Session
from proglora_jax.continual.similarity_encoders import PARTS, Embedding, Encoders
from proglora_jax.core.tree import named_generator
from proglora_jax.data.rows import EncodedRows

FOLDER = "similarity"


def task_embedding(session: Session, encoders: Encoders, name: str, rows: EncodedRows) -> dict[str, np.ndarray]:
    """Mean embeddings of a task's training rows, read back where this workdir has them from the same data and encoders.

    Args:
        session: the session.
        encoders: what embeds.
        name: the task's name (it seeds the choice of rows).
        rows: the task's rows.

    Returns:
        {"image": f32[Dv], "instruction": f32[D], "answer": f32[D]}; image is zero for a task without images.

    Source: ProgLoRA (Findings of ACL 2025), section 3.2.
    """
    path, key = session.workdir / FOLDER / f"{name}.json", _key(session, encoders, name, rows)
    known = _read(path, key)
    if _agreed(known is not None):
        return known
    count = min(len(rows), session.settings.similarity.max_samples)
    chosen = np.sort(named_generator(session.settings.run.seed, "similarity", name).permutation(len(rows))[:count])
    embedding = encoders.embed(rows, chosen)
    if session.chief:
        # Numbers survive the way through text: a float32 is exact in the shortest decimal of its float64.
        lists = {part: embedding[part].astype(float).tolist() for part in PARTS}
        atomic_write_json(path, {"key": key, "rows": count, "embedding": lists}, checksum=True)
    return embedding


def _key(session: Session, encoders: Encoders, name: str, rows: EncodedRows) -> str:
    """Hash of everything that decides an embedding."""
    settings = session.settings.similarity
    parts = [name, rows.digest(), encoders.fingerprint, settings.encoders, settings.pool, settings.text_pool, settings.max_samples,
             session.settings.run.seed, repr(session.images)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The embedding of a file, or None where there is none, or one of something else, or a damaged one."""
    if not path.exists():
        return None
    try:
        saved = read_json(path, checksum=True)
    except CheckpointDamaged as damage:
        logging.warning("%s is computed again: %s", path, damage.reason)
        return None
    if saved.get("key") != key:
        logging.warning("%s is computed again: it was made from other records or encoders.", path)
        return None
    return {part: np.asarray(saved["embedding"][part], np.float32) for part in PARTS}


def _agreed(known: bool) -> bool:
    """Whether every process knows; all must take the same way."""
    if jax.process_count() == 1:
        return known
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(known)).all())


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
