"""Questions of one's own to a trained stage: answers, and the gates of its blocks (`tools predict`)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from proglora_jax.checkpoints.hf_import import load_source
from proglora_jax.checkpoints.sources import Source
from proglora_jax.continual.trained import Trained, open_trained
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.pipeline import eval_batches
from proglora_jax.data.schema import Question, strip_placeholder
from proglora_jax.data.tasks import TASKS
from proglora_jax.data.templates import get_template, instructions, with_instruction
from proglora_jax.data.tokens import Encoder, load_tokenizer
from proglora_jax.models.layers import Settings as ModelOptions
from proglora_jax.training.attention_choice import attention_for
from proglora_jax.training.step import make_generator

LONGEST_ANSWER = 128  # tokens, where neither the caller nor the run's config says; CoIN's scripts allow some tasks 1024
ROWS = 8  # questions at once
BAR = 24  # characters of a gate of 1


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question.

    Attributes:
        question: the human text, instruction included.
        image: path, or None.
        answer: text.
        cut_off: whether the answer reached the cap on its tokens.
        gates: name of a block -> its gate for this question; empty for methods with one block.
        tokens: ids of the answer, EOS left out.
    """

    question: str
    image: str | None
    answer: str
    cut_off: bool
    gates: dict[str, float]
    tokens: tuple[int, ...]


