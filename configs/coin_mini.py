"""The embedded benchmark: eight small tasks and a small model, no download, minutes on two CPU cores.

    --config configs/coin_mini.py                       ProgLoRA (dynamic), eight tasks
    --config configs/coin_mini.py:method=lora,seed=1    another method, another seed
    --config configs/coin_mini.py:smoke                 three tasks, few steps, under 90 seconds
    --config configs/coin_mini.py:method=lora,isolated  each task alone, for FWT
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import common  # noqa: E402

# What the small model needs beside the papers' values: it has 200 steps of width 96, not thousands of width 4096. Without the matching loss
# the first block keeps the largest gate for every task, and BWT is plain LoRA's (benchmarks/results/coin_mini_gates.md, three seeds).
# EWC's lambda (5000) and O-LoRA's lambda1 (0.5, summed) stay: in a trial of three tasks of 60 steps (one seed) both kept more than LoRA.
SMALL = {
    "proglora_dynamic": {"proj_width": 64, "match_weight": 1.0, "gate_lr_multiplier": 3.0},
    # One of its three layers is the bottom, as near to 3 of 32 as it can be; the gates are those of the full variant.
    "proglora_light": {"proj_width": 64, "match_weight": 1.0, "gate_lr_multiplier": 3.0, "shared_layers": 1},
    # A quarter of the paper's ranks, as everywhere here (16 for 64), and the same share of the first phase's learning rate.
    "pclr": {"top_ranks": 16, "narrow_ranks": 8, "capacity": 64, "shared_ranks": 8, "integrate_learning_rate": 7.5e-4},
    # Features of width 96 need no descriptor of width 128, which could copy them.
    "sema": {"descriptor_width": 16, "descriptor_rows": 1600},
}


def get_config(argument=""):
    """The config; the argument names method, seed and variants, see above."""
    options = common.parse(argument, words=("isolated", "smoke"))
    method = options.get("method", "proglora_dynamic")
    config = common.base(method)
    config.method.update({"rank": 16, "alpha": 32.0, "dropout": 0.0} | SMALL.get(method, {}))
    config.model.update({"path": "embedded", "dtype": "float32", "param_dtype": "float32", "remat": "none"})
    config.data.update({
        "benchmark": "embedded", "root": "runs/coin_mini_data", "template": "vicuna_v1_bare", "max_length": 92,
        "buckets": ((80, 8), (92, 24)),
        "grouping": "none", "embedded_train_size": 1600, "embedded_test_size": 200, "image_cache_mb": 256,
    })
    config.train.update({
        "batch_size": 32, "epochs": 4, "learning_rate": 3e-3, "projector_learning_rate": 3e-4, "schedule": "cosine",
        "loss_norm": "global_token_mean",
    })
    config.evaluate.update({"batch_size": 100, "max_new_tokens": 12, "prompt_lengths": (88,)})
    config.similarity.pool = "mean"
    config.run.update({"seed": options.get("seed", 0), "log_every_steps": 50, "checkpoint_every_steps": 100})
    if "isolated" in options:
        config.run.protocol = "isolated"
    if "smoke" in options:
        config.data.update({"tasks": "TextVQA,ImageNet,OCRVQA", "root": "runs/coin_mini_smoke_data", "embedded_train_size": 160,
                            "embedded_test_size": 40})
        config.train.update({"epochs": 1, "max_steps": 12})
        config.evaluate.batch_size = 40
        config.run.update({"log_every_steps": 4, "checkpoint_every_steps": 6})
    config.lock()
    return config
