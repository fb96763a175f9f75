"""ProgLoRA (static): blocks are fused with fixed weights from task similarity; old samples are replayed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.data import replay
from proglora_jax.methods.base import GateInputs, Probe, Replay, TaskInfo, require, require_choice
from proglora_jax.methods.pooled import Pooled


@dataclasses.dataclass(frozen=True)
class ProgLoRAStatic(Pooled):
    """y = W x + s (B_i A_i x + sum_{p<i} w_{p,i} B_p A_p x) with w the similarity of the tasks; needs the task's identity at test.

    Attributes:
        weights: "similarity", or "ones" (the ablation with every weight 1).
        recall_enabled: whether old samples are replayed.
        recall_weight: lambda, the loss weight of a replayed sample.
        recall_per_task: phi, samples of an old task that has nothing in common with the new one.
        recall_count: "similarity" ((1 - w) phi samples), "fixed" or "random_phi" (phi samples of each old task).
        replay_block: fused block that a replayed sample of task p runs through: "current" or "own_task".
        replay_mix: "concat" or "separate_batch".

    Source: ProgLoRA (Findings of ACL 2025), section 3.2, Eqs. 2-4. The released code has no similarity code; the replay
    block and the mixing are read from the text, see the flags.
    """

    weights: str = "similarity"
    recall_enabled: bool = True
    recall_weight: float = 2.0
    recall_per_task: int = 200
    recall_count: str = "similarity"
    replay_block: str = "current"
    replay_mix: str = "concat"

    name: ClassVar[str] = "proglora_static"
    uses_task_id: ClassVar[bool] = True
    keeps_forward: ClassVar[bool] = False
    fixed_at_test: ClassVar[bool] = True

    @property
    def replays_apart(self) -> bool:
        """By `replay_mix`."""
        return self.replay_mix == "separate_batch"

    def __post_init__(self):
        super().__post_init__()
        require_choice("weights", self.weights, ("similarity", "ones"))
        require_choice("recall_count", self.recall_count, ("similarity", "fixed", "random_phi"))
        require_choice("replay_block", self.replay_block, ("current", "own_task"))
        require_choice("replay_mix", self.replay_mix, ("concat", "separate_batch"))
        require(self.recall_weight >= 0, "recall_weight", self.recall_weight, "must be >= 0 (2.0 in the paper)")
        require(self.recall_per_task >= 0, "recall_per_task", self.recall_per_task, "must be >= 0 (200 in the paper)")

    @property
    def uses_similarity(self) -> bool:
        """For the weights of the blocks, and for how much is replayed."""
        return self.weights == "similarity" or (self.recall_enabled and self.recall_count == "similarity")

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """An empty table of weights beside the pool."""
        state = super().init(targets, projector, total, seed)
        return dataclasses.replace(state, memory={"weights": jnp.zeros((total, total), jnp.float32)})

    def start_task(self, state: CLState, info: TaskInfo, probe: Probe | None) -> CLState:
        """Writes the task's row: similarity to each earlier task, 1 for itself, 0 for later ones."""
        state = super().start_task(state, info, probe)
        row = np.zeros(info.total, np.float32)
        row[: info.index] = info.similarity if self.weights == "similarity" else 1.0
        row[info.index] = 1.0
        table = jnp.asarray(state.memory["weights"]).at[info.index].set(row)
        return dataclasses.replace(state, memory=state.memory | {"weights": table})

    def gates(self, params: PyTree, memory: PyTree, inputs: GateInputs) -> PyTree:
        """The row of the current task while training, the row of the sample's own task at test."""
        if inputs.training and self.replay_block == "current":
            weights = jnp.broadcast_to(memory["weights"][inputs.stage], (inputs.task_id.shape[0], memory["weights"].shape[1]))
        else:
            weights = memory["weights"][inputs.task_id]  # [B, M]
        return self.split_gates(params, weights, inputs.stage)

    def replay(self, info: TaskInfo) -> Replay | None:
        """(1 - similarity) * phi samples of each earlier task, weighted by lambda."""
        if not self.recall_enabled or info.index == 0:
            return None
        similarity = info.similarity if self.recall_count == "similarity" else np.zeros(info.index)
        counts = tuple(replay.replay_count(float(value), self.recall_per_task) for value in similarity)
        return Replay(counts, self.recall_weight, self.replay_mix)

    def to_disk(self, state: CLState):
        """The block, the rest, and the table of weights."""
        return super().to_disk(state) | {"memory": dict(state.memory)}

    def from_disk(self, tree, fresh: CLState, stage: int) -> CLState:
        """The pool and the table of weights."""
        state = super().from_disk(tree, fresh, stage)
        return dataclasses.replace(state, memory=tree["memory"])

    def fold(self, state: CLState, task: int) -> PyTree:
        """The fused block of a task: constants, so one adapter says it all."""
        return self.fold_weighted(state, np.asarray(state.memory["weights"][task]))