class Predictor:
    """A stage that answers questions.

    Attributes:
        trained: the stage.
        encoder: text to tokens, as in the run.
        images: what images the vision tower wants.
        llava: the backbone.
        mesh: the devices.
    """

    def __init__(self, trained: Trained, source: Source, *, options: ModelOptions | None = None, param_dtype: str = "", mesh: Any = None):
        """Loads the backbone.

        Args:
            trained: the stage.
            source: its backbone.
            options: compute dtype and attention; default: the run's.
            param_dtype: of the stored parameters; default: the run's.
            mesh: the devices; default: the run's mesh where there are so many, else the first device.
        """
        model = trained.model
        self.trained, self.mesh = trained, mesh or _mesh(trained)
        # A kernel that the run's config names may be of another machine than this one.
        stated = "xla" if model["attention"] == "xla" else "auto"
        attention, _ = attention_for(stated, model["dtype"], self.mesh.devices.flat[0].platform)
        options = options or ModelOptions(model["dtype"], attention)
        self.encoder, self.images = prompting(trained, source)
        dtype = jax.numpy.dtype(param_dtype or model["param_dtype"])
        self.llava = load_source(source, dtype, settings=options, mesh=self.mesh)
        self._state = meshes.put_replicated(trained.state, self.mesh)

    def __call__(self, questions: Sequence[Question], task: int, *, max_new_tokens: int = 0, image_mode: str = "pad") -> list[Prediction]:
        """Answers in the order of the questions.

        Args:
            questions: what is asked.
            task: id of the task, for methods that want to know it.
            max_new_tokens: cap on an answer; 0 takes the one in the run's config, or 128 where it leaves that to the task.
            image_mode: "pad" or "crop", see `data.images`.

        Raises:
            UserError: for an image that cannot be read.
        """
        tokenizer, ways = self.encoder.tokenizer, meshes.batch_ways(self.mesh)
        cap = max_new_tokens or self.trained.config["evaluate"]["max_new_tokens"] or LONGEST_ANSWER
        generate = make_generator(self.trained.method, self.mesh, cap, tokenizer.eos_id, tokenizer.pad_id, tokenizer.size)
        rows = -(-min(ROWS, len(questions)) // ways) * ways
        loader = ImageLoader(self.images, image_mode, advice="give another file")
        batches = eval_batches(questions, self.encoder, loader, batch_size=rows, task_id=task)
        if batches.truncated():
            longest = self.encoder.max_length
            logging.warning("%d question(s) are cut to %d positions (config.data.max_length of the run)", len(batches.truncated()), longest)
        found: dict[int, Prediction] = {}
        for batch in batches.batches(threads=0):
            out = generate(self._state.params, self._state.memory, self.llava, meshes.put_batch(batch, self.mesh), self._state.stage)
            out = {name: np.asarray(value) for name, value in out.items()}
            for row in np.flatnonzero(out["valid"]):
                index = int(out["example"][row])
                found[index] = self._prediction(questions[index], {name: value[row] for name, value in out.items()})
        return [found[index] for index in range(len(questions))]

    def _prediction(self, question: Question, out: dict[str, np.ndarray]) -> Prediction:
        ids = tuple(out["tokens"][: int(out["count"])].tolist())
        text = self.encoder.tokenizer.decode(ids).strip()
        return Prediction(question.text, question.image, text, bool(out["hit_cap"]), self._named(out["gates"]), ids)

    def _named(self, gates: np.ndarray) -> dict[str, float]:
        """Gates by the tasks whose blocks they weigh, or by number; slots that are still empty are left out."""
        if len(gates) == 1:
            return {}
        method = self.trained.method
        by_task = method.blocks_are_tasks and len(gates) == len(self.trained.meta["tasks"])
        unit = "block" if method.blocks_are_tasks else method.gate_unit  # an expert, a branch
        names = self.trained.tasks() if by_task else [f"{unit} {index}" for index in range(len(gates))]
        return {name: float(gate) for name, gate in zip(names, gates)}


def prompting(trained: Trained, source: Source) -> tuple[Encoder, ImageSpec]:
    """How the run turns text into tokens, and what images its vision tower wants.

    Raises:
        UserError: as `data.tokens.load_tokenizer` and `ImageSpec.from_folder`.
    """
    config, data = source.config, trained.config["data"]
    legacy = data.get("tokenizer_legacy", True)
    tokenizer = load_tokenizer(str(source.folder), config.text_config.vocab_size, legacy, add_image_token=source.original)
    encoder = Encoder(tokenizer, get_template(data["template"]), config.image_tokens, data["max_length"])
    return encoder, ImageSpec.from_folder(str(source.image_folder))


def _mesh(trained: Trained) -> Any:
    """The run's mesh where the devices are there, else the first device."""
    try:
        return meshes.make_mesh(trained.config.get("mesh", {}))
    except ValueError:
        return meshes.make_mesh({}, jax.devices()[:1])


# ---- what is asked


def read_questions_file(path: str) -> list[tuple[str, str | None]]:
    """(text, image) of every line {"question": ..., "image": ...} of a JSONL file; "text" is as good as "question".

    A relative image path is relative to the file.

    Raises:
        UserError: "<path>: no such file ...", "<path>: is not UTF-8 text ...", "<path>: <n> problem(s): line 3: ...", "<path>: holds
            no questions ..."
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'--questions {path}: no such file; give a file with one {{"question": ..., "image": ...}} a line')
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--questions {path}: is not UTF-8 text (byte {error.start}); convert it") from error
    asked, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text, image = _asked(json.loads(line))
            asked.append((text, None if image is None else str(file.parent / image)))
        except ValueError as error:
            problems.append(f"line {number}: {'is not JSON' if isinstance(error, json.JSONDecodeError) else error}")
    raise_collected(problems, f"--questions {path}", 'A line looks like {"question": "What is this?", "image": "photo.jpg"}.')
    if not asked:
        raise UserError(f"--questions {path}: holds no questions")
    return asked


def _asked(row: Any) -> tuple[str, str | None]:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    text, image = row.get("question", row.get("text")), row.get("image") or None
    if not isinstance(text, str) or not strip_placeholder(text).strip():
        raise ValueError("has no 'question'")
    if image is not None and not isinstance(image, str):
        raise ValueError("'image' must be one path")
    return text, image


def make_questions(asked: Sequence[tuple[str, str | None]], instruction: str = "", instruction_set: str = "Original") -> list[Question]:
    """Questions from texts and image paths.

    Args:
        asked: (text, image) of each.
        instruction: a task whose instruction is put to each text, as in the files that the run trained on; "" for none.
        instruction_set: of that instruction.

    Raises:
        UserError: "the question is empty; ...", "<image>: no such image", "--instruction <task>: no such task; ..."
    """
    names = {name.lower(): name for name in TASKS}
    if instruction and instruction.lower() not in names:
        raise UserError(f"--instruction {instruction}: no such task; choose one of {', '.join(TASKS)}")
    questions = []
    for number, (text, image) in enumerate(asked):
        text = strip_placeholder(text)
        if not text.strip():
            raise UserError("--question: is empty; ask something")
        if image is not None and not Path(image).is_file():
            raise UserError(f"--image {image}: no such image; leave --image out for a question about text alone")
        if instruction:
            task = names[instruction.lower()]
            text = with_instruction(text, instructions(instruction_set, task)[0], task)
        questions.append(Question(str(number), "your", image, text, ""))
    return questions


# ---- what is said


def describe(prediction: Prediction) -> str:
    """A question, its answer, and a bar for each gate."""
    image = f"   [{prediction.image}]" if prediction.image else ""
    cut = "   (cut off)" if prediction.cut_off else ""
    lines = [f"question  {' / '.join(prediction.question.splitlines())}{image}", f"answer    {prediction.answer}{cut}"]
    if prediction.gates:
        lines.append("gates")
        width = max(map(len, prediction.gates))
        lines += [f"  {name:<{width}}  {gate:6.3f}  {_bar(gate)}" for name, gate in prediction.gates.items()]
    return "\n".join(lines)


def _bar(gate: float) -> str:
    return "█" * round(BAR * min(max(gate, 0.0), 1.0))


def as_json(prediction: Prediction, trained: Trained) -> str:
    """One line of JSON."""
    gates = {name: round(gate, 6) for name, gate in prediction.gates.items()}
    fields = {"question": prediction.question, "image": prediction.image, "answer": prediction.answer, "cut_off": prediction.cut_off}
    return json.dumps(fields | {"gates": gates, "method": trained.method.name, "stage": trained.folder.name}, ensure_ascii=False)


def answer_command(arguments: Any) -> None:
    """What `tools predict` does with its parsed arguments.

    Raises:
        UserError: for what the user can mend.
    """
    if (arguments.question is None) == (arguments.questions is None):
        raise UserError("give --question TEXT (with --image FILE where it is about one), or --questions FILE")
    if arguments.questions and arguments.image:
        raise UserError("--image: belongs to --question; the lines of --questions name their own images")
    if arguments.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be above 0")
    asked = read_questions_file(arguments.questions) if arguments.questions else [(arguments.question, arguments.image)]
    trained = open_trained(arguments.workdir, arguments.stage)
    task = trained.asked_task(arguments.task)
    questions = make_questions(asked, arguments.instruction, trained.config["data"].get("instruction_set", "Original"))
    source, warning = trained.backbone(arguments.base, arguments.vision, arguments.projector)
    if warning:
        print(warning, file=sys.stderr)
    if not arguments.json:
        told = f", asked as {trained.tasks()[task]}" if trained.method.uses_task_id else ""
        print(f"{trained.method.name}, stage {trained.folder.name}{told}")
    options = {"max_new_tokens": arguments.max_new_tokens, "image_mode": arguments.image_mode}
    for prediction in Predictor(trained, source)(questions, task, **options):
        print(as_json(prediction, trained) if arguments.json else "\n" + describe(prediction))
