"""Pieces that the configs share: defaults by section, recipes, and methods with the papers' hyper-parameters."""

from ml_collections import ConfigDict

_SMALL_BLOCK = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "a_init": "normal001", "train_mm_projector": True}
_LARGE_BLOCK = {"rank": 128, "alpha": 256.0, "dropout": 0.05, "a_init": "kaiming", "train_mm_projector": True}
_POOL = {"fuse": "delta", "pool_chunk": 0}
_RECALL = {"recall_enabled": True, "recall_weight": 2.0, "recall_per_task": 200, "recall_count": "similarity"}

_DYNAMIC = _SMALL_BLOCK | _POOL | _RECALL | {
    "routing_tokens": "instruction", "routing_layer": 0, "routing_scope": "global", "routing_decode": "prefill_cached",
    "split_max_quirk": False, "temperature": "sqrt_d", "proj_variant": "paper", "proj_width": 256,
    "key_init": "fresh_xavier", "key_scale": 1.0,
    "train_old_keys": False, "gate_bonus": 0.0, "gate_bonus_fraction": 0.5, "match_weight": 0.0, "gate_lr_multiplier": 1.0,
    "recall_kl": "target_pred", "recall_reduction": "mean", "recall_batch": 0, "recall_targets": "stored",
}

# Hyper-parameters by method, for the 7B model.
METHODS = {
    "zero_shot": _SMALL_BLOCK,
    "multi_task": _LARGE_BLOCK,
    "lora": _LARGE_BLOCK,
    "moelora": _LARGE_BLOCK | {"a_init": "normal001", "experts": 8, "router_input": "token"},
    "branchlora": _LARGE_BLOCK | {
        "a_init": "normal001", "experts": 8, "topk": 2, "renorm": "topk_softmax", "router_input": "token", "freeze_a_after": 0,
        "align_weight": 1.0, "text_tokens": "instruction", "mass_samples": 1024,
    },
    "sema": _SMALL_BLOCK | _POOL | {
        "most_turns": 8, "layer_share": 0.25, "threshold": 1.0, "expansion": "parallel", "detect_samples": 2048, "detect_batch": 128,
        "descriptor_width": 128, "descriptor_rows": 5000, "descriptor_epochs": 20, "descriptor_batch_size": 128,
        "descriptor_learning_rate": 1e-3,
    },
    "pclr": {
        "rank": 64, "alpha": 128.0, "dropout": 0.0, "a_init": "fan_in", "train_mm_projector": False, "top_ranks": 64, "narrow_ranks": 32,
        "narrow_from": 7, "capacity": 256, "shared_ranks": 32, "near_from": 5, "align_weight": 0.2, "image_weight": 0.0,
        "query_samples": 2048, "integrate": True, "progressive": True, "integrate_learning_rate": 5e-5, "integrate_batch_size": 0,
        "integrate_epochs": 1, "top_words": 100, "distill_temperature": 2.0,
    },
    "proglora_static": _SMALL_BLOCK | _POOL | _RECALL | {"weights": "similarity", "replay_block": "current", "replay_mix": "concat"},
    "proglora_dynamic": _DYNAMIC,
    "proglora_light": _DYNAMIC | {
        "recall_count": "fixed", "shared_layers": 3, "bottom": "shared_trained", "tie_bottom_layers": False,
    },
    "lwf": _LARGE_BLOCK | {"distill_weight": 1.0, "temperature": 2.0, "mode": "logits"},
    "ewc": _LARGE_BLOCK | {
        "penalty_weight": 5000.0, "accumulate": "separate", "gamma": 1.0, "fisher": "batch", "fisher_batches": 50,
        "fisher_batch_size": 12, "scope": "lora_and_projector",
    },
    "olora": _SMALL_BLOCK | _POOL | {
        "a_init": "kaiming", "orthogonal_weight": 0.5, "norm_weight": 0.0, "reduction": "sum", "train_forward": "sum",
    },
    "mocl": _SMALL_BLOCK | _POOL | {
        "a_init": "kaiming", "weights": "softmax8", "batch_mean": False, "use_scale": True, "match_weight": 1.0, "train_old_keys": False,
    },
}

