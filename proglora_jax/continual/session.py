"""Everything that a run holds while it runs: settings, mesh, backbone on the mesh, tokenizer, tasks, logger, jitted programs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from proglora_jax.checkpoints.encoder_import import check_encoders
from proglora_jax.checkpoints.hf_import import load_source
from proglora_jax.checkpoints.sources import Source, find_source
from proglora_jax.continual.row_split import check_rows
from proglora_jax.continual.stages import plan_stages
from proglora_jax.core import mesh as meshes
from proglora_jax.core.types import Targets
from proglora_jax.data.errors import UserError
from proglora_jax.data.image_cache import ImageCache
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.instruction_sets import REDUCED, find_set
from proglora_jax.data.pipeline import reader_threads
from proglora_jax.data.schema import Question
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import ORDERS, TaskData, load_task, select_subset, task_order
from proglora_jax.data.templates import get_template
from proglora_jax.data.tokens import Encoder, Tokenizer, load_tokenizer
from proglora_jax.evaluation.evaluator import references, unasked_references
from proglora_jax.evaluation.scores import Reference, check_references
from proglora_jax.evaluation.scores_rules import ScoreOptions
from proglora_jax.methods.base import Method, Phase
from proglora_jax.models.presets import PRESETS, LlavaConfig
from proglora_jax.training import fisher, step
from proglora_jax.training.attention_choice import choose_attention, model_options
from proglora_jax.training.loop_choice import choose_unroll, compiler_options
from proglora_jax.training.log import RunLogger
from proglora_jax.training.loop import StopSignal
from proglora_jax.training.prefix import make_prefix_generator
from proglora_jax.training.remat_choice import choose_remat, device_limit, in_words
from proglora_jax.training.settings import Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """What the runner works with.

    Attributes:
        settings: the checked config.
        remat: what the backward pass computes again, by padded length where the config says "auto".
        workdir: the run's folder.
        mesh: the devices.
        llava: the frozen backbone, on the mesh.
        base: hash of the backbone's files.
        protocol: what training from this backbone reproduces, see `checkpoints.sources.Source`.
        encoder: text to tokens.
        images: what the vision tower wants to see.
        tasks: task names in order.
        data: name -> the task's files.
        logger: the record of the run.
        stop: whether the run was asked to stop.
        image_cache: the folder of prepared images, or None.
    """

    settings: Settings
    remat: step.Remat
    workdir: Path
    mesh: Mesh
    llava: Any
    base: str
    protocol: str
    encoder: Encoder
    images: ImageSpec
    tasks: tuple[str, ...]
    data: Mapping[str, TaskData]
    logger: RunLogger
    stop: StopSignal
    image_cache: ImageCache | None

    @property
    def method(self) -> Method:
        """The method with its hyper-parameters."""
        return self.settings.method

    @functools.cached_property
    def targets(self) -> Targets:
        """The linears that may be adapted."""
        return self.llava.targets()

    @functools.cached_property
    def train_loader(self) -> ImageLoader:
        """Images as in training: padded to a square."""
        return self._loader("pad")

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a session lives as long as the process)
    def eval_loader(self, mode: str) -> ImageLoader:
        """Images for questions, by mode; a bad one is never left out."""
        return self.train_loader if mode == "pad" else self._loader(mode)

    def _loader(self, mode: str) -> ImageLoader:
        data = self.settings.data
        return ImageLoader(self.images, mode, data.on_bad_image, data.image_cache_mb << 20, folder=self.image_cache)

    @property
    def _options(self) -> dict[str, Any] | None:
        """Of the compiler, for what has a backward pass."""
        return compiler_options(self.settings.model.unroll, self.llava.config.text_config.num_hidden_layers, self.mesh)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def train_step(self, separate_replay: bool, phase: Phase) -> Callable:
        """The training step of a kind of phase, as `Phase.program` names it."""
        return step.make_train_step(self.method, self.settings.train, self.remat, separate_replay, self.mesh, phase, self._options)

    @functools.cached_property
    def probe_step(self) -> Callable:
        """The probe of training samples."""
        return step.make_probe(self.method, self.mesh)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def squared_gradients(self, names: tuple[str, ...], kind: str) -> Callable:
        """The sum of squared gradients."""
        return fisher.make_squared_gradients(self.method, self.mesh, names, kind, self.remat, self._options)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def generator(self, max_new_tokens: int, by_image: bool = False) -> Callable:
        """The generator with a cap on the answer, for plain batches or for those grouped by image."""
        make, tokenizer = make_prefix_generator if by_image else step.make_generator, self.encoder.tokenizer
        return make(self.method, self.mesh, max_new_tokens, tokenizer.eos_id, tokenizer.pad_id, tokenizer.size)

    def questions(self, task: str) -> list[Question]:
        """The questions of a task that are asked."""
        evaluate = self.settings.evaluate
        return select_subset(self.data[task].questions, evaluate.subset_of(task), evaluate.subset_seed)

    @property
    def score_options(self) -> ScoreOptions:
        """What the scoring mode "coin" does."""
        return score_options(self.settings)

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        """Which part of a batch's rows this process loads, and of how many."""
        return meshes.row_share(self.mesh)

    @functools.cached_property
    def chief(self) -> bool:
        """Whether this process writes files and talks."""
        return jax.process_index() == 0


