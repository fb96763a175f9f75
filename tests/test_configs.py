"""The configs of the real benchmark: the papers' protocol in numbers, the published rows by name, and the sentences for what is missing."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_run

from proglora_jax.continual import session
from proglora_jax.continual.report_published import published_section
from proglora_jax.continual.run_record import RunRecord
from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import ORDERS
from proglora_jax.evaluation import published
from proglora_jax.methods.registry import METHODS
from proglora_jax.models.presets import PRESETS, LlavaConfig, llava15_7b, llava15_13b
from proglora_jax.training.losses import group_rows
from proglora_jax.training.settings import batch_size_of, from_config

COIN, PUBLISHED = tiny_run.config_module("coin"), tiny_run.config_module("published")
RUNS = {name for name in PUBLISHED.ROWS if not PUBLISHED.missing(name)}


def settings_of(module, argument: str):
    """The checked settings of a config, with a data root as a user would give one."""
    values = module.get_config(argument).to_dict()
    values["data"]["root"] = "somewhere"
    return from_config(values)


# ------------------------------------------------------------------------------------------------------- the papers' protocol


def test_the_default_is_the_papers_protocol():
    settings = settings_of(COIN, "")
    method, train = settings.method, settings.train
    assert (method.name, method.rank, method.alpha, method.dropout, method.recall_per_task, method.recall_weight) == (
        "proglora_dynamic", 16, 32.0, 0.05, 200, 2.0)
    assert (method.proj_width, method.temperature, method.gate_bonus, method.match_weight) == (256, "sqrt_d", 0.0, 0.0)
    assert (train.epochs, train.max_steps, train.learning_rate, train.projector_learning_rate) == (1, 0, 2e-4, 2e-5)
    assert (train.schedule, train.warmup_fraction, train.weight_decay, train.grad_clip) == ("cosine", 0.03, 0.0, 0.0)
    assert (train.beta1, train.beta2, train.epsilon, train.loss_norm) == (0.9, 0.999, 1e-8, "micro_batch_mean")
    assert settings.data.benchmark == "coin" and settings.data.max_length == 2048 and settings.data.template == "vicuna_v1"
    assert settings.model.preset == "llava15_7b" and settings.model.dtype == "bfloat16"
    assert settings.evaluate.subset_size == 0 and settings.evaluate.max_new_tokens == 0, "full test sets, each task's own cap"


def test_questions_are_asked_as_each_recipe_reports_them():
    """The cropped tasks are asked padded as well; CoIN's own rows are of 4,000 questions for all tasks but two, and not asked again."""
    evaluate = settings_of(COIN, "").evaluate
    assert (evaluate.image_mode, evaluate.also_image_mode, evaluate.subset_except) == ("coin", "pad", ())
    evaluate = settings_of(COIN, "method=lora,recipe=coin_effective").evaluate
    assert (evaluate.image_mode, evaluate.also_image_mode, evaluate.subset_size) == ("coin", "", 4000)
    assert {task: evaluate.subset_of(task) for task in ("ScienceQA", "Grounding", "GQA")} == {"ScienceQA": 0, "Grounding": 0, "GQA": 4000}
    evaluate = settings_of(COIN, "method=moelora,recipe=coin_effective,backbone=llava15_13b").evaluate
    assert (evaluate.subset_of("ScienceQA"), evaluate.subset_of("Grounding")) == (0, 4000)
    assert settings_of(PUBLISHED, "row=zero_shot").evaluate.subset_size == 4000
    assert settings_of(PUBLISHED, "row=proglora_dynamic").evaluate.subset_size == 0


@pytest.mark.parametrize("name", ["lora", "multi_task"])
def test_the_large_block(name):
    method = settings_of(COIN, f"method={name}").method
    assert (method.rank, method.alpha, method.a_init, method.scale) == (128, 256.0, "kaiming", 2.0)


