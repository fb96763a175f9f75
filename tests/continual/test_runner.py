"""Whole runs in this process: stages of every protocol, what they leave on the disk, and what their results say."""

from __future__ import annotations

import json
import re
import shutil
import signal

import numpy as np
import pytest
import tiny_run
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual.answering import _line
from proglora_jax.continual.run_record import load_run
from proglora_jax.continual.session import Session
from proglora_jax.continual.stages import plan_stages
from proglora_jax.data import images
from proglora_jax.data.errors import UserError
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import load_auxiliary, load_task
from proglora_jax.methods.base import TaskInfo
from proglora_jax.methods.registry import METHODS, NAMES
from proglora_jax.training.log import RunLogger
from proglora_jax.training.loop import Stopped
from proglora_jax.training.projector import projector_for_task

TASKS = ("TextVQA", "ImageNet", "OCRVQA")
TWO = {"data__tasks": "TextVQA,OCRVQA", "train__max_steps": 3}


# ---------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("multi_task", "zero_shot")])
def test_a_sequence_trains_one_task_a_stage_and_asks_all_tasks_so_far(name):
    stages = plan_stages(TASKS, METHODS[name](), "sequential")
    expected = [(0, 0, "TextVQA", (0,), (0,)), (1, 1, "ImageNet", (1,), (0, 1)), (2, 2, "OCRVQA", (2,), (0, 1, 2))]
    assert [(s.number, s.index, s.name, s.train, s.evaluate) for s in stages] == expected and not any(s.fresh for s in stages)
    assert all(stage.names == TASKS and [stage.local(task) for task in stage.evaluate] == list(stage.evaluate) for stage in stages)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("multi_task", "zero_shot")])
def test_isolated_stages_are_sequences_of_one_task(name):
    stages = plan_stages(TASKS, METHODS[name](), "isolated")
    expected = [(i, 0, task, (i,), (i,), (task,), True) for i, task in enumerate(TASKS)]
    assert [(s.number, s.index, s.name, s.train, s.evaluate, s.names, s.fresh) for s in stages] == expected
    assert [stage.local(i) for i, stage in enumerate(stages)] == [0, 0, 0]


def test_multi_task_and_zero_shot_have_one_stage():
    (multi,) = plan_stages(TASKS, METHODS["multi_task"](), "sequential")
    assert (multi.name, multi.train, multi.evaluate, multi.local(2)) == ("multi_task", (0, 1, 2), (0, 1, 2), 2)
    (zero,) = plan_stages(TASKS, METHODS["zero_shot"](), "sequential")
    assert (zero.name, zero.train, zero.evaluate) == ("zero_shot", (), (0, 1, 2))
    for name in ("multi_task", "zero_shot"):
        with pytest.raises(UserError, match=rf"config.run.protocol='isolated': {name} has a single stage; use 'sequential'"):
            plan_stages(TASKS, METHODS[name](), "isolated")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_whether_it_trains(name):
    method = METHODS[name]()
    assert method.trains == bool(method.phases(TaskInfo(0, "TextVQA", 1, 9, np.zeros(0, np.float32), 0)))
    assert all(bool(stage.train) == method.trains for stage in plan_stages(TASKS, method, "sequential"))


def test_folders_sort_in_the_order_of_the_stages(tmp_path):
    names = [stage.folder(tmp_path).name for stage in plan_stages(TASKS, METHODS["lora"](), "sequential")]
    assert names == sorted(names) == ["00_textvqa", "01_imagenet", "02_ocrvqa"]


# ------------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def dynamic(here):
    """A finished run of the dynamic method over three tasks."""
    return here.run("dynamic")


def adapters(workdir):
    """(meta, {path: leaf}) of each stage's checkpoint."""
    loaded = [load_checkpoint(folder / "adapter") for folder in tiny_run.stage_folders(workdir)]
    return [(records["meta"], tiny_run.flat(trees["adapter"])) for trees, records in loaded]


