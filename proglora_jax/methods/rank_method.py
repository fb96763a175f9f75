"""The hyper-parameters of a method that learns single ranks (PCLR's), and what follows from them alone: sizes, turns of the pool."""

from __future__ import annotations

import dataclasses

from proglora_jax.adapters import rank_pool
from proglora_jax.core.types import PyTree
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method, require


@dataclasses.dataclass(frozen=True)
class RankMethod(Method):
    """A pool of ranks that tasks add to and that is compressed when it is full.

    Attributes:
        rank: new ranks of a task.
        alpha: the delta of chosen ranks is scaled by alpha / top_ranks, that of shared ranks by alpha / shared_ranks.
        top_ranks: ranks that a sample takes.
        narrow_ranks: new ranks of the tasks from `narrow_from` on.
        narrow_from: number of that task, counted from 1; 0 for none.
        capacity: ranks of a full pool.
        shared_ranks: ranks that are always on from the first integration on.
        near_from: from this task on (from 1) new ranks begin as copies of the old ones nearest to the task's mean query; 0 never.
        align_weight: weight of the keys' loss.
        image_weight: weight of the image's part of a score; 0 takes vision width / model width.
        query_samples: rows of a task that its mean query is made of; 0 takes all.
        integrate: whether compression is followed by distillation.
        progressive: whether the pool is compressed whenever it is full.
        integrate_learning_rate: of the second phase.
        integrate_batch_size: rows of its step; 0 as in the first phase.
        integrate_epochs: passes of it.
        top_words: words of the KL.
        distill_temperature: its temperature.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    a_init: str = "fan_in"
    train_mm_projector: bool = False
    top_ranks: int = 64
    narrow_ranks: int = 32
    narrow_from: int = 7
    capacity: int = 256
    shared_ranks: int = 32
    near_from: int = 5
    align_weight: float = 0.2
    image_weight: float = 0.0
    query_samples: int = 2048
    integrate: bool = True
    progressive: bool = True
    integrate_learning_rate: float = 5e-5
    integrate_batch_size: int = 0
    integrate_epochs: int = 1
    top_words: int = 100
    distill_temperature: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        for field in ("top_ranks", "narrow_ranks", "capacity", "shared_ranks", "integrate_epochs", "top_words"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be >= 1")
        require(self.narrow_ranks <= self.rank, "narrow_ranks", self.narrow_ranks, f"must be at most config.method.rank={self.rank}")
        for field in ("rank", "narrow_ranks"):
            value = getattr(self, field)
            require(self.capacity % value == 0, "capacity", self.capacity, f"must be a multiple of config.method.{field}={value}")
        for field in ("narrow_from", "near_from", "align_weight", "image_weight", "query_samples", "integrate_batch_size"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "must be >= 0")
        for field in ("integrate_learning_rate", "distill_temperature"):
            require(getattr(self, field) > 0, field, getattr(self, field), "must be positive")

    @property
    def scale(self) -> float:
        """alpha / top_ranks, the factor on chosen ranks."""
        return self.alpha / self.top_ranks

    def new_ranks(self, index: int) -> int:
        """Ranks that a task adds, by its place from 0."""
        return self.narrow_ranks if self.narrow_from and index + 1 >= self.narrow_from else self.rank

    def learning(self, kind: str) -> tuple[int, int]:
        """(new ranks that a learning phase of this kind trains, all of them on; old ones that fill up to `top_ranks`)."""
        new = self.narrow_ranks if kind == "learn_narrow" else self.rank
        return new, max(0, self.top_ranks - new)

    def turns(self, total: int) -> list[rank_pool.Turn]:
        """What each task of a sequence does to the pool."""
        try:
            return rank_pool.schedule([self.new_ranks(index) for index in range(total)], self.capacity, self.progressive)
        except ValueError as error:
            raise UserError(f"config.method.capacity={self.capacity}: {error}; the paper's is 4 x rank and 8 x narrow_ranks") from error

    def image_weight_of(self, params: PyTree) -> float:
        """Weight of the image's part of a score."""
        widths = [params["keys"][kind].shape[-1] for kind in ("image", "text")]
        return self.image_weight or widths[0] / widths[1]