@pytest.mark.parametrize(
    "argument, sizes, parts",
    [
        ("", (112, 112, 140, 56, 112, 56, 70, 84), 7),
        ("batches=coin_scripts", (896, 896, 1024, 384, 896, 384, 512, 640), 64),
        ("batches=mcitlib64,method=lora", (64,) * 8, 16),
    ],
)
def test_batches(argument, sizes, parts):
    train = settings_of(COIN, argument).train
    assert tuple(batch_size_of(train, task) for task in ORDERS["coin"]) == sizes
    assert train.micro_batches == train.loss_groups == parts
    assert all(group_rows(size, train.loss_groups, train.loss_group_size) * parts == size for size in sizes)
    with pytest.raises(UserError, match="config.train.loss_groups=9: must divide the batch of 112 rows"):
        group_rows(112, 9, 8)
    assert group_rows(112, 0, 8) == 8


def test_arguments_reach_their_fields():
    settings = settings_of(COIN, "method=lora,backbone=llava15_13b,order=alphabet,templates=10Type,recipe=coin_effective,seed=4")
    assert (settings.method.name, settings.model.preset, settings.run.seed) == ("lora", "llava15_13b", 4)
    assert (settings.data.tasks, settings.data.instruction_set) == ("alphabet", "10Type")
    assert (settings.train.schedule, settings.train.grad_clip, settings.train.projector_learning_rate) == ("constant_log_warmup", 1.0, 2e-4)
    assert settings.train.projector_init_per_task == "random", "CoIN's scripts did not load the saved one"
    assert set(COIN.BACKBONES) - {"any"} == set(PRESETS) and settings_of(COIN, "backbone=any").model.preset == ""


@pytest.mark.parametrize("argument", ["backbone=llava16", "order=random", "templates=original", "recipe=papers", "batches=32", "row=lora"])
def test_coin_refuses_what_it_does_not_know(argument):
    with pytest.raises(ValueError, match=f"{argument}: (choose one of|the config knows no such argument)"):
        COIN.get_config(argument)


def test_folders_that_are_not_set_have_a_sentence():
    values = COIN.get_config("").to_dict()
    with pytest.raises(UserError, match="config.data.root='': name the folder that holds playground/ and cl_dataset/"):
        from_config(values)
    with pytest.raises(UserError, match="config.model.path='': not set; give a Hugging Face"):
        session.model_folder(values["model"]["path"])


def test_a_folder_with_another_model_is_refused():
    session.check_preset("folder", llava15_7b(), "llava15_7b")
    session.check_preset("folder", llava15_13b(), "")
    padded = dataclasses.replace(llava15_7b().text_config, vocab_size=32000)
    session.check_preset("folder", LlavaConfig(text_config=padded), "llava15_7b")
    with pytest.raises(UserError, match="preset='llava15_7b': text_config.hidden_size must be 4096, but folder has 5120; set"):
        session.check_preset("folder", llava15_13b(), "llava15_7b")


# --------------------------------------------------------------------------------------------------------- the published rows


def test_every_published_row_has_a_config_and_no_config_has_no_row():
    assert set(PUBLISHED.ROWS) == set(published.ROWS)
    assert len(published.ROWS) == len(published.MAIN_ROWS) + len(published.OTHER_ROWS), "no two rows have one name"
    for name, (method, arguments, _) in PUBLISHED.ROWS.items():
        row = published.ROWS[name]
        assert row.method == method
        assert arguments.get("backbone", "llava15_7b") == {
            published.LLAVA_7B: "llava15_7b", published.LLAVA_13B: "llava15_13b", published.QWEN: "qwen_vl_chat"}[row.backbone]
        assert (arguments.get("order") == "alphabet") == (row.order == published.ALPHABETICAL_ORDER)


def test_rows_run_where_their_method_exists():
    assert {name for name, row in published.ROWS.items() if row.method in METHODS and row.backbone != published.QWEN} == RUNS
    assert {"proglora_static_weights_1", "proglora_dynamic_phi_1000", "proglora_dynamic_rank_128", "multi_task"} < RUNS


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_row_differs_from_the_main_config_only_in_what_the_paper_changed(name):
    method, arguments, changes = PUBLISHED.ROWS[name]
    settings, plain = settings_of(PUBLISHED, f"row={name},seed=2"), settings_of(COIN, f"method={method},seed=2")
    assert settings.run == dataclasses.replace(plain.run, published_row=name)
    assert settings.method == dataclasses.replace(plain.method, **changes)
    data = {"instruction_set": arguments.get("templates", "Original"), "tasks": arguments.get("order", "coin")}
    assert settings.data == dataclasses.replace(plain.data, **data)
    coin = arguments["recipe"] == "coin_effective"
    assert settings.train.grad_clip == (1.0 if coin else 0.0)
    assert settings.train.projector_init_per_task == ("random" if coin else "previous")
    assert settings.method.scale == 2.0, "alpha is twice the rank everywhere"
    assert changes or data != {"instruction_set": "Original", "tasks": "coin"} or not published.ROWS[name].variant


