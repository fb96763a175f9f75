"""What methods may ask of a stage's training samples: features through the jitted probe, and squared gradients."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from proglora_jax.continual.session import Session
from proglora_jax.continual.stage_data import chosen_batches, numbered_batches
from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import CLState, PyTree
from proglora_jax.data.rows import EncodedRows
from proglora_jax.methods.views import Probe
from proglora_jax.training import fisher


def open_probe(session: Session, rows: EncodedRows, earlier: Callable[[int], EncodedRows] | None = None) -> Probe:
    """The probe of a stage's rows; what it returns lies in every process.

    Args:
        session: the session.
        rows: the stage's rows.
        earlier: (index of an earlier task) -> that task's rows.
    """

    def samples(state: CLState, numbers: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.asarray(numbers)
        params, memory = meshes.put_replicated((state.params, state.memory), session.mesh)
        parts: dict[str, np.ndarray] = {}
        for positions, batch in chosen_batches(session, rows, numbers, session.settings.evaluate.batch_size):
            out = session.probe_step(params, memory, session.llava, meshes.put_batch(batch, session.mesh), state.stage)
            for name, value in out.items():
                host = np.asarray(value)[: len(positions)]
                parts.setdefault(name, np.zeros((len(numbers), *host.shape[1:]), host.dtype))[positions] = host
        return parts

    def squared_gradients(state: CLState, numbers: np.ndarray, size: int, kind: str, names: tuple[str, ...]) -> PyTree:
        params, memory = meshes.put_replicated((state.params, state.memory), session.mesh)
        total, batches = meshes.put_replicated(fisher.zeros(state.params, names), session.mesh), 0
        add = session.squared_gradients(names, kind)
        for batch in numbered_batches(session, rows, numbers, size):
            total = add(total, params, memory, session.llava, meshes.put_batch(batch, session.mesh), state.stage)
            batches += 1
        count = batches if kind == "batch" else len(numbers)
        return jax.tree.map(lambda leaf: leaf / max(count, 1), total)

    return Probe(samples, squared_gradients, earlier and (lambda task: open_probe(session, earlier(task))))
