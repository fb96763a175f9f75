"""Runs a method on the tiny LLaVA task after task as the runner does, without files: start, probe, train, end, evaluate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import stub_llava
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.methods.base import Method, Phase, Replay, TaskInfo, check_contract
from proglora_jax.methods.registry import METHODS
from proglora_jax.methods.views import Probe
from proglora_jax.models.layers import gather_positions
from proglora_jax.training import fisher, losses, loop, optim
from proglora_jax.training import step as steps_of
from proglora_jax.training.settings import TrainSettings

# A small and quick version of any method: those of these fields that it has. LwF's teacher, who knows none of the new task's words,
# would hold the student back for longer than the few steps that there are.
SMALL = dict(
    rank=4, alpha=8.0, proj_width=8, recall_per_task=6, shared_layers=1, fisher_batches=4, distill_weight=0.1, experts=4,
    threshold=0.0, descriptor_width=4, top_ranks=4, capacity=8, narrow_ranks=2, narrow_from=3, near_from=3, shared_ranks=2,
)
TRAIN = TrainSettings(
    learning_rate=1e-2, projector_learning_rate=1e-3, schedule="constant", warmup_fraction=0.0, loss_norm="global_token_mean"
)


def small(name: str, **fields) -> Method:
    """A method of the registry with small sizes; `fields` override."""
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    return METHODS[name](**{key: value for key, value in (SMALL | fields).items() if key in known or key in fields})


@dataclasses.dataclass(eq=False)
class Harness:
    """A method, a mesh and three tasks of rows whose words are their own.

    Attributes:
        method: what runs.
        shape: sizes of the mesh's axes; one device without.
        dtype: compute dtype.
        train: how it trains.
        total: number of tasks.
        count: rows of a task.
        size: rows of a batch.
        seed: of rows, batches and the method's draws.
        image: whether three in four rows have an image.
        backbone: "tiny" (the tiny LLaVA) or "stub" (its stand-in, which compiles quicker).
    """

    method: Method
    shape: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    train: TrainSettings = TRAIN
    total: int = 3
    count: int = 32
    size: int = 8
    seed: int = 0
    image: bool = True
    backbone: str = "tiny"
    steps: list = dataclasses.field(default_factory=list)

    @functools.cached_property
    def mesh(self):
        """The devices."""
        return tiny_llava.mesh(**self.shape)

    @functools.cached_property
    def llava(self):
        """The backbone on the mesh."""
        if self.backbone == "stub":
            return meshes.put_replicated(stub_llava.stub(self.dtype), self.mesh)
        return tiny_llava.place(tiny_llava.model(self.dtype), self.mesh)

    @functools.cache  # noqa: B019 (a harness lives as long as its test file)
    def step(self, separate: bool, phase: Phase = Phase()):
        """The training step of a kind of phase."""
        self.steps.append(steps_of.make_train_step(self.method, self.train, "none", separate, self.mesh, phase))
        return self.steps[-1]

    def compiles(self) -> int:
        """Programs compiled for the training steps so far."""
        return sum(step._cache_size() for step in self.steps)

    @functools.cached_property
    def probe_step(self):
        """The probe of training samples."""
        return steps_of.make_probe(self.method, self.mesh)

    def initial(self) -> CLState:
        """The state before the first task."""
        return self.method.init(self.llava.targets(), meshes.to_host(self.llava.projector_params()), self.total, self.seed)

    def info(self, index: int) -> TaskInfo:
        """The task as the method sees it; the similarity to the one before is 0.75, to the one before that 0.5; NaN if it must not look."""
        similarity = np.float32([0.5, 0.75])[2 - index :] * (1 if self.method.uses_similarity else np.nan)
        return TaskInfo(index, f"task{index}", self.total, self.count, similarity, self.seed)

    @functools.cache  # noqa: B019
    def rows(self, task: int):
        """All training rows of a task."""
        return tiny_llava.rows_of(task, self.count, self.seed, **({} if self.image else {"image": False}))

    @functools.cached_property
    def probe(self) -> Probe:
        """What the method may ask of training rows."""
        earlier = lambda task: Probe(lambda state, numbers: self._samples(state, numbers, task), self._squared_gradients)
        return Probe(self._samples, self._squared_gradients, earlier)

    def _samples(self, state: CLState, numbers: np.ndarray, task: int | None = None) -> dict[str, np.ndarray]:
        """In batches of one size."""
        rows, parts = self.rows(int(state.stage) if task is None else task), []
        for start in range(0, len(numbers), self.size):
            chosen = np.resize(numbers[start : start + self.size], self.size)
            batch = meshes.put_batch(tiny_llava.batch([rows[i] for i in chosen]), self.mesh)
            parts.append(self.probe_step(*meshes.put_replicated((state.params, state.memory), self.mesh), self.llava, batch, state.stage))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(numbers)], *parts)

    @functools.cache  # noqa: B019
    def fisher_step(self, names: tuple[str, ...], kind: str):
        """The sum of squared gradients."""
        return fisher.make_squared_gradients(self.method, self.mesh, names, kind, "none")

    def _squared_gradients(self, state: CLState, numbers: np.ndarray, size: int, kind: str, names: tuple[str, ...]):
        rows, batches = self.rows(int(state.stage)), -(-len(numbers) // size)
        params, memory, total = meshes.put_replicated((state.params, state.memory, fisher.zeros(state.params, names)), self.mesh)
        whole = fisher.filled_size(size, meshes.batch_ways(self.mesh))
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            batch = fisher.fill(tiny_llava.batch([rows[i] for i in np.resize(chosen, whole)]), len(chosen))
            batch = meshes.put_batch(batch, self.mesh)
            total = self.fisher_step(names, kind)(total, params, memory, self.llava, batch, np.int32(state.stage))
        return jax.tree.map(lambda leaf: leaf / (batches if kind == "batch" else len(numbers)), total)

    def batches(self, index: int, replay: Replay | None, salt: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches of a stage, replayed rows among them."""
        rng = np.random.default_rng([self.seed, index, salt])
        own, old = list(self.rows(index)), []
        for task, count in enumerate(replay.counts if replay else ()):
            chosen = rng.permutation(self.count)[:count]
            old += [dataclasses.replace(self.rows(task)[i], weight=replay.weight) for i in chosen]
        part = max(1, round(self.size * replay.share)) if replay and replay.mix == "separate_batch" and old else 0
        pool = own if part else own + old
        while True:
            rows = [pool[i] for i in rng.permutation(len(pool))[: self.size - part]] + [old[i] for i in rng.integers(0, len(old), part)]
            yield tiny_llava.batch(rows)

    def control(self, index: int, step: int, steps: int, phase: Phase = Phase(), running=None) -> dict:
        """What the loop tells a step."""
        rates = optim.learning_rates(self.train, self.method, step, steps, phase)
        return {
            "stage": np.int32(index), "step": np.int32(step), "progress": np.float32(step / steps),
            "key": jax.random.key(self.seed * 1000 + index), "rates": {name: np.float32(rate) for name, rate in rates.items()},
            "running": running or {},
        }  # fmt: skip

    def begin(self, state: CLState, index: int) -> tuple[CLState, dict[str, bool]]:
        """The state with which a task's training starts, and its mask."""
        started = self.method.start_task(state, self.info(index), self.probe)
        return started, check_contract(self.method, state if index else None, started, self.info(index))

    def fit(self, state: CLState, mask: dict[str, bool], index: int, steps: int, record: list | None = None):
        """Trains the phases of a stage, the first with `mask`; returns the state and the losses of all steps.

        `record` takes (phase, state before it, its mask, state after its steps, losses) of each.
        """
        seen, info = [], self.info(index)
        for salt, phase in enumerate(self.method.phases(info)):
            if not self.method.skips(state, info, phase):
                mask = self.method.phase_mask(state, info, phase) if salt else mask
                before = jax.tree.map(np.array, state)
                state, losses = self.fit_phase(state, mask, index, steps, phase, salt)
                seen += losses
                if record is not None:
                    record.append((phase, before, mask, jax.tree.map(np.array, state), losses))
            state = self.method.after_phase(state, info, phase, self.probe)
        return state, seen

    def fit_phase(self, state: CLState, mask: dict[str, bool], index: int, steps: int, phase: Phase, salt: int = 0):
        """Trains one phase; returns the state and its losses."""
        seen, replay = [], self.method.replay(self.info(index))
        trainable, frozen = trees.partition(state.params, mask)
        now = loop.start_phase(trainable, self.train, self.mesh, state.carry.get("running"))
        batches = self.features(state, phase, index, salt) if phase.features else self.batches(index, replay, salt)
        frozen, memory = meshes.put_replicated((frozen, state.memory), self.mesh)
        function = self.step(bool(replay and replay.mix == "separate_batch"), phase.program())
        for step, batch in zip(range(steps), batches):
            rows, control = meshes.put_batch(batch, self.mesh), self.control(index, step, steps, phase, now.running)
            now.trainable, now.optimizer, metrics = function(now.trainable, now.optimizer, frozen, memory, self.llava, rows, control)
            now.running = metrics.pop("running", now.running)
            seen.append(float(metrics["loss"]))
        carry = state.carry | ({"running": now.running} if now.running else {})
        return dataclasses.replace(state, params=trees.merge(frozen, now.trainable), carry=carry), seen

    def features(self, state: CLState, phase: Phase, index: int, salt: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches of a phase on features."""
        values, rng = self.probe(state, np.arange(self.count))[phase.features], np.random.default_rng([self.seed, index, salt])
        while True:
            yield {"features": np.asarray(values)[rng.permutation(self.count)[: self.size]]}

    def stage(self, state: CLState, index: int, steps: int) -> tuple[CLState, list[float]]:
        """A whole stage: start, train, end."""
        state, mask = self.begin(state, index)
        state, seen = self.fit(state, mask, index, steps)
        return self.method.end_task(state, self.info(index), self.probe), seen

    @functools.cached_property
    def forward(self):
        """(params, memory, llava, batch, stage) -> scores, gates and loss of a batch at test."""
        method = self.method

        @jax.jit
        def forward(params, memory, llava, batch, stage):
            sight = steps_of.look(llava, method, params, memory, batch, stage)
            gates = sight.gates
            hidden = llava.decode(sight.inputs.embeddings, adapter=method.adapter(params, gates, None)).hidden
            logits = llava.logits(gather_positions(hidden, batch["label_index"]))
            nll = losses.token_nll(logits, batch["labels"], batch["label_mask"])
            return {"logits": logits, "gates": gates["blocks"], "loss": nll.sum() / batch["label_mask"].sum()}

        return forward

    def answer(self, state: CLState, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scores, gates and loss of a batch at test."""
        params, memory = meshes.put_replicated((state.params, state.memory), self.mesh)
        return jax.tree.map(np.asarray, self.forward(params, memory, self.llava, meshes.put_batch(batch, self.mesh), state.stage))

    def loss(self, state: CLState, task: int) -> float:
        """Loss at test on rows of a task that were not trained on."""
        rows = tiny_llava.rows_of(task, self.size, self.seed + 100, **({} if self.image else {"image": False}))
        return float(self.answer(state, tiny_llava.batch(rows))["loss"])


@functools.cache
def bare(dtype: str = "float32") -> Harness:
    """The backbone alone."""
    return Harness(METHODS["zero_shot"](), dtype=dtype)
