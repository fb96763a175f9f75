"""Pieces that the configs share: defaults by section, recipes, and methods with the papers' hyper-parameters."""

from ml_collections import ConfigDict

_SMALL_BLOCK = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "a_init": "normal001", "train_mm_projector": True}
_LARGE_BLOCK = {"rank": 128, "alpha": 256.0, "dropout": 0.05, "a_init": "kaiming", "train_mm_projector": True}
_POOL = {"fuse": "delta", "pool_chunk": 0}
_RECALL = {"recall_enabled": True, "recall_weight": 2.0, "recall_per_task": 200, "recall_count": "similarity"}

# Hyper-parameters by method, for the 7B model.
METHODS = {
    "zero_shot": _SMALL_BLOCK,
    "multi_task": _LARGE_BLOCK,
    "lora": _LARGE_BLOCK,
    "proglora_static": _SMALL_BLOCK | _POOL | _RECALL | {"weights": "similarity", "replay_block": "current", "replay_mix": "concat"},
    "proglora_dynamic": _SMALL_BLOCK | _POOL | _RECALL | {
        "routing_tokens": "instruction", "routing_layer": 0, "routing_scope": "global", "routing_decode": "prefill_cached",
        "split_max_quirk": False, "temperature": "sqrt_d", "proj_variant": "paper", "proj_width": 256,
        "key_init": "fresh_xavier", "key_scale": 1.0,
        "train_old_keys": False, "gate_bonus": 0.0, "gate_bonus_fraction": 0.5, "match_weight": 0.0, "gate_lr_multiplier": 1.0,
        "recall_kl": "target_pred", "recall_reduction": "mean", "recall_batch": 0, "recall_targets": "stored",
    },
}

# Every field of every section but the method, with the values for the 7B model on the real benchmark.
SECTIONS = {
    "model": {
        "path": "", "vision_path": "", "projector_path": "", "preset": "", "dtype": "bfloat16", "param_dtype": "bfloat16",
        "attention": "auto", "remat": "qkvo_mlp", "unroll": 1,
    },
    "data": {
        "benchmark": "coin", "root": "", "tasks": "coin", "instruction_set": "Original", "template": "vicuna_v1", "max_length": 2048,
        "max_labels": 0, "buckets": ((704, 128), (1024, 512), (1536, 1024), (2048, 2048)), "train_examples": 0,
        "embedded_train_size": 1600, "embedded_test_size": 200, "embedded_seed": 0, "grouping": "modality_length", "remainder": "drop",
        "on_bad_image": "raise", "on_unsupervised": "drop", "empty_answer": "drop", "threads": 2, "image_cache_mb": 0,
    },
    "train": {
        "batch_size": 64, "batch_sizes": {}, "micro_batches": 1, "epochs": 1, "max_steps": 0, "learning_rate": 2e-4,
        "projector_learning_rate": 2e-5, "schedule": "cosine", "warmup_fraction": 0.03, "weight_decay": 0.0, "beta1": 0.9,
        "beta2": 0.999, "epsilon": 1e-8,
        "grad_clip": 0.0, "loss_norm": "micro_batch_mean", "loss_group_size": 8, "loss_groups": 0,
    },
    "evaluate": {
        "batch_size": 32, "max_new_tokens": 0, "prompt_lengths": (704, 1024, 2048), "image_mode": "coin", "subset_size": 0,
        "subset_seed": 0, "imagenet_empty_ok": True, "grounding_truncate": True,
    },
    "similarity": {"encoders": "backbone", "pool": "cls", "max_samples": 10000, "clamp": True},
    "mesh": {"data": -1, "fsdp": 1, "model": 1},
    "run": {
        "seed": 0, "protocol": "sequential", "isolated_results": "", "published_row": "", "checkpoint_every_steps": 500,
        "log_every_steps": 20, "tensorboard": True, "compilation_cache": "",
    },
}


def parse(argument, words=(), choices=None):
    """"method=lora,seed=1,smoke" -> {"method": "lora", "seed": 1, "smoke": True}.

    `words` are the ones that the config knows, `choices` its other names with the values that each may have, () for any.
    """
    options, choices = {}, choices or {}
    for part in (argument or "").split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name == "seed" and value:
            if not value.isdecimal():
                raise ValueError(f"{part.strip()}: seed must be a whole number >= 0")
            options[name] = int(value)
        elif (name == "method" or name in choices) and value:
            if choices.get(name) and value not in choices[name]:
                raise ValueError(f"{part.strip()}: choose one of {', '.join(choices[name])}")
            options[name] = value
        elif name in words and not equals:
            options[name] = True
        elif part.strip():
            known = ("method=...", *(f"{choice}=..." for choice in choices), "seed=...", *words)
            raise ValueError(f"{part.strip()}: the config knows no such argument; it knows {', '.join(known)}")
    return options


def base(method):
    """A config with every section; `method` as in METHODS."""
    if method not in METHODS:
        raise ValueError(f"method={method}: no such method; known: {', '.join(METHODS)}")
    sections = {name: dict(fields) for name, fields in SECTIONS.items()}
    return ConfigDict({"method": {"name": method, **METHODS[method]}, **sections})


def apply_recipe(config, recipe):
    """"proglora" (cosine, projector at a tenth, no clipping) or "coin_effective" (log warm-up, one rate, clip 1)."""
    if recipe == "proglora":
        values = {"schedule": "cosine", "learning_rate": 2e-4, "projector_learning_rate": 2e-5, "grad_clip": 0.0}
    elif recipe == "coin_effective":
        values = {"schedule": "constant_log_warmup", "learning_rate": 2e-4, "projector_learning_rate": 2e-4, "grad_clip": 1.0}
    else:
        raise ValueError(f"recipe={recipe}: choose proglora or coin_effective")
    config.train.update(values)
    return config
