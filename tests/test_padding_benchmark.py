"""benchmarks/padding.py: what is drawn is what its docstring says, and the default buckets waste little."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from proglora_jax.data.padding import Padding
from proglora_jax.data.plan import BUCKETS, PROMPT_LENGTHS
from proglora_jax.data.tasks import TASKS
from proglora_jax.training.settings import DataSettings, EvalSettings


@pytest.fixture(scope="module")
def padding():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("padding_benchmark", Path(__file__).parents[1] / "benchmarks" / "padding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def coin(padding):
    """A tenth of CoIN's records."""
    return padding.drawn_coin(0.1)


def test_the_configs_have_the_buckets_of_the_package():
    sections = tiny_run.config_module("common").SECTIONS
    assert sections["data"]["buckets"] == BUCKETS == DataSettings().buckets
    assert sections["evaluate"]["prompt_lengths"] == PROMPT_LENGTHS == EvalSettings().prompt_lengths


def test_records_are_drawn_as_described(padding, coin):
    assert list(coin) == list(TASKS)
    for task, records in coin.items():
        assert len(records.lengths) == len(records.labels) == len(records.has_image) == round(0.1 * TASKS[task].train_records)
        assert records.lengths.max() <= 2048 and (records.lengths[records.has_image] > 576 + 42).all() and records.labels.min() > 0
    # 35 before the image, 576, 2, 8 of the question, 11 of the instruction, 5 of the role; a name of 2 to 7 tokens, point and end
    assert set(coin["ImageNet"].prompts) == {637} and (coin["ImageNet"].lengths.min(), coin["ImageNet"].lengths.max()) == (641, 646)
    assert np.mean(coin["ScienceQA"].has_image) == pytest.approx(6218 / 12726, abs=0.001)
    # a later turn of VQAv2 has 3 + 8 + 5 + 2.8 tokens (5.36 turns), of GQA 3 + 10 + 5 + 2.4 (13.07)
    for task, mean in (("VQAv2", 629 + 10.8 + 4.36 * 18.8), ("GQA", 629 + 12.4 + 12.07 * 20.4)):
        assert coin[task].lengths.mean() == pytest.approx(mean, rel=0.01)


@pytest.fixture(scope="module")
def shares(padding, coin):
    """{order: {set of buckets: {part: percent of padding over all tasks}}}."""
    found = padding.totals(coin, {"before": padding.BEFORE, "default": BUCKETS})
    return {order: {name: row[order] for name, row in found.items()} for order in ("modality_length", "bucket")}


def test_rows_of_like_length_waste_at_most_8_percent_where_there_are_images(shares):
    """As the default buckets allow it; CoIN's order mixes lengths in a batch, which is most of its waste."""
    assert shares["bucket"]["default"]["images"] <= 8 < shares["bucket"]["before"]["images"]
    own = shares["modality_length"]
    assert own["default"]["all"] < own["before"]["all"] - 8 and own["default"]["all"] - own["default"]["least"] <= 6


@pytest.mark.parametrize("task", ["ImageNet", "VizWiz"])
def test_one_short_question_an_image_wastes_at_most_8_percent_in_coins_order(padding, coin, task):
    found = padding.measured(coin[task], padding.batch_rows()[task])
    assert found["modality_length default"]["images"] <= 8 < found["modality_length before"]["images"]


def test_prompts_waste_at_most_8_percent(padding, coin):
    found = padding.prompts(coin, {"before": padding.PROMPTS_BEFORE, "default": PROMPT_LENGTHS})
    assert found["default"]["all"] <= 8 < found["before"]["all"]


def test_other_buckets_for_the_same_rows_are_a_plan_of_their_own(padding, coin):
    records = coin["GQA"]
    for grouping in ("modality_length", "none", "bucket"):
        known = padding.planned(records, 56, grouping, padding.BEFORE)
        fresh, reused = (padding.planned(records, 56, grouping, BUCKETS, known=plan) for plan in (None, known))
        assert fresh.digest() == reused.digest() and fresh.padding() == reused.padding()
        least = padding.parts(fresh, records)["least"]
        assert least == Padding.of(fresh.positions.sum(), records.lengths[fresh.rows].max(axis=1), 56)


def test_it_writes_its_results(padding, monkeypatch, tmp_path):
    monkeypatch.setattr(padding, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["padding.py", "--share", "0.004"])
    padding.main()
    assert {path.name for path in tmp_path.iterdir()} == {"padding.json", "padding.md", "padding.png"}
    text = (tmp_path / "padding.md").read_text()
    assert "CoIN's files were not at hand" in text and "| Grounding | 256 |" in text
    assert (tmp_path / "padding.png").read_bytes()[1:4] == b"PNG"
