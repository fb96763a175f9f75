"""Methods with several phases against a slow and literal model in numpy: stages played by the hooks, and a model that says all it sees.

As in oracle.py the literal side takes from the product only numbers that trained; here a delta also sees what enters its layer, the
projector may have a delta, and every phase of every stage is a moment that can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import harness
import jax
import numpy as np
import stub_llava
import tiny_llava

from proglora_jax.core import mesh as meshes
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState
from proglora_jax.data import batch as codes
from proglora_jax.methods.base import Method, Phase, TaskInfo
from proglora_jax.methods.views import Probe
from proglora_jax.training import losses
from proglora_jax.training import step as steps_of

COUNT = 12
# (sample, layer, linear, x[T, d_in], residual stream before the layer [T, D]) -> [T, d_out]
Delta = Callable[[int, int, str, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Moment:
    """A phase of a stage, at some point of its training."""

    stage: int
    phase: Phase
    state: CLState


@dataclasses.dataclass(eq=False)
class Game:
    """A method's way through some stages on a backbone of random size."""

    method: Method
    run: harness.Harness
    moments: list[Moment]
    starts: list[CLState]
    ends: list[CLState]
    asked: list[np.ndarray]
    batch: dict[str, np.ndarray]

    @property
    def llava(self) -> stub_llava.Stub:
        """The stand-in backbone."""
        return self.run.llava

    def at_test(self) -> np.ndarray:
        """The product's scores at the end of the last stage."""
        state = self.ends[-1]
        params, memory = meshes.put_replicated((state.params, state.memory), self.run.mesh)
        return np.asarray(self.run.forward(params, memory, self.llava, self.batch, state.stage)["logits"])

    @functools.cache  # noqa: B019 (a game lives as long as its test)
    def step(self, program: Phase) -> Callable:
        """(params, memory, control) -> (loss, what is logged) of a kind of phase, compiled once."""
        scale = losses.row_scales(self.batch["label_mask"], self.batch["weight"], "global_token_mean", 1)
        return jax.jit(lambda params, memory, control: steps_of.batch_losses(
            self.llava, self.method, "none", params, memory, self.batch, scale, control, 1.0, program))

    def in_training(self, moment: Moment, key: int = 0) -> dict[str, float]:
        """The product's loss, and what it logs, of a training step of a phase."""
        control = {"stage": np.int32(moment.stage), "progress": np.float32(0.3), "key": jax.random.key(key),
                   "draw": jax.random.key(key), "running": moment.state.carry.get("running", {})}  # fmt: skip
        loss, logged = self.step(moment.phase.program())(moment.state.params, moment.state.memory, control)
        return {"loss": float(loss)} | {name: float(value) for name, value in logged.items()}


def play(method: Method, seed: int, stages: int, total: int = 3, **sizes: int) -> Game:
    """Plays some stages; what trains in a phase is moved at random, what rests in a leaf stays."""
    rng = np.random.default_rng([seed, 5])
    sizes = {"layers": int(rng.integers(2, 4)), "width": int(rng.integers(5, 10)), "inner": int(rng.integers(5, 12))} | sizes
    run = harness.Harness(method, backbone="stub", total=total, count=COUNT, seed=seed)
    run.llava = stub_llava.stub("float32", sizes["layers"], sizes["width"], sizes["inner"])
    state = method.init(run.llava.targets(), run.llava.projector_params(), total, seed)
    batch = tiny_llava.batch(tiny_llava.rows_of(stages - 1, 4, seed + 50)) | {"weight": np.float32([1, 2, 0.5, 1])}
    game = Game(method, run, [], [], [], [], batch)
    for index in range(stages):
        alike = np.full(index, 0.6 if method.uses_similarity else np.nan, np.float32)
        info = TaskInfo(index, f"task{index}", total, COUNT, alike, seed)
        asked: list[np.ndarray] = []
        state = method.start_task(state, info, recording(run.probe, asked))
        game.starts.append(state)
        for phase in method.phases(info):
            if not method.skips(state, info, phase):
                state = moved(method, state, method.phase_mask(state, info, phase), rng)
                game.moments.append(Moment(index, phase, state))
            state = method.after_phase(state, info, phase, run.probe)
        state = method.end_task(state, info, recording(run.probe, asked))
        game.ends.append(jax.tree.map(np.array, state))
        game.asked.append(asked[-1] if asked else np.zeros(0, int))
    return game