def test_results_and_report_of_a_sequence(dynamic):
    record = load_run(dynamic)
    assert (record.method, record.seed, record.tasks, record.finished) == ("proglora_dynamic", 0, TASKS, True)
    assert record.command == "run dynamic" and record.benchmark == "coin_mini"
    for mode in ("coin", "clean"):
        assert [len(row) for row in record.scoring[mode]] == [1, 2, 3]
        assert all(0 <= value <= 100 for row in record.scoring[mode] for value in row)
    assert record.metrics("coin").bwt is not None
    for stage, rows in record.gates.items():
        assert list(rows) == list(TASKS[: stage + 1])
        assert all(len(gates) == stage + 1 and np.isclose(sum(gates), 1, atol=1e-4) for gates in rows.values())
    assert [set(counts) for counts in record.counts] == [{"block", "key", "query_projector", "mm_projector"}] * 3
    assert all(seconds["train"] > 0 and seconds["evaluate"] > 0 for seconds in record.seconds)
    text = (dynamic / "report.md").read_text()
    assert "proglora_dynamic on coin_mini, seed 0" in text and "run dynamic" in text and (dynamic / "report.html").stat().st_size > 10_000


def test_what_a_stage_leaves_in_its_folder(dynamic):
    for number, folder in enumerate(tiny_run.stage_folders(dynamic)):
        assert sorted(p.name for p in folder.iterdir()) == ["adapter", "answers", "scores"]
        assert sorted(p.name for p in (folder / "answers").iterdir()) == sorted(f"{task}.jsonl" for task in TASKS[: number + 1])
        assert sorted(p.name for p in (folder / "scores").iterdir()) == sorted(f"{task}.json" for task in TASKS[: number + 1])
        header, *rows = [json.loads(line) for line in (folder / "answers" / "TextVQA.jsonl").read_text().splitlines()]
        assert header["task"] == "TextVQA" and sorted(row["index"] for row in rows) == list(range(6))
        assert all(row["prompt"] and len(row["gates"]) == 3 and row["question_id"] for row in rows)
    assert json.loads((dynamic / "config.json").read_text())["config"]["method"]["name"] == "proglora_dynamic"


def test_a_stage_saves_its_own_block_and_small_state_only(dynamic):
    stages = adapters(dynamic)
    for number, (meta, leaves) in enumerate(stages):
        assert {path.split("/")[1] for path in leaves if path.startswith("pool/")} == {f"block_{number:02d}"}
        assert {path.split("/")[1] for path in leaves if path.startswith(("memory/", "embedding/"))} == {f"task_{number:02d}"}
        assert (meta["stage"], meta["task"], meta["rank"], meta["alpha"]) == (number, TASKS[number], 2, 4.0)
        assert meta["previous"] == (stages[number - 1][0]["digest"] if number else "")
        assert len(meta["similarity"]) == number and meta["hyperparameters"]["recall_weight"] == 2.0
    sizes = [sum(leaf.nbytes for leaf in leaves.values()) for _, leaves in stages]
    assert sizes[0] == sizes[1] == sizes[2]


def test_blocks_once_learned_are_never_written_again(dynamic):
    keys = [leaves["params/keys"] for _, leaves in adapters(dynamic)]
    own = [leaves["params/key"] for _, leaves in adapters(dynamic)]
    np.testing.assert_array_equal(keys[2][:2], own[:2])
    assert not keys[0].any() and not keys[1][1:].any()


