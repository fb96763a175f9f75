"""Comparisons of methods: what is planned and shared, how runs end, what the report says; a stand-in for the main job writes results."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import tiny_run
from PIL import Image

from proglora_jax import tools
from proglora_jax.checkpoints.integrity import atomic_write_json
from proglora_jax.continual import compare_examples, compare_figures, compare_jobs, compare_report, compare_tables
from proglora_jax.continual.compare_costs import Cost, cost_of
from proglora_jax.continual.compare_plan import PlannedRun, plan
from proglora_jax.continual.run_record import RunRecord, load_run
from proglora_jax.data.errors import UserError
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import ORDERS, load_task
from proglora_jax.evaluation import published
from proglora_jax.methods.registry import METHODS, NAMES

CONFIG = str(tiny_run.CONFIGS / "coin_mini.py")
TASKS = ORDERS["coin"]
# Stands in for the main job: the first argument names a file that says by workdir how a run ends and what it leaves.
STAND_IN = """
import json, os, signal, sys, time
flags = dict(flag.lstrip('-').split('=', 1) for flag in sys.argv[2:])
folder, wanted = flags['workdir'], json.load(open(sys.argv[1]))
open(os.path.join(folder, 'starts'), 'a').write(os.environ.get('XLA_FLAGS', '') + '\\n')
what = wanted[os.path.basename(folder)]
if what['how'] == 'hang':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(flags['stopped_exit_code'])))
    open(os.path.join(folder, 'listens'), 'w').close()
    time.sleep(60)
if what['how'] == 'fail':
    print('some line\\nerror: config.train.batch_size=7: does not fit\\nanother line', file=sys.stderr)
    sys.exit(1)
if what['how'] == 'raise':
    raise RuntimeError('the device is gone')
for name in ('config', 'results'):
    json.dump(what[name], open(os.path.join(folder, name + '.json'), 'w'))
"""


def record(method: str, seed: int = 0, shift: float = 0.0, **fields) -> RunRecord:
    """A finished run: the published matrix of the method (of MoELoRA for those that have none), moved by `shift`."""
    matrix = [[value + shift for value in row] for row in published.MATRICES.get(method, published.MATRICES["moelora"])]
    own = {"method": method, "seed": seed, "tasks": TASKS, "scoring": {"coin": matrix, "clean": matrix}, "benchmark": "coin_mini",
           "counts": [{"block": 10, "key": 2}] * 8}  # fmt: skip
    return RunRecord(**own | fields)


class World:
    """A folder of runs, the stand-in, and how each run shall end (well, unless told otherwise)."""

    def __init__(self, folder, methods, seeds=(0,), isolated=False, overrides=()):
        self.folder, self.lines = folder, []
        self.runs = plan(CONFIG, list(overrides), methods, seeds, folder / "out", isolated)
        alone = [[*[None] * i, 50.0 + i] for i in range(8)]
        self.wanted = {}
        for run in self.runs:
            left = record(run.method, run.seed, run.seed / 4)
            if run.families:
                left = dataclasses.replace(left, scoring={"coin": alone}, isolated=dict(zip(TASKS, range(50, 58))))
            self.wanted[run.workdir.name] = {"how": "well", "config": {"config": run.config}, "results": left.to_json()}
        (folder / "stand_in.py").write_text(STAND_IN)

    def job(self):
        """The command of the stand-in."""
        (self.folder / "wanted.json").write_text(json.dumps(self.wanted))
        return [sys.executable, "-S", str(self.folder / "stand_in.py"), str(self.folder / "wanted.json")]

    def run(self, jobs=2):
        """Runs all that is not finished."""
        return compare_jobs.run_all(self.runs, jobs, self.lines.append, self.job(), pause=0.02)

    def starts(self) -> dict[str, int]:
        """How often each run was started."""
        paths = {run.workdir.name: run.workdir / "starts" for run in self.runs}
        return {name: len(path.read_text().splitlines()) if path.exists() else 0 for name, path in paths.items()}


# ------------------------------------------------------------------------------------------------------------------ plan


def test_what_each_method_is_measured_against():
    """Plain LoRA of the same rank for all that are it on one task; the method itself where it has experts, routers or ranks of its own."""
    own = {"moelora", "branchlora", "pclr"}
    expected = {name: "self" if name in own else "" if name in ("zero_shot", "multi_task") else "lora" for name in NAMES}
    assert {name: METHODS[name]().isolated_as for name in NAMES} == expected


@pytest.mark.parametrize("method, fields, against", [
    ("mocl", {"use_scale": False}, "self"), ("mocl", {"weights": "cosine"}, "self"), ("mocl", {"match_weight": 0.0}, "lora"),
    ("proglora_light", {"bottom": "none"}, "self"), ("proglora_light", {"tie_bottom_layers": True}, "self"),
    ("proglora_light", {"bottom": "shared_frozen_after_first"}, "lora"),
    ("olora", {"norm_weight": 0.1}, "self"), ("olora", {"orthogonal_weight": 5.0}, "lora"),
])  # fmt: skip
def test_flags_that_change_a_single_task_change_what_it_is_measured_against(tmp_path, method, fields, against):
    """MoCL's only block with another scale or gate, bottom layers without blocks of their own, a penalty that needs no earlier task."""
    assert METHODS[method](**fields).isolated_as == against
    flags = [f"--config.method.{name}={value}" for name, value in fields.items()]
    alone = plan(CONFIG, flags, [method], [0], tmp_path, True)[1]
    assert (alone.method, alone.families) == (method if against == "self" else "lora", (method,))
    if against == "self":
        assert alone.config["method"] | fields == alone.config["method"]


