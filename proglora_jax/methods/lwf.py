"""LwF: sequential LoRA whose answers are held to those of the model as it was before the task, on the new task's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from proglora_jax.core.types import CLState, PyTree, Targets
from proglora_jax.methods.base import Cost, GateInputs, Passes, Phase, Probe, TaskInfo, require, require_choice
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.views import Pass

TAUGHT = ("block", "mm_projector")


@dataclasses.dataclass(frozen=True)
class LwF(LoRA):
    """L = CE + lambda T^2 mean KL( softmax(z_teacher / T) || softmax(z_student / T) ) over supervised positions.

    Attributes:
        distill_weight: lambda.
        temperature: T, of both distributions ("logits" only).
        mode: "logits", or "hidden" (mean squared difference of the final hidden states at the same positions).

    Source: Learning without Forgetting (ECCV 2016), section 3. The ProgLoRA papers name it as a baseline, and no code for this
    benchmark exists. What is left open and what is chosen: the teacher is the block and the mm_projector as they were at the end of the
    stage before (the backbone is shared, so only these are held twice), without dropout and without gradient, on the same batch, since
    old data is not kept; it is asked where answers are predicted, not at prompt positions. lambda = 1 and T = 2 are the original's; a
    public code base for multimodal instruction tuning uses a lambda of 1e-3 or less. In the first stage there is no teacher: plain
    LoRA, and the teacher's pass does not run. Its cost from then on is one forward pass more (the vision tower is shared).
    """

    distill_weight: float = 1.0
    temperature: float = 2.0
    mode: str = "logits"

    name: ClassVar[str] = "lwf"

    def __post_init__(self):
        super().__post_init__()
        require(self.distill_weight >= 0, "distill_weight", self.distill_weight, "must be >= 0 (1.0 in the original)")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive (2.0 in the original)")
        require_choice("mode", self.mode, ("logits", "hidden"))

    def init(self, targets: Targets, projector: PyTree, total: int, seed: int) -> CLState:
        """The place of the teacher is there from the first stage on; nobody is asked then."""
        return self._taught_by_itself(super().init(targets, projector, total, seed))

    def end_task(self, state: CLState, info: TaskInfo, probe: Probe) -> CLState:
        """The model as it is becomes the teacher; the next task may begin with another projector."""
        return self._taught_by_itself(super().end_task(state, info, probe))

    def from_disk(self, tree: Mapping[str, Any], fresh: CLState, stage: int) -> CLState:
        """The stage's own end is the next one's teacher."""
        return self._taught_by_itself(super().from_disk(tree, fresh, stage))

    def _taught_by_itself(self, state: CLState) -> CLState:
        return dataclasses.replace(state, memory={"teacher": {name: state.params[name] for name in TAUGHT}})

    def extra_loss(self, params: PyTree, memory: PyTree, inputs: GateInputs, key: jax.Array, passes: Passes | None = None):
        """The distance to the teacher; 0 in the first stage."""
        teacher = jax.lax.stop_gradient(memory["teacher"])
        ask = lambda: _seen(self.mode, passes.again(teacher))
        shape = jax.eval_shape(ask)
        theirs = jax.lax.cond(inputs.stage > 0, ask, lambda: jnp.zeros(shape.shape, shape.dtype))
        loss = passes.token_mean(self.distance(theirs, _seen(self.mode, passes.student)))
        distill = jnp.where(inputs.stage > 0, loss, 0.0)
        return self.distill_weight * distill, {"distill": distill}

    def cost(self, params: PyTree, info: TaskInfo, phase: Phase | None) -> Cost:
        """The teacher's pass, while a task after the first is trained."""
        plain = super().cost(params, info, phase)
        if phase is None or not info.index:
            return plain
        return dataclasses.replace(plain, teacher=plain.up, words="labels" if self.mode == "logits" else "")

    def distance(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        """f32[B, K] from scores f32[B, K, V] (or hidden states [B, K, D]) of both."""
        if self.mode == "hidden":
            return jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)).mean(axis=-1)
        theirs, ours = (jax.nn.log_softmax(z.astype(jnp.float32) / self.temperature, axis=-1) for z in (teacher, student))
        return self.temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1)


def _seen(mode: str, one: Pass) -> jax.Array:
    """What teacher and student are compared by."""
    return one.logits if mode == "logits" else one.hidden
