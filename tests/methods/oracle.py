"""A method against a slow and literal model in numpy: random shapes, stages played by the method's hooks, and what each stage left.

The oracle takes from the product no more than the numbers that trained: each stage's block as it was when the stage ended. How the
method keeps them (slots, stacks, memories), and everything that it computes with them, is done again here from the equations.
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
from proglora_jax.methods.base import Method, TaskInfo
from proglora_jax.methods.views import Probe
from proglora_jax.training import losses
from proglora_jax.training import step as steps_of

Delta = Callable[[int, int, str, np.ndarray], np.ndarray]  # (sample, layer, linear, x[T, d_in]) -> [T, d_out]


@dataclasses.dataclass(eq=False)
class Game:
    """A method's way through some stages on a backbone of random size.

    Attributes:
        method: what plays.
        llava: the stand-in backbone.
        total: tasks of the sequence.
        trained: params at the end of each stage, the last one's at some point of its training.
        asked: rows that the method asked for at the end of each stage but the last.
        state: the product's state in the last stage.
        batch: rows of the last task.
    """

    method: Method
    llava: stub_llava.Stub
    total: int
    trained: list[dict]
    asked: list[np.ndarray]
    state: CLState
    batch: dict[str, np.ndarray]

    @property
    def stage(self) -> int:
        """Index of the last stage."""
        return len(self.trained) - 1

    @functools.cached_property
    def answer(self) -> dict[str, np.ndarray]:
        """The product: scores at test, and loss and logged values of a training step."""
        run = harness.Harness(self.method, backbone="stub")
        run.llava = self.llava
        params, memory = meshes.put_replicated((self.state.params, self.state.memory), run.mesh)
        scale = losses.row_scales(self.batch["label_mask"], self.batch["weight"], "global_token_mean", 1)
        control = {"stage": np.int32(self.stage), "progress": np.float32(0.3), "key": jax.random.key(0)}

        @jax.jit
        def train(params, memory):
            return steps_of.batch_losses(self.llava, self.method, "none", params, memory, self.batch, scale, control, 1.0)

        loss, logged = train(params, memory)
        tested = run.forward(params, memory, self.llava, self.batch, self.state.stage)
        return {"loss": float(loss), **{name: float(value) for name, value in logged.items()}, "logits": np.asarray(tested["logits"]),
                "gates": np.asarray(tested["gates"])}  # fmt: skip


def play(cls: type[Method], seed: int, squares: Callable | None = None, stages: int | None = None, **fields) -> Game:
    """Plays a random number of stages; what trains in a stage is moved at random at its end.

    Args:
        cls: the method.
        seed: of shapes, moves and rows.
        squares: stands in for the squared gradients: (state, names) -> pytree.
        stages: how many stages, instead of a random number.
        fields: hyper-parameters besides a random rank.
    """
    rng = np.random.default_rng([seed, 112])
    layers, width, inner = int(rng.integers(2, 5)), int(rng.integers(5, 12)), int(rng.integers(5, 14))
    total = int(rng.integers(3, 5))
    stages = int(rng.integers(2, total + 1)) if stages is None else stages
    rank = int(rng.integers(1, 4))
    method = cls(**({"rank": rank, "alpha": float(rng.integers(1, 9)), "dropout": 0.0} | fields))
    llava = stub_llava.stub("float32", layers, width, inner)
    run = harness.Harness(method, backbone="stub", total=total, count=12, seed=seed)
    run.llava = llava
    state = method.init(llava.targets(), llava.projector_params(), total, seed)
    trained, asked = [], []
    for index in range(stages):
        alike = np.full(index, 0.6 if method.uses_similarity else np.nan, np.float32)
        info = TaskInfo(index, f"task{index}", total, run.count, alike, seed)
        state = method.start_task(state, info, run.probe)
        mask = method.trainable_mask(state, info)
        moved = {path: np.asarray(leaf) + np.float32(0.25 * mask[path] * rng.standard_normal(np.shape(leaf)))
                 for path, leaf in trees.flatten(state.params).items()}  # fmt: skip
        state = dataclasses.replace(state, params=trees.unflatten(moved))
        trained.append(jax.tree.map(np.array, state.params))
        if index < stages - 1:
            seen: list = [np.zeros(0, int)]
            state = method.end_task(state, info, _recording(run.probe, seen, squares))
            asked.append(seen[-1])
    weight = {"weight": np.float32([1, 2, 0.5, 1, 1])}
    batch = tiny_llava.batch(tiny_llava.rows_of(stages - 1, 5, seed + 50)) | weight
    return Game(method, llava, total, trained, asked, state, batch)


def _recording(probe: Probe, seen: list, squares: Callable | None) -> Probe:
    def samples(state, numbers):
        seen.append(np.asarray(numbers))
        return probe(state, numbers)

    def squared_gradients(state, numbers, size, kind, names):
        seen.append((np.asarray(numbers), size, kind))
        return squares(state, names)

    return Probe(samples, squared_gradients, probe.earlier)


# ---------------------------------------------------------------------------------------------------------- the literal model


def embeddings(game: Game, projector: dict, batch: dict) -> np.ndarray:
    """[B, T, D] input embeddings, patches of the image in their places."""
    table, patches = np.float64(game.llava.table), np.float64(game.llava.patches)
    x = table[batch["tokens"]]
    half = tiny_llava.SIDE // 2
    for row in range(len(x)):
        image, place = np.float64(batch["image"][row]), 0
        for at in np.flatnonzero(batch["tokens"][row] == tiny_llava.IMAGE_TOKEN):
            top, left = divmod(place, 2)
            cut = image[top * half : (top + 1) * half, left * half : (left + 1) * half].reshape(-1)
            first = np.tanh(cut @ patches) @ np.float64(projector["linear_1"]["kernel"]) + projector["linear_1"]["bias"]
            gelu = 0.5 * first * (1 + np.tanh(np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)))
            x[row, at] = gelu @ np.float64(projector["linear_2"]["kernel"]) + projector["linear_2"]["bias"]
            place += 1
    return x


def states(game: Game, projector: dict, batch: dict, delta: Delta) -> np.ndarray:
    """[B, T, D] final hidden states; each linear of each layer is W x plus the delta."""
    layers = {name: np.float64(leaf) for name, leaf in game.llava.layers.items()}
    out = []
    for row, h in enumerate(embeddings(game, projector, batch)):
        for layer in range(len(layers["down"])):
            y = h @ layers["q_proj"][layer] + delta(row, layer, "q_proj", h)
            h = h + np.stack([y[: t + 1].mean(0) for t in range(len(y))])
            y = h @ layers["up_proj"][layer] + delta(row, layer, "up_proj", h)
            h = h + np.tanh(y) @ layers["down"][layer]
        out.append(h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5))
    return np.stack(out)


def at_labels(game: Game, hidden: np.ndarray, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """([B, K, D] hidden states, [B, K, V] scores) that predict the labels."""
    picked = np.stack([hidden[row][batch["label_index"][row]] for row in range(len(hidden))])
    return picked, picked @ np.float64(game.llava.table).T


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def token_mean(batch: dict, loss: np.ndarray) -> float:
    """Sum over supervised tokens with row weights, over their number."""
    total = 0.0
    for row in range(len(loss)):
        for slot in range(loss.shape[1]):
            total += batch["weight"][row] * loss[row, slot] * batch["label_mask"][row, slot]
    return total / batch["label_mask"].sum()


def cross_entropy(batch: dict, logits: np.ndarray) -> float:
    """Token mean of -log p(label)."""
    log_p = log_softmax(logits)
    nll = np.zeros(batch["labels"].shape)
    for row in range(nll.shape[0]):
        for slot in range(nll.shape[1]):
            nll[row, slot] = -log_p[row, slot, batch["labels"][row, slot]]
    return token_mean(batch, nll)


def instruction(batch: dict, row: int) -> np.ndarray:
    """Positions of a row's instruction."""
    return np.flatnonzero(batch["segments"][row] == codes.INSTRUCTION)


def pair(block: dict, layer: int, name: str, x: np.ndarray) -> np.ndarray:
    """B A x of one block's factors."""
    return (x @ np.float64(block[name]["a"][layer])) @ np.float64(block[name]["b"][layer])


def close(found, expected, what: str = "") -> None:
    """To 1e-5, of the value or of 1."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=what)