@pytest.mark.parametrize("overrides", [[], ["--config.method.rank=8", "--config.train.epochs=1"]])
def test_families_share_their_isolated_runs(tmp_path, overrides):
    runs = plan(CONFIG, overrides, NAMES, [0, 3], tmp_path, True)
    sequences, alone = [run for run in runs if not run.families], [run for run in runs if run.families]
    assert [(run.method, run.seed) for run in sequences] == [(name, seed) for seed in (0, 3) for name in NAMES]
    assert runs == sequences + alone and len({run.workdir for run in runs}) == len(runs)
    lora = [run.families for run in alone if run.method == "lora" and run.seed == 3]
    assert lora == [("lora", "lwf", "ewc", "olora", "mocl"), ("sema", "proglora_static", "proglora_dynamic", "proglora_light")]
    assert {run.families for run in alone if run.method != "lora"} == {("moelora",), ("branchlora",), ("pclr",)}
    by_method = {run.method: run.config["method"] for run in sequences}
    for run in alone:
        assert run.config["run"]["protocol"] == "isolated" and "--config.run.protocol=isolated" in run.arguments
        for name in run.families:
            assert all(by_method[name][field] == value for field, value in run.config["method"].items() if field != "name"), name


def test_another_rank_or_recipe_is_another_isolated_run(tmp_path):
    names = [plan(CONFIG, flags, ["proglora_dynamic"], [0], tmp_path, True)[1].workdir.name for flags in (
        [], ["--config.method.rank=8"], ["--config.method.proj_width=8"], ["--config.train.epochs=1"])]
    assert names[0] == names[2] and len(set(names)) == 3, "what only the routing has does not matter to plain LoRA"


@pytest.mark.parametrize("named, methods, seeds, sentence", [
    (CONFIG, [], [0], "--methods is missing; give at least one"), (CONFIG, ["lora"], [], "--seeds is missing"),
    (CONFIG, ["lora", "lwf", "lora"], [0], "--methods names lora twice; give each once"),
    (CONFIG, ["lora"], [1, 1], "--seeds names 1 twice"),
    (CONFIG, ["lora"], [-1], "--seeds -1: must be 0 or more"), (CONFIG, ["lara"], [0], "config.method.name='lara': no such method"),
    (f"{CONFIG}:method=lora", ["lora"], [0], "leave out method=lora; --methods, --seeds and --isolated say so"),
    ("nothing.py", ["lora"], [0], "--config=nothing.py:method=lora,seed=0"),
])  # fmt: skip
def test_plans_that_are_refused(tmp_path, named, methods, seeds, sentence):
    with pytest.raises(UserError, match=re.escape(sentence) if "nothing" not in sentence else "nothing.py: no such file"):
        plan(named, [], methods, seeds, tmp_path, False)


# ------------------------------------------------------------------------------------------------------------------ jobs


def test_finished_runs_are_not_repeated(tmp_path):
    world = World(tmp_path, ["lora", "proglora_dynamic", "proglora_static"], isolated=True)
    assert world.run() == ({}, 0)
    assert set(world.starts().values()) == {1} and len(world.runs) == 5
    assert sum("[" in line for line in world.lines) == 5 and "[5/5]" in world.lines[-1]
    assert "about" in world.lines[0] and "ACC 5" in " ".join(world.lines)
    again = World(tmp_path, ["lora", "proglora_dynamic", "proglora_static"], isolated=True)
    assert again.run() == ({}, 0) and again.lines == ["5 of 5 runs are there already"]
    assert set(again.starts().values()) == {1}


