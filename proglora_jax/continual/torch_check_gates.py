"""Asks an export with gates and our model the same questions, and compares ids, gates, logits and the tokens that both generate."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from proglora_jax.checkpoints.sources import Source
from proglora_jax.continual import torch_check
from proglora_jax.continual.predict import Predictor, make_questions
from proglora_jax.continual.trained import Trained
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageLoader
from proglora_jax.data.pipeline import eval_batches
from proglora_jax.data.schema import Question
from proglora_jax.models.layers import Settings
from proglora_jax.training.step import look

MODULE = "gated_llava.py"
GATE_TOLERANCE = 1e-5
NEW_TOKENS = 8
# (text, size of the picture drawn at random; None for a question about text): of different lengths, so that a batch has padding.
ASKED = (
    ("What is this?\nAnswer the question using a single word or phrase.", (48, 32)),
    ("Is it red?", None),
    ("Please provide the bounding box coordinate of the region this sentence describes: the black shape", (20, 40)),
    ("Which is up?\nA. left\nB. right\nAnswer with the option's letter from the given choices directly.", None),
)


def compare_dynamic(trained: Trained, source: Source, folder: pathlib.Path, tolerance: float = torch_check.TOLERANCE) -> str:
    """Loads the folder by its own torch module, in f32, and compares it with our model.

    Returns:
        A sentence with the largest differences.

    Raises:
        CannotCompare: as `torch_check.compare_adapter`.
        UserError: "<folder>: differs from our model in ..."
    """
    _, torch = torch_check.modules("torch")
    torch_check.check_readable(source)
    torch_check.check_memory(source)
    with tempfile.TemporaryDirectory() as pictures:
        questions = _questions(pathlib.Path(pictures))
        ours = _ours(trained, source, questions)
        theirs = _theirs(torch, load_module(folder / MODULE), folder, source, questions)
    return _verdict(folder, ours, theirs, tolerance)


def load_module(path: pathlib.Path) -> Any:
    """A Python file as a module, with those that it imports from its folder, without leaving names or byte code behind."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    beside = {file.stem for file in path.parent.glob("*.py")}
    before, writes = {name: sys.modules.pop(name) for name in beside & set(sys.modules)}, sys.dont_write_bytecode
    sys.path.insert(0, str(path.parent))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()  # the folder may be younger than the last look
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(path.parent))
        for name in beside:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return module


def _questions(folder: pathlib.Path) -> list[Question]:
    rng, asked = np.random.default_rng(0), []
    for number, (text, size) in enumerate(ASKED):
        path = folder / f"{number}.png" if size else None
        if path:
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        asked.append((text, str(path) if path else None))
    return make_questions(asked)


def _ours(trained: Trained, source: Source, questions: list[Question]) -> dict[str, list[np.ndarray]]:
    """By question: prompt ids, gates, logits at every position of the prompt, ids of the answer."""
    with torch_check.on_the_host() as device:
        mesh = meshes.make_mesh({}, [device])
        predictor = Predictor(trained, source, options=Settings("float32"), param_dtype="float32", mesh=mesh)
        answers = predictor(questions, 0, max_new_tokens=NEW_TOKENS)
        loader = ImageLoader(predictor.images, "pad")
        batch = eval_batches(questions, predictor.encoder, loader, batch_size=len(questions)).batch(0)
        logits = np.asarray(jax.jit(_logits, static_argnums=0)(trained.method, trained.state, predictor.llava, dict(batch)))
    lengths = batch["length"]
    return {
        "ids": [batch["tokens"][row, :length] for row, length in enumerate(lengths)],
        "gates": [np.asarray(list(answer.gates.values()) or [1.0], np.float32) for answer in answers],
        "logits": [logits[row, :length] for row, length in enumerate(lengths)],
        "answers": [np.asarray(answer.tokens, np.int64) for answer in answers],
    }


def _logits(method: Any, state: Any, llava: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """f32[B, T, V] of prompts."""
    sight = look(llava, method, state.params, state.memory, batch, jnp.int32(state.stage))
    return llava.logits(llava.decode(sight.inputs.embeddings, adapter=method.adapter(state.params, sight.gates, None)).hidden)


def _theirs(torch: Any, module: Any, folder: pathlib.Path, source: Source, questions: list[Question]) -> dict[str, Any]:
    """The same, and the scores f32[B, V] of every generated token."""
    model = module.GatedLlava.load(str(folder), str(source.folder), torch.float32)
    batch = model.prompts([question.text for question in questions], [question.image for question in questions])
    with torch.no_grad():
        logits = model(**batch).logits.float().numpy()
    gates = model.gates.numpy()
    made = model.generate(**batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_scores=True)
    real, ids = batch["attention_mask"].numpy() == 1, batch["input_ids"].numpy()
    sequences, end = made.sequences[:, ids.shape[1] :].numpy(), model.fields["eos_token_id"]
    return {
        "ids": [row[here] for row, here in zip(ids, real)], "gates": list(gates), "logits": [row[here] for row, here in zip(logits, real)],
        "answers": [row[: np.flatnonzero(row == end)[0]] if end in row else row for row in sequences],
        "scores": [step.float().numpy() for step in made.scores], "end": end,
    }  # fmt: skip


def _verdict(folder: pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> str:
    def refuse(what: str) -> UserError:
        return UserError(f"{folder}: differs from our model in {what}; it was not kept. Please report this with the versions of torch and "
                         "transformers")

    rows = range(len(ASKED))
    if any(not np.array_equal(ours["ids"][row], theirs["ids"][row]) for row in rows):
        raise refuse("the ids of a prompt")
    gates = max(float(np.max(np.abs(ours["gates"][row] - theirs["gates"][row]))) for row in rows)
    if not gates < GATE_TOLERANCE:
        raise refuse(f"its gates, by {gates:.3g} ({GATE_TOLERANCE:g} is allowed)")
    logits = max(float(np.max(np.abs(ours["logits"][row] - theirs["logits"][row]))) for row in rows)
    largest = max(float(np.max(np.abs(one))) for one in ours["logits"])
    if not logits < tolerance:
        raise refuse(f"its logits, by {logits:.3g} ({torch_check.too_far(tolerance, largest)})")
    for row in rows:
        scores = [step[row] for step in theirs["scores"]]
        if not _same_answer(ours["answers"][row], theirs["answers"][row], scores, theirs["end"], tolerance):
            raise refuse(f"what it generates ({theirs['answers'][row].tolist()}, ours {ours['answers'][row].tolist()})")
    count = sum(len(answer) for answer in ours["answers"])
    return (f"reloaded in torch: the same {count} tokens for {len(ASKED)} questions; gates differ by {gates:.3g} at most, logits differ by "
            f"{logits:.3g} at most, {tolerance:g} is allowed (the largest is {largest:.3g})")


def _same_answer(ours: np.ndarray, theirs: np.ndarray, scores: list[np.ndarray], end: int, limit: float) -> bool:
    """Whether two answers are the same, up to a token whose two candidates are as good as equal: behind it anything may follow."""
    first, second = [*ours.tolist(), end], [*theirs.tolist(), end]
    step = next((step for step, (a, b) in enumerate(zip(first, second)) if a != b), None)
    if step is None or step >= len(scores):
        return True
    return abs(float(scores[step][first[step]] - scores[step][second[step]])) < limit
