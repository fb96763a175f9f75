"""The papers' results, one config each: the main table, the ablations, other orders and templates, on CoIN as configs/coin.py has it.

    --config configs/published.py:row=proglora_dynamic                          a row of the main table
    --config configs/published.py:row=proglora_static_weights_1,seed=1          an ablation
    --config configs/published.py:row=proglora_dynamic_alphabetical_order       another task order
    --config configs/published.py:method=lora                                   the main row of a method

The rows are those of proglora_jax/evaluation/published.py, which has the printed numbers; `tools report WORKDIR --against published`
sets a run beside its row. A row that the code cannot run yet says what is missing. The rows of lora, moelora, zero_shot and multi_task
were scored on random subsets of 4,000 questions that are not published; here others are chosen. The two LoRAs lost the projector between
tasks; that is repeated (recipe coin_effective: config.train.projector_init_per_task='random').

The authors measured similarity with a ViT and a BERT: --config.similarity.encoders=vit_bert with vit_path and bert_path. Without these
folders the rows of proglora use what the backbone has.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import coin  # noqa: E402
import common  # noqa: E402

# The rows that the ProgLoRA papers cite from CoIN, whose scripts ran with the effective recipe; all others were trained by the authors.
_CITED = {"recipe": "coin_effective"}
_OWN = {"recipe": "proglora"}
_13B = {"backbone": "llava15_13b"}
_QWEN = {"backbone": "qwen_vl_chat"}

# Row -> (method, arguments of coin.make, hyper-parameters that differ from the method's own).
ROWS = {
    "zero_shot": ("zero_shot", _CITED, {}),
    "multi_task": ("multi_task", _CITED, {}),
    "lora": ("lora", _CITED, {}),
    "lwf": ("lwf", _OWN, {}),
    "ewc": ("ewc", _OWN, {}),
    "moelora": ("moelora", _CITED, {}),
    "olora": ("olora", _OWN, {}),
    "sema": ("sema", _OWN, {}),
    "mocl": ("mocl", _OWN, {}),
    "proglora_static": ("proglora_static", _OWN, {}),
    "proglora_dynamic": ("proglora_dynamic", _OWN, {}),
    "proglora_light": ("proglora_light", _OWN, {}),
    "branchlora": ("branchlora", _OWN, {}),
    "pclr": ("pclr", _OWN, {}),
    "proglora_static_weights_1": ("proglora_static", _OWN, {"weights": "ones"}),
    "proglora_static_no_recall": ("proglora_static", _OWN, {"recall_enabled": False}),
    "proglora_static_random_recall": ("proglora_static", _OWN, {"recall_count": "random_phi"}),
    "proglora_dynamic_no_recall": ("proglora_dynamic", _OWN, {"recall_enabled": False}),
    "proglora_dynamic_phi_500": ("proglora_dynamic", _OWN, {"recall_per_task": 500}),
    "proglora_dynamic_phi_1000": ("proglora_dynamic", _OWN, {"recall_per_task": 1000}),
    "proglora_dynamic_rank_64": ("proglora_dynamic", _OWN, {"rank": 64, "alpha": 128.0}),
    "proglora_dynamic_rank_128": ("proglora_dynamic", _OWN, {"rank": 128, "alpha": 256.0}),
    "proglora_light_l_6": ("proglora_light", _OWN, {"shared_layers": 6}),
    "proglora_dynamic_diverse_templates": ("proglora_dynamic", _OWN | {"templates": "Diverse"}, {}),
    "proglora_dynamic_10type_templates": ("proglora_dynamic", _OWN | {"templates": "10Type"}, {}),
    "proglora_dynamic_alphabetical_order": ("proglora_dynamic", _OWN | {"order": "alphabet"}, {}),
    "branchlora_13b": ("branchlora", _OWN | _13B, {}),
    "moelora_13b": ("moelora", _CITED | _13B, {}),
    "branchlora_10type_templates": ("branchlora", _OWN | {"templates": "10Type"}, {}),
    "pclr_no_integration": ("pclr", _OWN, {"integrate": False}),
    "pclr_no_progressive": ("pclr", _OWN, {"progressive": False}),
    "zero_shot_qwen": ("zero_shot", _CITED | _QWEN, {}),
    "lora_qwen": ("lora", _CITED | _QWEN, {}),
    "moelora_qwen": ("moelora", _CITED | _QWEN, {}),
    "proglora_dynamic_qwen": ("proglora_dynamic", _OWN | _QWEN, {}),
}

# What the papers leave open and print no figures for, with the same arguments; a report has no row to set beside it.
VARIANTS = {
    "proglora_static_replay_own_task": ("proglora_static", _OWN, {"replay_block": "own_task"}),
    "proglora_static_replay_separate_batch": ("proglora_static", _OWN, {"replay_mix": "separate_batch"}),
}


def missing(row):
    """What the code lacks for a row: a method, a backbone or a hyper-parameter; "" where it can run."""
    method, arguments, changes = (ROWS | VARIANTS)[row]
    if method not in common.METHODS:
        return f"the method {method}"
    if arguments.get("backbone", coin.BACKBONES[0]) not in coin.BACKBONES:
        return f"the backbone {arguments['backbone']}"
    fields = [name for name in changes if name not in common.METHODS[method]]
    return f"the field config.method.{fields[0]} of {method}" if fields else ""


def get_config(argument=""):
    """The config; the argument names a row, or a method for its main row, and a seed."""
    options = common.parse(argument, choices={"row": (*ROWS, *VARIANTS)})
    row = options.get("row", options.get("method", "proglora_dynamic"))
    known = ROWS | VARIANTS
    if row not in known or options.get("method", known[row][0]) != known[row][0]:
        raise ValueError(f"method={options['method']}: the papers have no such row; rows: {', '.join(ROWS)}")
    if missing(row):
        running = ", ".join(name for name in ROWS if not missing(name))
        raise ValueError(f"row={row}: needs {missing(row)}, which the code does not have; rows that run: {running}")
    method, arguments, changes = known[row]
    config = coin.make(method=method, seed=options.get("seed", 0), **arguments)
    config.method.update(changes)
    if row in ROWS:
        config.run.published_row = row
    config.lock()
    return config