def test_a_run_of_an_earlier_version_is_finished_though_it_does_not_name_newer_fields(tmp_path):
    world = World(tmp_path, ["lora"])
    world.run()
    path = world.runs[0].workdir / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["evaluate"]["subset_except"], content["config"]["method"]["dropout"]
    path.write_text(json.dumps(content))
    assert not World(tmp_path, ["lora"]).runs[0].finished, "coin_mini trains without dropout, which is not the default"
    content["config"]["method"]["dropout"] = 0.0
    path.write_text(json.dumps(content))
    assert World(tmp_path, ["lora"]).runs[0].finished


def test_the_number_of_threads_makes_no_other_run(tmp_path):
    """Earlier configs said 2 where they say 0 now; that names isolated runs as well."""
    world = World(tmp_path, ["lora"], isolated=True, overrides=["--config.data.threads=2"])
    world.run()
    now = World(tmp_path, ["lora"], isolated=True)
    assert [run.workdir for run in now.runs] == [run.workdir for run in world.runs] and all(run.finished for run in now.runs)
    assert now.runs[0].config["data"]["threads"] == 0


def test_a_run_of_another_config_is_not_taken_for_finished(tmp_path):
    World(tmp_path, ["lora"]).run()
    changed = World(tmp_path, ["lora"], overrides=["--config.train.epochs=1"])
    assert not changed.runs[0].finished
    changed.run()
    assert changed.starts() == {"lora_seed0": 2}, "the main job decides whether it can go on there"