def test_a_finished_run_is_asked_once_more_with_images_prepared_in_the_other_way(here, dynamic, monkeypatch):
    """Only the tasks that CoIN's scripts crop are asked again; nothing is trained, and what was there stays as it was."""
    workdir = here.folder / "both"
    shutil.copytree(dynamic, workdir)
    known = {path: path.stat().st_mtime_ns for path in workdir.glob("stages/*/*/*") if path.is_file()}
    before, asked = tiny_run.outcome(dynamic), []
    prepare = Session.eval_loader.__wrapped__
    monkeypatch.setattr(Session, "eval_loader", lambda self, mode: asked.append(mode) or prepare(self, mode))
    here.run("both", evaluate__also_image_mode="pad")
    assert asked == ["pad"] * 2  # ImageNet after its own stage and after the next
    files = lambda kind: sorted(path.name for path in (workdir / "stages" / "02_ocrvqa" / kind).iterdir())
    assert files("scores") == ["ImageNet.json", "ImageNet_pad.json", "OCRVQA.json", "TextVQA.json"]
    header = json.loads((workdir / "stages" / "02_ocrvqa" / "answers" / "ImageNet_pad.jsonl").read_text().splitlines()[0])
    assert header["image_mode"] == "pad" and header["task"] == "ImageNet"
    after = tiny_run.outcome(workdir)
    assert {name for name in before if name != "scoring"} <= set(after)
    assert [name for name in tiny_run.differences(before, after) if "_pad" not in name] == ["scoring"]
    record = load_run(workdir)
    assert record.modes == ("coin", "clean", "clean_pad", "coin_pad") and record.finished
    padded = json.loads((workdir / "stages" / "02_ocrvqa" / "scores" / "ImageNet_pad.json").read_text())["accuracy"]
    for mode in ("coin", "clean"):
        now, other = record.scoring[mode], record.scoring[f"{mode}_pad"]
        assert now == load_run(dynamic).scoring[mode] and other[2][1] == padded[mode]
        assert [row[::2] for row in now] == [row[::2] for row in other], "TextVQA and OCRVQA are padded either way"
    text = (workdir / "report.md").read_text()
    assert "coin_pad, clean_pad: the same with every image padded to a square" in text and "right after, coin_pad" in text
    assert known == {path: path.stat().st_mtime_ns for path in known}


def test_how_often_progress_is_saved_changes_nothing(here, dynamic):
    other = here.run("rarely", run__checkpoint_every_steps=5, run__log_every_steps=3, data__threads=1, data__image_cache_mb=1)
    assert tiny_run.differences(tiny_run.outcome(other), tiny_run.outcome(dynamic)) == []


def stopped_in_the_second_stage(here, monkeypatch, name, **fields):
    """The workdir of a run that was stopped after step 5 of its second stage."""
    step = RunLogger.step

    def stop(self, number, *rest, **more):
        step(self, number, *rest, **more)
        if self._phase["stage"] == 1 and number == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "step", stop)
        with pytest.raises(Stopped, match="of the stage ImageNet; the progress is saved"):
            here.run(name, **fields)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert list((here.folder / name / "stages" / "01_imagenet" / "progress").iterdir())
    return here.folder / name


def test_prepared_images_in_a_folder_change_nothing(here, dynamic, monkeypatch):
    """Nor does it to go on with a folder that another run has filled; then nothing is decoded any more."""
    kept = here.folder / "kept_images"
    folder = {"data__image_cache_dir": str(kept)}
    first = here.run("with_folder", **folder)
    assert tiny_run.differences(tiny_run.outcome(first), tiny_run.outcome(dynamic)) == []
    files = {path: path.stat().st_mtime_ns for path in kept.glob("*/*")}
    assert len(files) > 50 and {path.stat().st_size for path in files} == {32 + 48 * 48 * 3}
    stopped_in_the_second_stage(here, monkeypatch, "begun_without")
    monkeypatch.setattr(images, "read_rgb", None)
    assert tiny_run.differences(tiny_run.outcome(here.run("begun_without", **folder)), tiny_run.outcome(dynamic)) == []
    assert {path: path.stat().st_mtime_ns for path in kept.glob("*/*")} == files


def test_progress_that_went_on_from_another_state_is_dropped(here, dynamic, monkeypatch, caplog):
    """A stage that was half trained on a predecessor that is not there any more starts again from the one that is."""
    workdir = stopped_in_the_second_stage(here, monkeypatch, "another", train__learning_rate=1e-2)
    # the first stage of the other run, with its own config: as if stage 1 had been lost and trained again elsewhere
    shutil.rmtree(workdir / "stages" / "00_textvqa")
    shutil.copytree(dynamic / "stages" / "00_textvqa", workdir / "stages" / "00_textvqa")
    shutil.copy(dynamic / "config.json", workdir / "config.json")
    here.run("another")
    assert "is dropped: the stage began with another state then than it does now" in caplog.text
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(dynamic)) == []


