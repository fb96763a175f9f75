"""What the fields of a config may hold: choices, ranges and shapes, one sentence for each that does not fit."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from proglora_jax.core.stack import REMAT_POLICIES
from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import FOLDERS, set_names
from proglora_jax.data.plan import GROUPINGS, check_buckets
from proglora_jax.data.schema import BAD_RECORD_POLICIES
from proglora_jax.data.tasks import TASKS
from proglora_jax.data.templates import TEMPLATES
from proglora_jax.evaluation.published import ROWS
from proglora_jax.evaluation.scores_rules import GROUNDING_RULES, SCIENCEQA_RULES
from proglora_jax.methods.registry import METHODS
from proglora_jax.models.presets import PRESETS
from proglora_jax.training.projector import PROJECTOR_INITS

SCHEDULES = ("cosine", "constant", "constant_log_warmup")


def check_settings(settings: Any) -> None:
    """Checks the values of all fields that can be checked without looking at files, models or devices.

    Args:
        settings: `training.settings.Settings`.

    Raises:
        UserError: "config.<section>.<field>=<value>: must be ...".
    """
    model, data, train, evaluate, run = settings.model, settings.data, settings.train, settings.evaluate, settings.run
    checks = [
        _one_of("model.dtype", model.dtype, ("float32", "bfloat16", "float16")),
        _one_of("model.param_dtype", model.param_dtype, ("float32", "bfloat16", "float16")),
        _one_of("model.attention", model.attention, ("auto", "xla", "cudnn", "splash")),
        (model.attention != "cudnn" or model.dtype != "float32", "model.attention", repr(model.attention),
         "computes in 16 bits only; set config.model.dtype=bfloat16, or attention=xla"),
        _one_of("model.preset", model.preset, ("", *PRESETS)),
        _one_of("model.remat", model.remat, ("auto", *REMAT_POLICIES)),
        _at_least("model.unroll", model.unroll, 0),
        _one_of("data.benchmark", data.benchmark, ("embedded", "coin")),
        (bool(data.root), "data.root", repr(data.root), "name the folder that holds playground/ and cl_dataset/"),
        (data.instruction_set in set_names(), "data.instruction_set", repr(data.instruction_set),
         f"must be one of {', '.join(FOLDERS)}, or one of CoIN's former folders"),
        _one_of("data.template", data.template, tuple(TEMPLATES)),
        _one_of("data.grouping", data.grouping, GROUPINGS),
        _one_of("data.remainder", data.remainder, ("drop", "wrap")),
        _one_of("data.on_bad_record", data.on_bad_record, BAD_RECORD_POLICIES),
        _one_of("data.on_bad_image", data.on_bad_image, ("raise", "blank")),
        _one_of("data.on_unsupervised", data.on_unsupervised, ("raise", "drop")),
        _one_of("data.empty_answer", data.empty_answer, ("drop", "eos")),
        (all(_is_whole(pair, 2) for pair in data.buckets), "data.buckets", data.buckets, "must be pairs (positions, label slots)"),
        *(_at_least(f"data.{name}", getattr(data, name), least) for name, least in {
            "max_length": 1, "max_labels": 0, "train_examples": 0, "embedded_train_size": 1, "embedded_test_size": 1, "embedded_seed": 0,
            "threads": 0, "image_cache_mb": 0}.items()),
        (not data.image_cache_dir or os.path.abspath(data.image_cache_dir) != os.path.abspath(data.root), "data.image_cache_dir",
         repr(data.image_cache_dir), "must be a folder of its own, not config.data.root"),
        _one_of("train.schedule", train.schedule, SCHEDULES),
        _one_of("train.projector_init_per_task", train.projector_init_per_task, PROJECTOR_INITS),
        (settings.method.train_mm_projector or train.projector_init_per_task != "random", "train.projector_init_per_task", "'random'",
         "needs config.method.train_mm_projector=True: a random projector that does not train sees nothing"),
        _one_of("train.loss_norm", train.loss_norm, ("global_token_mean", "micro_batch_mean")),
        *(_at_least(f"train.{name}", getattr(train, name), least) for name, least in {
            "batch_size": 1, "micro_batches": 1, "epochs": 1, "max_steps": 0, "loss_group_size": 1, "loss_groups": 0,
            "projector_learning_rate": 0, "weight_decay": 0, "grad_clip": 0, "epsilon": 0}.items()),
        (train.learning_rate > 0, "train.learning_rate", train.learning_rate, "must be positive"),
        *((0 <= value < 1, f"train.{name}", value, "must be in [0, 1)") for name, value in
          {"warmup_fraction": train.warmup_fraction, "beta1": train.beta1, "beta2": train.beta2}.items()),
        (_is_table(train.batch_sizes), "train.batch_sizes", train.batch_sizes, "must give a number of rows by task, {} for none"),
        (_is_whole(evaluate.prompt_lengths), "evaluate.prompt_lengths", evaluate.prompt_lengths,
         "must be a list of whole numbers"),
        _one_of("evaluate.image_mode", evaluate.image_mode, ("coin", "pad")),
        _one_of("evaluate.also_image_mode", evaluate.also_image_mode, ("", "coin", "pad")),
        _one_of("evaluate.share_prefix", evaluate.share_prefix, ("auto", "on", "off")),
        (evaluate.share_prefix != "on" or settings.method.fixed_at_test, "evaluate.share_prefix", "'on'",
         f"the adapter of {settings.method.name} depends on the prompt, so prompts cannot share their beginnings; set it to auto or off"),
        (_are_tasks(evaluate.subset_except), "evaluate.subset_except", evaluate.subset_except, f"must be tasks of {', '.join(TASKS)}"),
        *(_at_least(f"evaluate.{name}", getattr(evaluate, name), least) for name, least in {
            "batch_size": 1, "max_new_tokens": 0, "first_new_tokens": 0, "subset_size": 0, "subset_seed": 0}.items()),
        _one_of("evaluate.scienceqa_rule", evaluate.scienceqa_rule, SCIENCEQA_RULES),
        _one_of("evaluate.grounding_rule", evaluate.grounding_rule, GROUNDING_RULES),
        _one_of("similarity.encoders", settings.similarity.encoders, ("backbone", "vit_bert")),
        *((not path or settings.similarity.encoders == "vit_bert", f"similarity.{name}", repr(path),
           "the backbone's own encoders need no folder; set config.similarity.encoders=vit_bert to use this one")
          for name, path in {"vit_path": settings.similarity.vit_path, "bert_path": settings.similarity.bert_path}.items()),
        _one_of("similarity.pool", settings.similarity.pool, ("cls", "mean")),
        _one_of("similarity.text_pool", settings.similarity.text_pool, ("cls", "mean")),
        (settings.similarity.text_pool == "mean" or settings.similarity.encoders == "vit_bert", "similarity.text_pool", "'cls'",
         "the backbone's word embeddings have no class token; set config.similarity.text_pool=mean, or encoders=vit_bert"),
        _at_least("similarity.max_samples", settings.similarity.max_samples, 1),
        _one_of("run.published_row", run.published_row, ("", *ROWS)),
        _one_of("run.protocol", run.protocol, ("sequential", "isolated")),
        *(_at_least(f"run.{name}", getattr(run, name), least) for name, least in {
            "seed": 0, "checkpoint_every_steps": 1, "log_every_steps": 1}.items()),
    ]
    for holds, field, value, sentence in checks:
        if not holds:
            raise UserError(f"config.{field}={value}: {sentence}")
    check_buckets(data.buckets)


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> tuple[bool, str, object, str]:
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return value in choices, field, repr(value), f"must be one of {', '.join(filter(None, choices))}{hint}"


def _at_least(field: str, value: float, least: int) -> tuple[bool, str, object, str]:
    return value >= least, field, value, f"must be >= {least}"


def _is_table(sizes: Any) -> bool:
    """Whether something gives a batch size >= 1 for each of some tasks; a single stage that trains on all of them counts as one."""
    if not isinstance(sizes, Mapping):
        return False
    joint = [name for name, method in METHODS.items() if method.joint and method.trains]
    return all(name in (*TASKS, *joint) and type(size) is int and size >= 1 for name, size in sizes.items())


def _are_tasks(names: Any) -> bool:
    return isinstance(names, tuple) and all(name in TASKS for name in names)


def _is_whole(values: Any, count: int | None = None) -> bool:
    """Whether something is a list of whole numbers, of the length `count` if given."""
    return isinstance(values, tuple) and count in (None, len(values)) and all(type(value) is int for value in values)
