"""Plain LoRA: one block that goes on training task after task; zero-shot and multi-task use the same file."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from proglora_jax.core.types import CLState
from proglora_jax.methods.base import Adapter, Method, Phase, TaskInfo


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Sequential LoRA: A, B and the mm_projector are carried and train in every stage.

    Source: CoIN (NeurIPS 2024), the LoRA baseline; PEFT's initialisation.
    """

    rank: int = 128
    alpha: float = 256.0
    a_init: str = "kaiming"

    name: ClassVar[str] = "lora"
    fixed_at_test: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class MultiTask(LoRA):
    """One LoRA trained once on the shuffled union of all tasks, in a single stage.

    Source: CoIN (NeurIPS 2024), the multi-task row.
    """

    name: ClassVar[str] = "multi_task"
    joint: ClassVar[bool] = True
    isolated_as: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class ZeroShot(Method):
    """The backbone as it is: nothing trains, no adapter.

    Source: CoIN (NeurIPS 2024), the zero-shot row.
    """

    name: ClassVar[str] = "zero_shot"
    joint: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    fixed_at_test: ClassVar[bool] = True
    isolated_as: ClassVar[str] = ""

    def init(self, targets, projector, total, seed) -> CLState:
        """Only the projector is carried."""
        state = super().init(targets, projector, total, seed)
        return dataclasses.replace(state, params={"mm_projector": state.params["mm_projector"]})

    def phases(self, info: TaskInfo) -> tuple[Phase, ...]:
        """No training."""
        return ()

    def trainable_mask(self, state: CLState, info: TaskInfo) -> dict[str, bool]:
        """Nothing trains."""
        return {path: False for path in super().trainable_mask(state, info)}

    def adapter(self, params, gates, key) -> Adapter | None:
        """No adapter."""
        return None

    def fold(self, state: CLState, task: int):
        """Nothing to fold: an empty adapter."""
        return {}