def test_changed_buckets_cost_the_stage_that_was_under_way_and_no_other(here, dynamic, monkeypatch, caplog):
    """The plan of batches is another one then, so the steps done cannot be continued; what is finished stays."""
    workdir = stopped_in_the_second_stage(here, monkeypatch, "buckets")
    finished = tiny_run.stage_folders(workdir)[0] / "adapter" / "meta.json"
    before = finished.stat().st_mtime_ns
    here.run("buckets", data__buckets=((90, 20), (92, 24)))
    assert re.search(r"Progress train_\d+ is dropped: iterator state: it was saved with other data or settings", caplog.text)
    assert finished.stat().st_mtime_ns == before and load_run(workdir).finished
    assert sorted(p.name for p in (workdir / "stages" / "01_imagenet").iterdir()) == ["adapter", "answers", "scores"]
    assert tiny_run.differences(tiny_run.outcome(workdir), tiny_run.outcome(dynamic)) != []


def test_what_is_padding_is_said_as_a_phase_begins_and_kept(here, monkeypatch):
    """Of two stages, the second with a replayed row that its plan counts, too; and of the questions' prompts."""
    said, message = [], RunLogger.message
    monkeypatch.setattr(RunLogger, "message", lambda self, text: (said.append(text), message(self, text)))
    buckets = {"data__buckets": ((35, 24), (47, 24), (92, 24)), "evaluate__prompt_lengths": (34, 88)}
    workdir = here.run("padding", "proglora_static", **TWO | buckets)
    record, lengths = load_run(workdir), {}
    for stage, read in enumerate(record.data):
        count, batches = sum(read["batches"].values()), {int(top): number for top, number in read["batches"].items()}
        assert count == 3 and read["padded_positions"] == sum(4 * top * number for top, number in batches.items())
        assert 0.5 * read["padded_positions"] < read["positions"] < read["padded_positions"] and set(batches) <= {35, 47, 92}
        lengths[stage] = batches
        listed = ", ".join(f"{top}: {number}" for top, number in batches.items())
        share = 100 * (1 - read["positions"] / read["padded_positions"])
        (line,) = [text for text in said if text.endswith(f"% padding; batches by padded length: {listed}")]
        assert line.startswith(f"phase train: {share:.1f} % padding")
        assert said.index(line) == 1 + next(i for i, text in enumerate(said) if text.startswith(f"=== stage {stage + 1}/2"))
    assert lengths[0] != lengths[1], "the records of the two tasks are of different lengths"
    assert [set(prompts) for prompts in record.prompts] == [{"TextVQA"}, {"TextVQA", "OCRVQA"}]
    questions = load_task(str(here.root), "TextVQA").questions
    assert record.prompts[0] == {"TextVQA": record.prompts[1]["TextVQA"]} and len(questions) == 6
    assert sum(record.prompts[0]["TextVQA"]["batches"].values()) == 3
    text = (workdir / "report.md").read_text()
    assert "Positions trained on, replayed rows included" in text and "Positions of the prompts" in text
    assert re.search(rf"\| 2 OCRVQA +\| +{read['positions']:,} +\| +{share:.1f} +\| +{re.escape(listed)} +\|", text)


def test_questions_that_changed_are_asked_again_and_references_only_scored_again(here, dynamic):
    workdir, root = here.folder / "mended", here.folder / "mended_data"
    shutil.copytree(dynamic, workdir)
    shutil.copytree(here.root, root)
    file = root / "playground" / "Instructions_Original" / "OCRVQA" / "test.json"
    records = json.loads(file.read_text())
    records[0]["answer"] = "mended"
    file.write_text(json.dumps(records))
    answers = {p: p.stat().st_mtime_ns for p in workdir.glob("stages/*/answers/*")}
    scores = {p: p.stat().st_mtime_ns for p in workdir.glob("stages/*/scores/*")}
    here.run("mended", data__root=str(root))
    assert {p: p.stat().st_mtime_ns for p in answers} == answers
    assert {p.name for p, when in scores.items() if p.stat().st_mtime_ns != when} == {"OCRVQA.json"}
    records[0]["text"] = "Is it another question?"
    file.write_text(json.dumps(records))
    here.run("mended", data__root=str(root))
    assert {p.name for p, when in answers.items() if p.stat().st_mtime_ns != when} == {"OCRVQA.jsonl"}