def moved(method: Method, state: CLState, mask: dict[str, bool], rng: np.random.Generator) -> CLState:
    """The state after random moves of what trains; running errors are drawn too."""
    factors = method.update_factors(state.memory)
    flat = {}
    for path, leaf in trees.flatten(state.params).items():
        own = next((np.asarray(f) for prefix, f in factors.items() if path == prefix or path.startswith(prefix + "/")), np.ones(()))
        own = own.reshape(own.shape + (1,) * (np.ndim(leaf) - own.ndim))
        flat[path] = np.asarray(leaf) + np.float32(0.25 * mask[path] * own * rng.standard_normal(np.shape(leaf)))
    carry = state.carry
    if "errors" in carry.get("running", {}) and mask.get("descriptor/encoder/bias"):
        errors = np.float32(rng.uniform(0.1, 1.0, carry["running"]["errors"].shape))
        carry = carry | {"running": {"errors": errors, "count": np.int32(rng.integers(2, 40))}}
    return dataclasses.replace(state, params=trees.unflatten(flat), carry=carry)


def recording(probe: Probe, asked: list[np.ndarray]) -> Probe:
    """A probe that notes the rows it is asked for."""

    def samples(state, numbers):
        asked.append(np.asarray(numbers))
        return probe(state, numbers)

    return Probe(samples, probe.squared_gradients, probe.earlier)


# ---------------------------------------------------------------------------------------------------------- the literal model


def features(game: Game, image: np.ndarray) -> np.ndarray:
    """[P, Dv] of one image; the summary of an image is their mean here."""
    half, out = tiny_llava.SIDE // 2, []
    for place in range(tiny_llava.PATCHES):
        top, left = divmod(place, 2)
        cut = np.float64(image)[top * half : (top + 1) * half, left * half : (left + 1) * half].reshape(-1)
        out.append(np.tanh(cut @ np.float64(game.llava.patches)))
    return np.stack(out)


def words(game: Game, batch: dict, row: int) -> np.ndarray:
    """[T, D] embeddings of a row's tokens."""
    return np.float64(game.llava.table)[batch["tokens"][row]]


def states(game: Game, projector: dict, batch: dict, delta: Delta, row: int, project: Callable | None = None):
    """(final hidden states [T, D], [what enters each layer]) of one row; `project` (linear, x) is a delta of the projector."""
    layers = {name: np.float64(leaf) for name, leaf in game.llava.layers.items()}
    extra = project or (lambda name, x: 0.0)
    h, entered = words(game, batch, row).copy(), []
    seen = features(game, batch["image"][row])
    first = seen @ np.float64(projector["linear_1"]["kernel"]) + projector["linear_1"]["bias"] + extra("linear_1", seen)
    gelu = 0.5 * first * (1 + np.tanh(np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)))
    last = gelu @ np.float64(projector["linear_2"]["kernel"]) + projector["linear_2"]["bias"] + extra("linear_2", gelu)
    for place, at in enumerate(np.flatnonzero(batch["tokens"][row] == tiny_llava.IMAGE_TOKEN)):
        h[at] = last[place]
    for layer in range(len(layers["down"])):
        entered.append(h)
        y = h @ layers["q_proj"][layer] + delta(row, layer, "q_proj", h, entered[-1])
        h = h + np.stack([y[: t + 1].mean(0) for t in range(len(y))])
        y = h @ layers["up_proj"][layer] + delta(row, layer, "up_proj", h, entered[-1])
        h = h + np.tanh(y) @ layers["down"][layer]
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5), entered


def scores(game: Game, projector: dict, delta: Delta, project: Callable | None = None) -> np.ndarray:
    """[B, K, V] scores at the labels of the game's batch; `project` (row) -> delta of the projector."""
    batch, out = game.batch, []
    for row in range(len(batch["tokens"])):
        hidden, _ = states(game, projector, batch, delta, row, project(row) if project else None)
        out.append(hidden[batch["label_index"][row]] @ np.float64(game.llava.table).T)
    return np.stack(out)


def prompt(batch: dict, row: int) -> np.ndarray:
    """Positions of a row's prompt."""
    return np.flatnonzero(np.isin(batch["segments"][row], (codes.TEMPLATE, codes.INSTRUCTION, codes.IMAGE)))


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors."""
    a, b = np.float64(a), np.float64(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