def test_a_failure_is_one_sentence_and_stops_no_other_run(tmp_path):
    world = World(tmp_path, ["lora", "lwf", "ewc", "olora"])
    world.wanted["lwf_seed0"]["how"], world.wanted["ewc_seed0"]["how"] = "fail", "raise"
    world.wanted["olora_seed0"]["results"] = record("olora", scoring={"coin": published.MATRICES["moelora"][:3]}).to_json()
    failed, stopped = world.run(jobs=1)
    assert not stopped and list(failed) == ["lwf, seed 0", "ewc, seed 0", "olora, seed 0"]
    assert failed["lwf, seed 0"] == "config.train.batch_size=7: does not fit"
    assert failed["ewc, seed 0"].startswith("RuntimeError: the device is gone (exit status 1; see ")
    assert world.runs[0].finished and any("lwf, seed 0 FAILED: config.train" in line for line in world.lines)
    text = _written(world, failed)[0]
    assert "| lwf, seed 0 | config.train.batch\\_size=7: does not fit |" in text or "| lwf, seed 0 | config.train.batch_size=7" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_the_runs_and_starts_no_more(tmp_path, number):
    world = World(tmp_path, ["lora", "lwf", "ewc"])
    for what in world.wanted.values():
        what["how"] = "hang"

    def stop():
        while not all((run.workdir / "listens").exists() for run in world.runs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    before = signal.getsignal(number)
    failed, stopped = world.run(jobs=2)
    assert (failed, stopped) == ({}, number) and signal.getsignal(number) is before
    assert world.starts() == {"lora_seed0": 1, "lwf_seed0": 1, "ewc_seed0": 0}
    assert all("stopped after" in line and "its progress is saved" in line for line in world.lines) and len(world.lines) == 2


@pytest.mark.parametrize("jobs, flagged", [(1, False), (2, True)])
def test_runs_at_the_same_time_take_one_thread_each(tmp_path, monkeypatch, jobs, flagged):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    world = World(tmp_path, ["lora"])
    world.run(jobs)
    flags = (world.runs[0].workdir / "starts").read_text()
    assert flags.startswith("--mine") and ("intra_op_parallelism_threads=1" in flags) == flagged


def test_no_jobs_are_refused(tmp_path):
    with pytest.raises(UserError, match="--jobs 0: must be 1 or more"):
        compare_jobs.run_all([], 0)


# ---------------------------------------------------------------------------------------------------------------- report


def _written(world, failed=None):
    paths = compare_report.write_comparison(world.runs, world.folder / "out", "the command", failed)
    return (world.folder / "out" / "compare.md").read_text(), (world.folder / "out" / "compare.html").read_text(), paths


def test_the_report_of_seeds_and_isolated_runs(tmp_path):
    """ACC, MAA, BWT as published for the dynamic method; seed 1 lies 0.25 higher; FWT against 50, 51 ... 57."""
    world = World(tmp_path, ["moelora", "proglora_dynamic"], seeds=(0, 1), isolated=True)
    world.run()
    markdown, page, paths = _written(world)
    row = next(line for line in markdown.splitlines() if line.startswith("| proglora_dynamic | at the end"))
    matrix = published.MATRICES["proglora_dynamic"]
    new_acc, maa = np.mean([line[-1] for line in matrix]), np.mean([np.mean(line) for line in matrix])
    fwt = f"{new_acc + 0.125 - 53.5:.2f} ± 0.18"
    assert row.split(" | ")[2:] == ["74.97 ± 0.18", "51.96 ± 0.18", "84.03 ± 0.18", "50.06 ± 0.18", "54.00 ± 0.18", "31.32 ± 0.18",
                                    "62.84 ± 0.18", "64.57 ± 0.18", "59.21 ± 0.18", f"{maa + 0.125:.2f} ± 0.18", "−6.59 ± 0.00", fwt, "2",
                                    "12", "–", "–", "–", "– |"]  # fmt: skip
    assert "coin scoring, accuracies in %" in markdown and "clean scoring, accuracies in %" in markdown
    assert "the command" in page and "not in the tables" not in markdown
    assert not re.search(r"https?://|<script|<link", page)
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.format == "PNG"
    assert page.count("<img") == len(paths) - 2 == 2


def test_without_a_finished_run_the_report_says_what_is_missing(tmp_path):
    world = World(tmp_path, ["lora"])
    markdown = _written(world)[0]
    assert "| lora, seed 0 | not finished: no stage is scored |" in markdown and "## Results" not in markdown


def test_the_order_against_the_papers():
    """With the papers' own ACC the order is the papers'; one method moved ahead of two others swaps two pairs."""
    rows = {name: published.main_row(name) for name in ("lora", "ewc", "moelora", "mocl")}
    constant = lambda name, level: record(name, scoring={"coin": [[level] * (i + 1) for i in range(8)]})
    section = compare_tables.order_section({name: [constant(name, row.acc)] for name, row in rows.items()})
    assert "of ACC over 4 methods: 1.00. Pairs of methods in the papers' order: 6 of 6." in section.notes[0]
    assert len(section.tables) == 1 and [row[0] for row in section.tables[0].rows] == ["mocl", "moelora", "ewc", "lora"]
    swapped = {name: [constant(name, row.acc - 0.5), constant(name, row.acc + 0.5)] for name, row in rows.items()}
    swapped["lora"] = [constant("lora", 37.7), constant("lora", 38.1)]
    section = compare_tables.order_section(swapped)
    assert "over 4 methods: 0.40. Pairs of methods in the papers' order: 4 of 6." in section.notes[0]
    assert section.tables[1].rows == (("lora", "ewc", "5.00", "yes"), ("lora", "moelora", "0.77", "yes"))
    assert "compare the order, not the levels" in section.notes[-1]
    assert compare_tables.order_section({"lora": [constant("lora", 1.0)]}) is None


def test_rank_correlation():
    assert compare_tables.ranks({"a": 3.0, "b": 1.0, "c": 3.0}) == {"a": 1.5, "b": 3.0, "c": 1.5}
    assert compare_tables.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert compare_tables.rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0
    assert compare_tables.rank_correlation([1, 1], [1, 2]) is None
    # By the formula without ties, 1 - 6 sum d^2 / (n (n^2 - 1)), with d = 1, 1, 0, 2, 2.
    assert compare_tables.rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 6, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_gates_of_experts_are_called_experts_and_are_those_of_one_seed():
    gates = lambda value: {7: {task: [value] * 8 for task in TASKS}}
    names = ("moelora", "proglora_dynamic", "pclr")
    groups = {name: [record(name, seed, gates=gates(0.1 + 0.2 * seed)) for seed in (0, 1)] for name in names}
    groups["lora"] = [record("lora")]
    pictures = compare_tables.gates_section(groups).pictures
    captions = {picture.file: picture.caption for picture in pictures}
    assert list(captions) == [f"compare_gates_{name}.png" for name in names]
    assert captions["compare_gates_moelora.png"] == "moelora: row = task of the questions, column = expert; seed 0."
    assert "column = block; mean of 2 seeds; outlined" in captions["compare_gates_proglora_dynamic.png"]
    assert "column = ranks of; mean of 2 seeds" in captions["compare_gates_pclr.png"]
    assert compare_tables.gates_section({"lora": groups["lora"]}) is None


def test_methods_without_a_sequence_have_one_line(tmp_path):
    flat = {"coin": [[40.0] * 8], "clean": [[41.0] * 8]}
    groups = {"zero_shot": [record("zero_shot", scoring=flat)], "proglora_dynamic": [record("proglora_dynamic")]}
    section = compare_tables.results_section(groups, {name: [Cost(1, None, None, 0.25, 2**30)] for name in groups})
    assert [row[:2] for row in section.tables[0].rows] == [
        ("zero_shot", "at the end"), ("proglora_dynamic", "right after"), ("proglora_dynamic", "at the end")]
    assert section.tables[0].rows[0][-5:] == ("1", "–", "–", "0.250", "1.00 GiB")
    assert all(len(row) == len(table.head) for table in section.tables for row in table.rows)
    assert len(compare_tables.curves_section(groups).pictures) == 2


def test_the_figure_of_fourteen_methods_tells_them_apart():
    styles = {(style["color"], str(style["linestyle"])) for style in map(compare_figures.line_style, range(14))}
    curves = {f"method_{order}": [[order * 5.0] * 8, [order * 5.0 + 2] * 8] for order in range(14)}
    with Image.open(io.BytesIO(compare_figures.step_curves(curves, {}, TASKS, "a$b$"))) as image:
        assert len(styles) == 14 and image.size[0] > 1000


# ------------------------------------------------------------------------------------------------------- costs and examples


def test_costs_come_from_the_files_of_a_run(tmp_path):
    first, second = {"pool/block_00/a": [2, 3], "params/key": [4]}, {"pool/block_01/a": [2, 3], "params/key": [4], "memory/f": [9]}
    for stage, leaves in enumerate((first, second)):
        folder = tmp_path / "stages" / f"0{stage}_task" / "adapter"
        folder.mkdir(parents=True)
        described = {name: {"dtype": "float32", "shape": shape} for name, shape in (leaves | {f"embedding/{stage}": [50]}).items()}
        (folder / "trees.json").write_text(json.dumps({"adapter": described}))
    steps = [(0, 9.0, 5), (0, 1.0, 7), (0, 2.0, 7), (1, 9.0, 6), (1, 3.0, 6)]
    named = [dict(stage=stage, seconds_per_step=seconds, memory_peak_bytes=peak) for stage, seconds, peak in steps]
    lines = [json.dumps({"kind": "step", "phase": "train", "supervised_tokens": 9.0} | entry) for entry in named]
    # Steps on stored features do not run the model.
    lines += [json.dumps({"kind": "step", "phase": "rd", "stage": 0, "seconds_per_step": 0.001, "memory_peak_bytes": 7})] * 9
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "scores"}', "torn {"]))
    assert cost_of(record("mocl"), tmp_path) == Cost(trainable=12, stored=16, beside=9, seconds=2.0, memory=7)
    assert cost_of(record("mocl"), tmp_path / "nothing") == Cost(12, None, None, None, None)