def test_variants_without_printed_figures_have_a_name_too():
    assert not set(PUBLISHED.VARIANTS) & set(PUBLISHED.ROWS)
    for name, (method, _, changes) in PUBLISHED.VARIANTS.items():
        settings, plain = settings_of(PUBLISHED, f"row={name},seed=2"), settings_of(COIN, f"method={method},seed=2")
        assert settings == dataclasses.replace(plain, method=dataclasses.replace(plain.method, **changes))
        assert settings.method != plain.method


@pytest.mark.parametrize(
    "row, lacks",
    [("ewc", "the method ewc"), ("moelora_13b", "the method moelora"), ("proglora_dynamic_qwen", "the backbone qwen_vl_chat")],
)
def test_rows_that_cannot_run_say_what_is_missing(row, lacks, monkeypatch):
    if lacks.startswith("the method"):  # as long as there is none; the sentence stays
        table = {name: fields for name, fields in PUBLISHED.common.METHODS.items() if name != lacks.split()[-1]}
        monkeypatch.setattr(PUBLISHED.common, "METHODS", table)
    with pytest.raises(ValueError, match=f"row={row}: needs {lacks}, which the code does not have; rows that run: zero_shot"):
        PUBLISHED.get_config(f"row={row}")
    monkeypatch.setitem(PUBLISHED.ROWS, "planted", ("lora", {}, {"sharpness": 2}))
    assert PUBLISHED.missing("planted") == "the field config.method.sharpness of lora"


@pytest.mark.parametrize("argument", ["row=lorry", "row=proglora_dynamic_phi_50", "method=lorra", "row=lora,method=zero_shot"])
def test_unknown_rows_are_refused(argument):
    with pytest.raises(ValueError, match="choose one of|the papers have no such row"):
        PUBLISHED.get_config(argument)


# ------------------------------------------------------------------------------------------------------------------ the report


def run_of(name: str) -> RunRecord:
    """A finished run that scored what its row prints at the end."""
    row = published.ROWS[name]
    final = row.final or (50.0,) * 8
    rows = [[50.0] * stage + [final[stage]] for stage in range(7)] + [list(final)]
    tasks = ORDERS["alphabet" if row.order == published.ALPHABETICAL_ORDER else "coin"]
    return RunRecord(row.method, 0, tasks, {"coin": rows, "clean": rows}, settings={"published row": name}, benchmark="CoIN")


@pytest.mark.parametrize("name", ["proglora_dynamic_phi_500", "proglora_static_no_recall", "proglora_dynamic_alphabetical_order"])
def test_the_report_compares_with_the_row_that_the_config_names(name):
    row, section = published.ROWS[name], published_section(run_of(name))
    printed = {line[0].split(",")[0]: line[2] for line in section.tables[0].rows}
    assert printed["MAA"] == f"{row.maa:.2f}" and printed["ACC (= MFN)"] == f"{row.acc:.2f}"
    assert any(f'"{row.variant}"' in note for note in section.notes)


def test_a_named_row_of_other_tasks_is_not_compared():
    run = dataclasses.replace(run_of("proglora_dynamic_phi_500"), tasks=ORDERS["alphabet"])
    assert all("phi 500" not in note for note in published_section(run).notes)
    half = dataclasses.replace(run_of("proglora_dynamic_phi_500"), scoring={"coin": [[76.0], [59.0, 60.0]]})
    assert any("print no matrix" in note for note in published_section(half).notes), "the matrix is the main row's"


def test_an_unknown_row_is_refused():
    values = COIN.get_config("").to_dict()
    values["data"]["root"], values["run"]["published_row"] = "somewhere", "proglora_dynamic_phi_5000"
    with pytest.raises(UserError, match="config.run.published_row='proglora_dynamic_phi_5000': must be one of .*did you mean 'proglora"):
        from_config(values)
