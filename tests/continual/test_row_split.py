"""Rows that devices, micro-batches or groups do not divide are refused before a run begins, with sizes that would do."""

from __future__ import annotations

import re

import pytest
import tiny_run

from proglora_jax.continual.row_split import check_rows, step_rows
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import TASKS, task_order
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import from_config

COIN = str(tiny_run.CONFIGS / "coin.py")


def settings_of(argument: str, *overrides: str):
    values = load_config(f"{COIN}:{argument}", [f"--config.{override}" for override in overrides])
    values["data"]["root"] = "somewhere"
    return from_config(values)


def said(devices: int, argument: str = "", *overrides: str) -> str:
    """What is said of configs/coin.py on a number of devices."""
    try:
        check_rows(settings_of(argument, *overrides), task_order("coin"), meshes.abstract_mesh({"data": devices}, devices))
    except UserError as error:
        return str(error)
    return ""


def test_late_tasks_that_devices_do_not_divide_are_named_with_sizes_and_numbers_of_devices_that_would_do():
    text = said(8)
    assert text == (
        "config.train: batches of 70, 84, 140 rows cannot be split over 8 devices: use 1, 2, 7 or 14 device(s), or other "
        "config.train.batch_sizes (ImageNet 112 or 168, VQAv2 56 or 112, OCRVQA 56 or 112; or configs/coin.py:batches=coin_scripts)")
    larger = [f"train.batch_sizes.{task}={rows}" for task, rows in re.findall(r"(\w+) \d+ or (\d+)[,;]", text)]
    assert len(larger) == 3 and said(8, "", *larger) == ""
    assert "GQA, phase integrate 56 or 84" in said(7, "method=pclr", "method.integrate_batch_size=60", "train.loss_groups=4")


def test_micro_batches_that_devices_do_not_divide_are_refused_with_a_number_that_would_do():
    for devices, argument, even in ((8, "batches=coin_scripts", 8), (8, "batches=mcitlib64", 2), (7, "", 1)):
        assert said(devices, argument) == (
            f"config.train: micro-batches are split unevenly over {devices} devices: --config.train.micro_batches={even} is even")
        assert said(devices, argument, f"train.micro_batches={even}") == ""
    assert said(1, "", "train.micro_batches=3") == (
        "config.train: micro-batches are split unevenly over 1 device: --config.train.micro_batches=2 is even")


def test_groups_of_the_loss_that_do_not_divide_a_late_batch_are_refused():
    assert said(2, "", "train.batch_sizes.VQAv2=72", "train.micro_batches=1") == (
        "config.train: loss_groups=7 does not divide batches of 72 rows: use rows that it divides (VQAv2 70 or 84)")
    assert said(2, "", "train.batch_sizes.VQAv2=72", "train.micro_batches=1", "train.loss_norm=global_token_mean") == ""
    apart = ["method.replay_mix=separate_batch", "train.micro_batches=1"]
    assert said(2, "method=proglora_static", "train.batch_sizes.VQAv2=72", *apart) == "", "there the replayed rows have a mean of their own"
    first = said(2, "method=proglora_static", "train.batch_sizes.ScienceQA=110", *apart)
    assert "(ScienceQA 98 or 112)" in first, "but the first stage replays nothing"


@pytest.mark.parametrize("argument, names", [
    ("method=lora", list(TASKS)), ("method=sema,isolated", list(TASKS)), ("method=multi_task", ["multi_task"]), ("method=zero_shot", []),
])  # fmt: skip
def test_every_stage_is_asked(argument, names):
    settings = settings_of(argument)
    rows = step_rows(settings, task_order("coin"))
    assert list(rows) == names and list(rows.values()) == [settings.train.batch_sizes[name] for name in names]
