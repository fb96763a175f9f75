"""CoIN as published: eight tasks, LLaVA-1.5, and the papers' hyper-parameters; the folders of model and data are yours.

    --config configs/coin.py --config.model.path=/models/llava --config.data.root=/data/CoIN
    --config configs/coin.py:method=lora,recipe=coin_effective      as the authors' scripts of the cited baselines effectively ran
    --config configs/coin.py:backbone=llava15_13b,seed=1            the larger model
    --config configs/coin.py:order=alphabet,templates=Diverse       another task order, another instruction set
    --config configs/coin.py:method=lora,isolated                   each task alone, for FWT

The published runs start from Vicuna with the projector of LLaVA's first stage, not from the instruction-tuned LLaVA-1.5: only from
there is the zero-shot row what it is. The three parts are named by three fields (vision_path and projector_path may stay unset where
config.json of the first folder names them, as original LLaVA's does), for backbone=llava15_7b and llava15_13b alike:

    --config configs/coin.py --config.data.root=/data/CoIN --config.model.path=/models/vicuna-7b-v1.5
    --config.model.vision_path=/models/clip-vit-large-patch14-336 --config.model.projector_path=/models/stage1/mm_projector.bin

A folder in the format of Hugging Face (llava-1.5-7b-hf, or what tools convert from-hf makes of the three) needs model.path alone.
backbone=any takes whatever LLaVA lies in the folder.

How alike tasks are is measured by the backbone's own vision tower and word embeddings, which need no further files. The papers took a ViT
and a BERT: --config.similarity.encoders=vit_bert --config.similarity.vit_path=/models/vit-base-patch16-224
--config.similarity.bert_path=/models/bert-base-uncased.

CoIN's scripts crop the images of four tasks when they ask, though all are padded in training; so does this config, and asks these tasks a
second time, padded, and reports both. --config.evaluate.also_image_mode= (nothing) asks once; a finished run to which it is added is only
asked. recipe=coin_effective asks once, and 4,000 questions of each task, as the cited rows were scored: all of ScienceQA and, for the 7B
model, of Grounding (the published subsets are not known; here a stable hash chooses).

Answers are scored as CoIN's scripts for LLaVA do (and in a clean way, always). --config.evaluate.scienceqa_rule=llava or proglora reads
ScienceQA's answers as LLaVA's and ProgLoRA's scripts do, --config.evaluate.grounding_rule=minigpt reads boxes as CoIN's script for
MiniGPT-v2 does.

batches=paper_era are the rows per step of the scripts behind the published baselines (7 GPUs without accumulation), batches=coin_scripts
those of CoIN's repository today (8 GPUs, 8 parts), batches=mcitlib64 64 rows for every task. A step's rows are computed in as many parts as
there were in the original, which suits one GPU; with n of them set --config.train.micro_batches to an n-th, and ask tools doctor. The rows
of every task must be a multiple of the devices: paper_era's can be split over 1, 2, 7 or 14, coin_scripts' over powers of 2 to 128,
mcitlib64's to 64.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import common  # noqa: E402

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA", "multi_task")
BACKBONES = ("llava15_7b", "llava15_13b", "any")
# Rows per part (in the original: per GPU, and per turn of gradient accumulation) of each task, and how many parts a step has.
BATCHES = {
    "paper_era": (7, (16, 16, 20, 8, 16, 8, 10, 12, 8)),
    "coin_scripts": (64, (14, 14, 16, 6, 14, 6, 8, 10, 8)),
    "mcitlib64": (16, (4,) * 9),
}
# The papers' runs of these methods had other batches.
OWN_BATCHES = {
    ("paper_era", "moelora"): (8, (12, 12, 16, 6, 12, 6, 6, 8, 8)), ("paper_era", "pclr"): (4, (24, 32, 40, 24, 32, 16, 16, 32, 8)),
}
CHOICES = {
    "backbone": BACKBONES, "order": ("coin", "alphabet"), "templates": ("Original", "Diverse", "10Type"),
    "recipe": ("proglora", "coin_effective"), "batches": tuple(BATCHES),
}


def get_config(argument=""):
    """The config; the argument names method, backbone, order, templates, recipe, batches and seed, see above."""
    options = common.parse(argument, words=("isolated",), choices=CHOICES)
    config = make(**{name: value for name, value in options.items() if name != "isolated"})
    if "isolated" in options:
        config.run.protocol = "isolated"
    config.lock()
    return config


def make(
    method="proglora_dynamic", backbone="llava15_7b", order="coin", templates="Original", recipe="proglora", batches="paper_era", seed=0
):
    """The config of one run, not locked yet; arguments as on the command line."""
    config = common.apply_recipe(common.base(method), recipe)
    config.model.preset = "" if backbone == "any" else backbone
    config.data.update({"benchmark": "coin", "tasks": order, "instruction_set": templates})
    parts, rows = OWN_BATCHES.get((batches, method), BATCHES[batches])
    sizes = {task: parts * count for task, count in zip(TASKS, rows)}
    config.train.update({"batch_size": sizes["ScienceQA"], "batch_sizes": sizes, "micro_batches": parts, "loss_groups": parts})
    if recipe == "coin_effective":
        whole = ("ScienceQA",) if backbone == "llava15_13b" else ("ScienceQA", "Grounding")
        config.evaluate.update({"subset_size": 4000, "subset_except": whole})
    else:
        config.evaluate.also_image_mode = "pad"
    config.run.seed = seed
    return config
