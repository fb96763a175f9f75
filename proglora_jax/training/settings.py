"""The sections of a config as frozen dataclasses, and the strict builder that turns a config into them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from proglora_jax.data.errors import UserError
from proglora_jax.data.plan import BUCKETS, PROMPT_LENGTHS
from proglora_jax.methods.base import Method
from proglora_jax.methods.registry import method_class
from proglora_jax.training.settings_check import check_settings

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The backbone.

    Attributes:
        path: a LLaVA folder of Hugging Face or of original LLaVA, or a language model's (Vicuna); "embedded" is the small model that
            ships with the package.
        vision_path: folder of the CLIP, for a `path` without a vision tower; "" takes the one that config.json names.
        projector_path: file of the projector (`pretrain_mm_mlp_adapter`, mm_projector.bin of a stage-1 checkpoint) or its folder; ""
            takes the one in `path`.
        preset: sizes that the folder must have, a name of models/presets.py; "" takes any. Plans without weights are made from it.
        dtype: compute dtype, "float32" or "bfloat16".
        param_dtype: dtype in which the frozen backbone is held.
        attention: "xla", "cudnn" (NVIDIA GPUs, 16 bits), "splash" (TPUs), or "auto", see training/attention_choice.py.
        remat: rematerialisation policy by name, see core/stack.py, or "auto", by the device's memory, see training/remat_choice.py.
        unroll: layers of the language model per turn of the loop over layers in training, 0 by platform, see training/loop_choice.py.
    """

    path: str = "embedded"
    vision_path: str = ""
    projector_path: str = ""
    preset: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    unroll: int = 0


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the tasks come from and how they are batched.

    Attributes:
        benchmark: "embedded" (drawn once into `root`) or "coin" (files that are there).
        root: folder with playground/ and cl_dataset/.
        tasks: a named order ("coin", "alphabet") or task names with commas between.
        instruction_set: Original, Diverse or 10Type; slim or slim_0.1 to slim_0.8 (random parts of the first); or a name that CoIN once
            had for one of these, see data/instruction_sets.py. A task without a train.json has its records in Multitask/train.json.
        template: conversation template.
        tokenizer_legacy: True starts every later turn of a conversation like a fresh text, which CoIN trained with; False glues it to the
            end of the turn before, as today's tokenizers do.
        max_length: positions per record, image included; longer ones lose their end.
        buckets: ((positions, label slots), ...) in growing order; a batch is padded to the first that holds it; each one used is a compile.
        train_examples: examples per task, chosen by a stable hash; 0 takes all.
        embedded_train_size: examples per task that the embedded benchmark draws.
        embedded_test_size: questions per task that the embedded benchmark draws.
        embedded_seed: seed of the embedded benchmark's drawings.
        max_labels: most supervised tokens per record; 0 means no limit.
        grouping: "modality_length" (CoIN's), "bucket" or "none", see `data.plan.plan_batches`.
        remainder: "drop" or "wrap" the last partial batch of an epoch.
        on_bad_record: "stop", or "skip_and_count" to leave training records out that cannot be read, or whose box is not four numbers
            from 0 to 1; questions are never left out.
        on_bad_image: "raise", or "blank" to put the mean colour in its place; how many images that were, in training and in the questions
            of each task, stands in results.json and in the report.
        on_unsupervised: "raise", or "drop" records without a supervised token and count them.
        empty_answer: "drop" leaves a turn with an empty answer out, "eos" supervises its end alone.
        threads: reader threads of a process; 0 takes half of the cores that it may use, 2 to 8, see `data.pipeline.reader_threads`.
        image_cache_mb: memory for decoded images; 0 decodes each time.
        image_cache_dir: folder for the pixels of decoded images, which later runs read (339 KB an image of 336 x 336, see
            `data.image_cache`); "" for none. Results are the same bits.
    """

    benchmark: str = "coin"
    root: str = ""
    tasks: str = "coin"
    instruction_set: str = "Original"
    template: str = "vicuna_v1"
    tokenizer_legacy: bool = True
    max_length: int = 2048
    buckets: tuple = BUCKETS
    train_examples: int = 0
    embedded_train_size: int = 1600
    embedded_test_size: int = 200
    embedded_seed: int = 0
    max_labels: int = 0
    grouping: str = "modality_length"
    remainder: str = "drop"
    on_bad_record: str = "stop"
    on_bad_image: str = "raise"
    on_unsupervised: str = "drop"
    empty_answer: str = "drop"
    threads: int = 0
    image_cache_mb: int = 0
    image_cache_dir: str = ""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a phase trains.

    Attributes:
        batch_size: rows of an optimizer step, over all devices.
        batch_sizes: {task: rows} for tasks with another number.
        micro_batches: parts that a step's rows are split into one after the other; exact under unequal token counts. Parts times devices
            must divide the rows of every step. May change while a run goes on.
        epochs: passes over a task's examples.
        max_steps: steps of a phase, whatever the number of examples; 0 follows `epochs`.
        learning_rate: of blocks (and routing, times the method's multiplier).
        projector_learning_rate: of the mm_projector.
        projector_init_per_task: which mm_projector a later task starts with: "previous" (of the task before), "stage1" (the backbone's) or
            "random" (as CoIN's scripts did by mistake).
        schedule: "cosine" to 0, "constant", both after linear warm-up, or "constant_log_warmup" (CoIN's effective one).
        warmup_fraction: share of the steps that warm up.
        weight_decay: decoupled, on everything that trains.
        beta1: AdamW.
        beta2: AdamW.
        epsilon: AdamW.
        grad_clip: global norm; 0 switches clipping off.
        loss_norm: "global_token_mean", or "micro_batch_mean" (mean within groups of `loss_group_size` rows, then over groups).
            data.grouping=modality_length makes these groups about equally long, as LLaVA's sampler does its micro-batches.
        loss_group_size: rows per group of "micro_batch_mean".
        loss_groups: groups per batch, for tasks with batches of different sizes; above 0 it stands in for `loss_group_size`.
    """

    batch_size: int = 64
    batch_sizes: Any = dataclasses.field(default_factory=dict)
    micro_batches: int = 1
    epochs: int = 1
    max_steps: int = 0
    learning_rate: float = 2e-4
    projector_learning_rate: float = 2e-5
    projector_init_per_task: str = "previous"
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    grad_clip: float = 0.0
    loss_norm: str = "micro_batch_mean"
    loss_group_size: int = 8
    loss_groups: int = 0


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """How answers are generated and scored.

    Attributes:
        batch_size: questions at once.
        max_new_tokens: cap on an answer; 0 takes each task's own from the table.
        first_new_tokens: room for an answer when a question is first asked. Longer answers are asked for again, half a batch at once, with
            the whole cap: keys and values of CoIN's 1,024 tokens would take more memory than the prompts', for answers of a few. Where
            more than two in five are longer, it takes more time than it saves. 0 asks with the cap at once. The answers are the same, up
            to the rounding of the compute dtype.
        prompt_lengths: prompt positions that batches are padded to, image included, in growing order; each one used is a compile.
        image_mode: "coin" (centre crop where CoIN's scripts crop) or "pad" (as in training).
        also_image_mode: the other one, to ask every task whose images it prepares otherwise once more and to report both; "" for none,
            as is the same one. A finished run to which it is added is only asked.
        share_prefix: whether questions about one image share the pass over what their prompts begin with, system sentence and image:
            "auto" where the method's adapter does not depend on the prompt (then the function is the same) and where a task's questions
            share images so often that at least a fifth of the positions are saved, "on" wherever any two do, "off" nowhere.
        subset_size: questions per task, chosen by a stable hash; 0 takes all.
        subset_except: tasks of which all questions are asked all the same.
        subset_seed: seed of that choice.
        imagenet_empty_ok: an empty ImageNet answer counts as right in the mode "coin", as in CoIN's script.
        grounding_truncate: the mode "coin" loses the last digit of a box, as CoIN's script does.
        scienceqa_rule: how the mode "coin" reads an option from a longer answer: "coin" (the first character that stands alone), "llava"
            (the X of "The answer is X."), or "proglora" (so too, and divides by the number of answers: the same in a finished run).
        grounding_rule: how the mode "coin" reads a box: "coin", or "minigpt" (first four decimals against origin_answer_bbox). Scoring
            alone: a finished run with other values of these four is not asked again.
    """

    batch_size: int = 32
    max_new_tokens: int = 0
    first_new_tokens: int = 128
    prompt_lengths: tuple = PROMPT_LENGTHS
    image_mode: str = "coin"
    also_image_mode: str = ""
    share_prefix: str = "auto"
    subset_size: int = 0
    subset_except: tuple = ()
    subset_seed: int = 0
    imagenet_empty_ok: bool = True
    grounding_truncate: bool = True
    scienceqa_rule: str = "coin"
    grounding_rule: str = "coin"

    def subset_of(self, task: str) -> int:
        """Questions of a task that are asked; 0 for all."""
        return 0 if task in self.subset_except else self.subset_size

    @property
    def other_mode(self) -> str:
        """The image mode in which tasks are asked a second time, "" for none."""
        return "" if self.also_image_mode == self.image_mode else self.also_image_mode


@dataclasses.dataclass(frozen=True)
class SimilaritySettings:
    """How alike two tasks are.

    Attributes:
        encoders: "backbone" (its own vision tower and word embeddings, no download) or "vit_bert" (the paper's: a ViT and a BERT).
        vit_path: Hugging Face folder of the ViT (the paper's size is vit-base-patch16-224), for "vit_bert".
        bert_path: Hugging Face folder of the BERT (bert-base-uncased), for "vit_bert".
        pool: "cls" or "mean" over the patches of an image.
        text_pool: "mean" over the tokens of a text, or "cls" (of a BERT; word embeddings have none).
        max_samples: examples of a task that are averaged, chosen by seed.
        clamp: whether similarities are clamped to [0, 1].
    """

    encoders: str = "backbone"
    vit_path: str = ""
    bert_path: str = ""
    pool: str = "cls"
    text_pool: str = "mean"
    max_samples: int = 10000
    clamp: bool = True


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh's axes; -1 takes the devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The run as a whole.

    Attributes:
        seed: of everything random in training.
        protocol: "sequential" (task after task) or "isolated" (each task alone from the start, for FWT).
        isolated_results: workdir (or its results.json) of an isolated run, from which FWT is computed; "" reports none.
        published_row: name of the published result that the run repeats, see evaluation/published.py; the report compares with it.
            "" compares with the main row of the method.
        checkpoint_every_steps: steps between saves inside a phase.
        log_every_steps: steps between log lines.
        tensorboard: whether event files are written.
        compilation_cache: folder of the persistent compile cache; "" has none, "auto" has one in the user's cache folder on accelerators.
    """

    seed: int = 0
    protocol: str = "sequential"
    isolated_results: str = ""
    published_row: str = ""
    checkpoint_every_steps: int = 500
    log_every_steps: int = 20
    tensorboard: bool = True
    compilation_cache: str = "auto"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config, checked.

    Attributes:
        method: hyper-parameters and hooks of the method.
    """

    method: Method
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    evaluate: EvalSettings
    similarity: SimilaritySettings
    mesh: MeshSettings
    run: RunSettings


SECTIONS = {
    "model": ModelSettings, "data": DataSettings, "train": TrainSettings, "evaluate": EvalSettings,
    "similarity": SimilaritySettings, "mesh": MeshSettings, "run": RunSettings,
}


def from_config(config: Mapping[str, Any]) -> Settings:
    """Builds the settings from a nested mapping.

    Raises:
        UserError: "config.<section>.<field>: unknown field; ..." or the sentence for a value that does not fit.
    """
    unknown = sorted(set(config) - set(SECTIONS) - {"method"})
    if unknown:
        raise UserError(f"config.{unknown[0]}: unknown section; known: method, {', '.join(SECTIONS)}")
    for section, fields in config.items():
        if not isinstance(fields, Mapping):
            raise UserError(f"config.{section}={fields!r}: must be a section with fields, not {type(fields).__name__}")
    method = dict(config.get("method", {}))
    cls = method_class(str(method.pop("name", "")))
    sections = {name: build(section, config.get(name, {}), f"config.{name}") for name, section in SECTIONS.items()}
    settings = Settings(method=build(cls, method, "config.method"), **sections)
    check_settings(settings)
    return settings


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of a settings dataclass from a mapping, with unknown fields and wrong types refused.

    Raises:
        UserError: "<where>.<field>: unknown field; did you mean ...?" or "<where>.<field>=<value>: must be a ...".
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    out = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(fields))}"
            raise UserError(f"{where}.{name}: unknown field; {hint}")
        out[name] = _convert(value, hints[name], f"{where}.{name}")
    return cls(**out)


def _convert(value: Any, kind: Any, where: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if kind is str and isinstance(value, (int, float)) and where.endswith("temperature"):
        return str(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(tuple(item) if isinstance(item, (list, tuple)) else item for item in value)
    if kind is Any:
        return dict(value) if isinstance(value, Mapping) else tuple(value) if isinstance(value, (list, tuple)) else value
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", tuple: "a list"}
    raise UserError(f"{where}={value!r}: must be {names.get(kind, kind)}, not {type(value).__name__}")


def batch_size_of(train: TrainSettings, task: str) -> int:
    """Rows of an optimizer step for a task.

    Raises:
        UserError: "config.train.batch_size=<n>: must be ..."
    """
    size = train.batch_sizes.get(task, train.batch_size)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.train.batch_size={size!r}: must be a whole number >= 1")
    if size % train.micro_batches:
        raise UserError(f"config.train.batch_size={size}: must be a multiple of train.micro_batches={train.micro_batches}")
    return size