def test_a_method_says_what_on_its_disk_is_no_parameter(tmp_path):
    """By the names that its checkpoints have had so far, whatever other methods keep under them."""
    folder = tmp_path / "stages" / "00_task" / "adapter"
    folder.mkdir(parents=True)
    leaves = {"params/a": [2], "memory/f": [3], "modules/m": [5], "frozen/q_proj": [7], "recall_rows/task_00": [11],
              "projectors/task_00/b": [13]}  # fmt: skip
    described = {name: {"dtype": "float32", "shape": shape} for name, shape in leaves.items()}
    (folder / "trees.json").write_text(json.dumps({"adapter": described}))
    beside = {name: cost_of(record(name), tmp_path).beside for name in (*NAMES, "one_of_tomorrow")}
    special = {"sema": 5, "branchlora": 7, "proglora_dynamic": 3 + 11 + 13, "proglora_light": 3 + 11 + 13}
    assert beside == {name: special.get(name, 3) for name in beside}


def test_examples_are_those_on_which_methods_differ_most():
    assert compare_examples.choose([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1], [1, 1, 0, 0, 0]], 3) == [1, 3, 4]
    assert compare_examples.choose([[0.0, 0.0], [0.0, 0.0]], 3) == [0, 1], "fewer than wanted; equal ones in their order"