def score_options(settings: Settings) -> ScoreOptions:
    """The fields of config.evaluate that say how answers are scored."""
    evaluate = settings.evaluate
    return ScoreOptions(evaluate.imagenet_empty_ok, evaluate.grounding_truncate, evaluate.scienceqa_rule, evaluate.grounding_rule)


def model_folder(path: str) -> str:
    """The backbone's folder; "embedded" is the small model that ships with the package.

    Raises:
        UserError: "config.model.path=<path>: no such folder; ..."
    """
    if path == "embedded":
        return str(importlib.resources.files("proglora_jax") / "assets" / "coin_mini_base")
    if not path:
        raise UserError("config.model.path='': not set; give a Hugging Face LLaVA folder, or 'embedded' for the small model")
    if not os.path.isdir(path):
        raise UserError(f"config.model.path={path}: no such folder; give a Hugging Face LLaVA folder, or 'embedded' for the small model")
    return path


def open_session(settings: Settings, workdir: str | os.PathLike, *, resumed: bool, stop: StopSignal | None = None) -> Session:
    """Loads and checks everything that a run needs, cheapest first, so that mistakes show before the model is loaded.

    Raises:
        UserError: for what the user can mend: folders, tokenizer, files, sizes.
    """
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, threads=reader_threads(settings.data.threads)))
    data, model = settings.data, settings.model
    tasks = task_order(data.tasks if data.tasks in ORDERS else [name.strip() for name in data.tasks.split(",")])
    image_cache = ImageCache(data.image_cache_dir) if data.image_cache_dir else None
    try:
        mesh = meshes.make_mesh(dataclasses.asdict(settings.mesh))
        meshes.row_share(mesh)
    except ValueError as error:
        raise UserError(str(error)) from error
    platform = mesh.devices.flat[0].platform
    settings, why = choose_attention(choose_unroll(settings, platform, mesh.shape), platform)
    rows, ways = settings.evaluate.batch_size, meshes.batch_ways(mesh)
    if rows % ways:
        raise UserError(f"config.evaluate.batch_size={rows}: must be a multiple of the {ways} devices that share a batch")
    check_rows(settings, tasks, mesh)
    folder = model_folder(model.path)
    source = find_source(folder, model.vision_path or None, model.projector_path or None)
    config, images = source.config, ImageSpec.from_folder(str(source.image_folder))
    tokenizer = load_tokenizer(folder, config.text_config.vocab_size, data.tokenizer_legacy, add_image_token=source.original)
    _check_folder(folder, config, tokenizer, images)
    check_preset(folder, config, model.preset)
    if settings.method.uses_similarity and settings.similarity.encoders == "vit_bert":
        check_encoders(settings.similarity.vit_path, settings.similarity.bert_path)
    encoder = Encoder(tokenizer, get_template(data.template), config.image_tokens, data.max_length, data.max_labels, data.empty_answer)
    if data.benchmark == "embedded" and jax.process_index() == 0:
        write_benchmark(data.root, data.embedded_seed, data.embedded_train_size, data.embedded_test_size)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("benchmark written")
    files = {task: load_task(data.root, task, data.instruction_set, data.on_bad_record) for task in tasks}
    _read_records(files, settings)
    remat = _remat(settings, config, tasks, mesh)
    llava = _load(source, settings, mesh)
    logger = RunLogger(workdir, settings.run.log_every_steps, settings.run.tensorboard, resumed, chief=jax.process_index() == 0)
    logger.message(f"backbone {source.describe()}; attention {settings.model.attention}: {why}; remat {in_words(remat)}; "
                   f"{data.threads} reader threads a process")
    workdir, stop = Path(workdir), stop or StopSignal()
    return Session(
        settings, remat, workdir, mesh, llava, source.fingerprint(), source.protocol, encoder, images, tasks, files, logger, stop,
        image_cache)