def test_other_rules_of_scoring_are_applied_to_the_answers_that_are_there(here):
    workdir = here.run("rules", "zero_shot", data__tasks="ScienceQA,Grounding")
    answers = {task: workdir / "stages" / "00_zero_shot" / "answers" / f"{task}.jsonl" for task in ("ScienceQA", "Grounding")}
    questions = load_task(str(here.root), "Grounding").questions
    texts = {"ScienceQA": ["a map. The answer is E."] * 6, "Grounding": [question.extra["origin_answer_bbox"] for question in questions]}
    for task, path in answers.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1:] = [row | {"text": texts[task][row["index"]]} for row in rows[1:]]
        path.write_text("".join(_line({name: value for name, value in row.items() if name != "crc"}) for row in rows))
    here.run("rules", "zero_shot", data__tasks="ScienceQA,Grounding")
    scores = lambda task: json.loads((workdir / "stages" / "00_zero_shot" / "scores" / f"{task}.json").read_text())
    plain = {task: scores(task) for task in answers}
    kept = {path: path.read_text() for path in answers.values()}
    here.run("rules", "zero_shot", data__tasks="ScienceQA,Grounding", evaluate__scienceqa_rule="llava", evaluate__grounding_rule="minigpt")
    assert kept == {path: path.read_text() for path in answers.values()}, "nothing was asked again"
    problems = load_auxiliary(str(here.root), "ScienceQA")["problems"]
    first = [problems[question.id] for question in load_task(str(here.root), "ScienceQA").questions]
    assert plain["ScienceQA"]["correct"]["coin"] == [float(problem["answer"] == 0) for problem in first], "the article is read as A"
    assert scores("ScienceQA")["correct"]["coin"] == [float(problem["answer"] == 4) for problem in first]
    seen = [all("." in corner and float(corner) for corner in text.strip("[]").split(", ")) for text in texts["Grounding"]]
    assert scores("Grounding")["correct"]["coin"] == [float(decimals) for decimals in seen] and any(seen), "no zeros"
    assert scores("Grounding")["accuracy"]["coin"] == scores("Grounding")["ceiling"]["coin"]
    assert all(scores(task)["correct"]["clean"] == plain[task]["correct"]["clean"] for task in answers)
    text = (workdir / "report.md").read_text()
    assert re.search(r"\| scienceqa_rule +\| llava +\|", text) and re.search(r"\| grounding_rule +\| minigpt +\|", text)


def test_a_changed_backbone_is_noticed(here, dynamic):
    shutil.copytree(dynamic, here.folder / "swapped")
    shutil.copytree(here.model, here.folder / "other_model")
    config = json.loads((here.model / "config.json").read_text())
    (here.folder / "other_model" / "config.json").write_text(json.dumps(config | {"comment": "another file"}))
    settings = here.config(model__path=str(here.folder / "other_model"))
    stored = json.loads((here.folder / "swapped" / "config.json").read_text())
    stored["config"]["model"]["path"] = settings["model"]["path"]
    (here.folder / "swapped" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"00_textvqa: was trained on another backbone than config.model.path=.*; put that model back"):
        tiny_run.main.run(settings, here.folder / "swapped")


# ---------------------------------------------------------------------------------------------------------- other protocols


def test_isolated_runs_give_forward_transfer(here):
    alone = here.run("alone", "lora", run__protocol="isolated", **TWO)
    record = load_run(alone)
    assert not record.sequential and record.finished and set(record.isolated) == {"TextVQA", "OCRVQA"}
    assert [meta["previous"] for meta, _ in adapters(alone)] == ["", ""]
    first, second = [leaves for _, leaves in adapters(alone)]
    assert any(not np.array_equal(first[path], second[path]) for path in first)
    assert "Metrics" in (alone / "report.md").read_text()

    for path in (alone, alone / "results.json"):
        sequence = here.run("sequence", "lora", run__isolated_results=str(path), **TWO)
    record = load_run(sequence)
    assert record.sequential and record.isolated == load_run(alone).isolated
    assert record.metrics("coin").fwt is not None
    in_sequence = adapters(sequence)[0][1]  # the first task has none before it, so both protocols train the same
    assert len(first) > 10 and all(np.array_equal(leaf, in_sequence[path]) for path, leaf in first.items())