def _answer(folder, task, texts, right):
    """Answers and scores of a task as a run leaves them."""
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    rows = [{"task": task}] + [{"index": index, "text": text} for index, text in enumerate(texts)]
    sealed = [row | {"crc": zlib.crc32(json.dumps(row).encode())} for row in rows]
    (folder / "answers" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sealed))
    atomic_write_json(folder / "scores" / f"{task}.json", {"correct": {"coin": right, "clean": right}}, checksum=True)


def test_answers_stand_side_by_side_with_their_pictures(tmp_path):
    write_benchmark(str(tmp_path / "data"), 0, 2, 4, ["ScienceQA", "GQA"])
    data = {"root": str(tmp_path / "data"), "instruction_set": "Original"}
    config = {"config": {"data": data, "evaluate": {"subset_size": 0, "subset_seed": 0}}}
    folders = {name: tmp_path / name for name in ("lora", "mocl")}
    for name, right in (("lora", [1.0, 0.0, 1.0, 0.3]), ("mocl", [1.0, 1.0, 0.0, 0.0])):
        last = folders[name] / "stages" / "01_gqa"
        _answer(folders[name] / "stages" / "00_scienceqa", "GQA", ["old"] * 4, [0.0] * 4)
        _answer(last, "GQA", [f"{name} {index}" if index else "" for index in range(4)], right)
        (folders[name] / "config.json").write_text(json.dumps(config))
    section, = compare_examples.example_sections(folders, ["ScienceQA", "GQA"], "coin")
    questions = load_task(str(tmp_path / "data"), "GQA").questions
    table = section.tables[0]
    assert section.title == "Answers: GQA" and [head[:2] for head in table.head[1:]] == ["A:", "B:", "C:"]
    asked = questions[1:4]
    assert table.rows[:2] == (("question", *(one.text for one in asked)), ("reference", *(one.answer for one in asked)))
    assert table.rows[2:] == (("lora", "✗ lora 1", "✓ lora 2", "0.3 lora 3"), ("mocl", "✓ mocl 1", "✗ mocl 2", "✗ mocl 3"))
    with Image.open(io.BytesIO(section.pictures[0].png)) as sheet:
        colours = np.asarray(sheet.convert("RGB"))[40:200, 10:200].reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 5, "the first tile shows a picture"
    _answer(folders["mocl"] / "stages" / "01_gqa", "GQA", ["x"] * 3, [1.0] * 4)
    assert compare_examples.example_sections(folders, ["GQA"], "coin") == [], "answers that are not complete are not shown"


# ---------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments, sentence", [
    (["--methods", "lora"], "go with --config FILE"), (["run", "--config", CONFIG, "--methods", "lora"], "not both"),
    (["--config", CONFIG], "--methods is missing"), (["--config", CONFIG, "--methods", "lora", "--config.train.epoch=1"], "epoch"),
    (["run", "--config.train.epochs=1"], "go with --config FILE"), ([], "no runs given"),
])  # fmt: skip
def test_wrong_command_lines_are_one_sentence(capsys, arguments, sentence):
    assert tools.main(["compare", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_two_methods_through_the_command_line(tmp_path, capsys, monkeypatch):
    """Two tasks of two steps each, as processes of the main job; the second call finds everything done."""
    monkeypatch.setenv("XLA_FLAGS", tiny_run.xla_flags(1))
    model = tiny_run.save_model(tmp_path / "model")
    fields = {"data__tasks": "TextVQA,ImageNet", "train__max_steps": 2, "run__compilation_cache": tiny_run.compiled()}
    flags = tiny_run.flags(model, tmp_path / "data", "lora", **fields)[1:]
    call = ["compare", "--config", CONFIG, "--methods", "lora,mocl", "--out", str(tmp_path / "out"), *flags]
    assert tools.main(call) == 0, (tmp_path / "out" / "lora_seed0" / "console.log").read_text()[-2000:]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 runs below ") and lines[-1].endswith("compare.html")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Answers: TextVQA" in page and "Answers: ImageNet" in page and "mocl: mean gate" not in page and "compare --config" in page
    costs = [cost_of(load_run(path), path) for path in (tmp_path / "out" / "lora_seed0", tmp_path / "out" / "mocl_seed0")]
    assert 0 < costs[0].stored < costs[1].stored and costs[0].trainable < costs[1].trainable and costs[0].memory > 0
    again = [part for word in call for part in (("lora", "mocl") if word == "lora,mocl" else (word,))]  # with blanks between
    assert tools.main(again) == 0 and "2 of 2 runs are there already" in capsys.readouterr().out
    assert isinstance(plan(CONFIG, flags, ["lora"], [0], tmp_path / "out", False)[0], PlannedRun)