def _remat(settings: Settings, config: LlavaConfig, tasks: tuple[str, ...], mesh: Mesh) -> step.Remat:
    if settings.model.remat != "auto":
        return settings.model.remat
    stages = plan_stages(tasks, settings.method, settings.run.protocol)
    return choose_remat(settings, config, [stage.name for stage in stages], mesh, device_limit(), fresh=stages[0].fresh)


def _check_folder(folder: str, config: LlavaConfig, tokenizer: Tokenizer, images: ImageSpec) -> None:
    """Refuses a folder whose files do not belong together: such a model would run, and look past every image."""
    if tokenizer.image_token_id != config.image_token_id:
        raise UserError(
            f"{folder}: the tokenizer's <image> has the id {tokenizer.image_token_id}, but config.json says image_token_index="
            f"{config.image_token_id}; use the tokenizer that belongs to the model")
    if images.size != config.vision_config.image_size:
        raise UserError(
            f"{folder}: the image processor makes {images.size} pixels, but config.json says image_size={config.vision_config.image_size}; "
            "use the processor that belongs to the model")


def check_preset(folder: str, config: LlavaConfig, preset: str) -> None:
    """Refuses a folder with another model than the config was written for; the vocabulary may differ, since conversions pad it.

    Raises:
        UserError: "config.model.preset='llava15_7b': hidden_size must be 4096, but <folder> has 5120; ..."
    """
    if not preset:
        return
    wanted = PRESETS[preset]()
    for part in ("text_config", "vision_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            here, there = getattr(getattr(wanted, part), name), getattr(getattr(config, part), name)
            if here != there:
                raise UserError(f"config.model.preset='{preset}': {part}.{name} must be {here}, but {folder} has {there}; "
                                "set config.model.preset to the folder's model, or to '' for any")


def _read_records(files: Mapping[str, TaskData], settings: Settings) -> None:
    """Reads the records of all tasks: damage in the last task's files should show before the first task is trained."""
    for task in files.values():
        if settings.method.trains:
            _ = task.train
        asked = select_subset(task.questions, settings.evaluate.subset_of(task.task.name), settings.evaluate.subset_seed)
        known = references(task.task.scorer, asked, task.auxiliary)
        others, count = unasked(task, settings, asked), len(asked)
        check_references(task.task.scorer, [*known, *others], score_options(settings))
        if others:
            logging.warning("%s: its file asks %d of the %d questions of the test split; the others count as wrong, as in CoIN's script. "
                            "config.evaluate.subset_size=%d leaves them out.", task.task.name, count, count + len(others), count)


def unasked(data: TaskData, settings: Settings, questions: Sequence[Question]) -> list[Reference]:
    """Questions of a task's test split that its file does not ask and that count as wrong; none where a part is asked on purpose.

    Raises:
        UserError: as `evaluator.unasked_references`.
    """
    name, evaluate = data.task.name, settings.evaluate
    sets = (settings.data.instruction_set, data.made_from.get("from", "Original"))
    on_purpose = evaluate.subset_of(name) or settings.data.benchmark == "embedded" or any(find_set(one) in REDUCED for one in sets)
    if on_purpose or evaluate.scienceqa_rule == "proglora":
        return []
    return unasked_references(data.task.scorer, questions, data.auxiliary)


def _load(source: Source, settings: Settings, mesh: Mesh) -> Any:
    model = settings.model
    return load_source(source, jax.numpy.dtype(model.param_dtype), settings=model_options(model), mesh=mesh)