# Padded lengths with label slots, and of prompts; as proglora_jax/data/plan.py has them, where it says why these.
_BUCKETS = ((320, 64), (672, 64), (704, 128), (768, 128), (832, 256), (960, 256), (1280, 512), (1536, 1024), (2048, 2048))
_PROMPT_LENGTHS = (256, 640, 704, 1024, 2048)

# Every field of every section but the method, with the values for the 7B model on the real benchmark.
SECTIONS = {
    "model": {
        "path": "", "vision_path": "", "projector_path": "", "preset": "", "dtype": "bfloat16", "param_dtype": "bfloat16",
        "attention": "auto", "remat": "auto", "unroll": 0,
    },
    "data": {
        "benchmark": "coin", "root": "", "tasks": "coin", "instruction_set": "Original", "template": "vicuna_v1",
        "tokenizer_legacy": True, "max_length": 2048, "max_labels": 0, "buckets": _BUCKETS, "train_examples": 0,
        "embedded_train_size": 1600, "embedded_test_size": 200, "embedded_seed": 0, "grouping": "modality_length", "remainder": "drop",
        "on_bad_record": "stop", "on_bad_image": "raise", "on_unsupervised": "drop", "empty_answer": "drop",
        "threads": 0, "image_cache_mb": 0, "image_cache_dir": "",
    },
    "train": {
        "batch_size": 64, "batch_sizes": {}, "micro_batches": 1, "epochs": 1, "max_steps": 0, "learning_rate": 2e-4,
        "projector_learning_rate": 2e-5, "projector_init_per_task": "previous",
        "schedule": "cosine", "warmup_fraction": 0.03, "weight_decay": 0.0, "beta1": 0.9,
        "beta2": 0.999, "epsilon": 1e-8,
        "grad_clip": 0.0, "loss_norm": "micro_batch_mean", "loss_group_size": 8, "loss_groups": 0,
    },
    "evaluate": {
        "batch_size": 32, "max_new_tokens": 0, "first_new_tokens": 128, "prompt_lengths": _PROMPT_LENGTHS, "image_mode": "coin",
        "also_image_mode": "", "share_prefix": "auto", "subset_size": 0, "subset_except": (), "subset_seed": 0,
        "imagenet_empty_ok": True, "grounding_truncate": True,
        "scienceqa_rule": "coin", "grounding_rule": "coin",
    },
    # "vit_bert" is the paper's choice and needs two folders more; "backbone" makes do with what is loaded anyway.
    "similarity": {
        "encoders": "backbone", "vit_path": "", "bert_path": "", "pool": "cls", "text_pool": "mean", "max_samples": 10000, "clamp": True,
    },
    "mesh": {"data": -1, "fsdp": 1, "model": 1},
    "run": {
        "seed": 0, "protocol": "sequential", "isolated_results": "", "published_row": "", "checkpoint_every_steps": 500,
        "log_every_steps": 20, "tensorboard": True, "compilation_cache": "auto",
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
    """"proglora" (cosine, projector at a tenth, no clipping) or "coin_effective".

    CoIN's scripts effectively had a logarithmic warm-up to one constant rate for everything, gradients clipped to 1, and from the second
    task on a projector that was random again, because the saved one was not loaded.
    """
    if recipe == "proglora":
        values = {"schedule": "cosine", "learning_rate": 2e-4, "projector_learning_rate": 2e-5, "grad_clip": 0.0,
                  "projector_init_per_task": "previous"}
    elif recipe == "coin_effective":
        values = {"schedule": "constant_log_warmup", "learning_rate": 2e-4, "projector_learning_rate": 2e-4, "grad_clip": 1.0,
                  "projector_init_per_task": "random"}
    else:
        raise ValueError(f"recipe={recipe}: choose proglora or coin_effective")
    config.train.update(values)
    return config