def test_a_projector_that_is_lost_between_tasks_is_lost_on_demand(here):
    """CoIN's bug as a flag: the second task's projector is random, not the first one's; at a rate of 0 both stay as they began."""
    fields = {"train__projector_init_per_task": "random", "train__projector_learning_rate": 0.0, "train__max_steps": 1}
    found = [leaves for _, leaves in adapters(here.run("lost", "lora", **TWO | fields))]
    own = {"linear_1": {}, "linear_2": {}}
    for path, leaf in found[0].items():
        if path.startswith("params/mm_projector/"):
            own[path.split("/")[2]][path.split("/")[3]] = leaf
    drawn = projector_for_task("random", own, own, 1, 0)
    assert all(np.array_equal(found[1][f"params/mm_projector/{name}/{part}"], leaf) for name, parts in drawn.items()
               for part, leaf in parts.items())
    assert not np.array_equal(found[0]["params/mm_projector/linear_1/kernel"], drawn["linear_1"]["kernel"])
    with pytest.raises(UserError, match="train.projector_init_per_task='random': needs config.method.train_mm_projector=True"):
        here.run("never", "lora", **fields, method__train_mm_projector=False)


def test_isolated_results_are_checked_before_anything_is_trained(here, dynamic):
    fields = {"run__isolated_results": str(dynamic), **TWO}
    with pytest.raises(UserError, match="config.run.isolated_results=.*: has no isolated result of TextVQA, OCRVQA; run these tasks"):
        here.run("checked", "lora", **fields)
    with pytest.raises(UserError, match="config.run.isolated_results=nowhere: nowhere/results.json: no such file"):
        here.run("checked", "lora", **fields | {"run__isolated_results": "nowhere"})
    assert not (here.folder / "checked" / "stages").exists()


def test_multi_task_trains_once_on_the_union(here):
    workdir = here.run("union", "multi_task", **TWO | {"train__batch_sizes": {"multi_task": 2}})
    record = load_run(workdir)
    assert [p.name for p in tiny_run.stage_folders(workdir)] == ["00_multi_task"]
    assert record.finished and not record.sequential and [len(row) for row in record.scoring["coin"]] == [2]
    assert record.metrics("coin").bwt is None


def test_multi_task_from_the_file_of_all_tasks(here):
    """CoIN's Multitask/train.json in place of the tasks' own files: the same rows, the same block."""
    write_benchmark(str(here.root), 0, 20, 6)
    fields = TWO | {"data__benchmark": "coin", "data__train_examples": 4, "train__batch_size": 2}
    own = here.run("own_files", "multi_task", **fields)
    root = here.folder / "one_file"
    folder = root / "playground" / "Instructions_Original"
    shutil.copytree(here.root, root)
    files = [folder / task / "train.json" for task in ("OCRVQA", "GQA", "TextVQA")]
    everything = [record for file in files for record in json.loads(file.read_text())]
    (folder / "Multitask").mkdir()
    (folder / "Multitask" / "train.json").write_text(json.dumps(everything))
    for file in files:
        file.unlink()
    shared = here.run("one_file_run", "multi_task", **fields | {"data__root": str(root)})
    assert tiny_run.differences(tiny_run.outcome(own), tiny_run.outcome(shared)) == []


def test_zero_shot_trains_nothing(here):
    workdir = here.run("zero", "zero_shot", **TWO)
    record = load_run(workdir)
    assert record.finished and record.counts[0] == {} and record.gates == {}
    (_, leaves), = adapters(workdir)
    assert {path.split("/")[1] for path in leaves} == {"mm_projector"}
    text = (workdir / "report.md").read_text()
    assert re.search(r"zero_shot on coin_mini", text) and "step" not in (workdir / "metrics.jsonl").read_text()
