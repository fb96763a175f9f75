"""Reports from whole, partial and empty runs, the comparison of runs, and the messages for broken results files."""

from __future__ import annotations

import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from proglora_jax.continual import report_figures
from proglora_jax.continual.report import RunRecord, compare_runs, load_run, save_run, write_report
from proglora_jax.continual.report_page import Section, Table, to_html, to_markdown
from proglora_jax.continual.report_published import published_section
from proglora_jax.continual.report_tables import difference, duration, gate_section, number
from proglora_jax.data.errors import UserError
from proglora_jax.data.tasks import ORDERS
from proglora_jax.evaluation import published

TASKS = ORDERS["coin"]
MATRIX = published.MATRICES["proglora_dynamic"]

pytestmark = pytest.mark.filterwarnings("error")


def record(stages=8, **changes):
    """A run with the published matrix of the dynamic method and drawn gates."""
    rng = np.random.default_rng(0)
    fields = {
        "method": "proglora_dynamic",
        "seed": 0,
        "tasks": TASKS,
        "scoring": {"coin": [list(row) for row in MATRIX[:stages]], "clean": [[min(100.0, v + 1) for v in row] for row in MATRIX[:stages]]},
        "gates": {stages - 1: {task: [*map(float, rng.dirichlet(np.ones(stages))), *[0.0] * (8 - stages)] for task in TASKS[:stages]}},
        "isolated": dict.fromkeys(TASKS, 64.31),
        "baselines": {"question_only": dict.fromkeys(TASKS, 12.5)},
        "counts": [{"pool block": 39976960, "key": 4096}] * stages,
        "seconds": [{"train": 187.0, "evaluate": 42.0}] * stages,
        "data": [{"rows": 1200 + stage, "bad_records": 2 * (stage == 5), "truncated": 0} for stage in range(stages)],
        "prompts": [{}] * stages,
        "blank_images": [{}] * stages,
        "cut_images": [{}] * stages,
        "command": "python -m proglora_jax.main --config configs/coin.py",
        "versions": {"jax": "0.10.2"},
        "config_hash": "1a2b3c",
    }
    return RunRecord(**{**fields, **changes})


def written(run, folder, against="none"):
    """The texts of the report written for a run."""
    save_run(run, folder)
    paths = write_report(folder, against)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text(), paths


class Tags(html.parser.HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset(("meta", "img"))

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_round_trip(tmp_path):
    run = record()
    save_run(run, tmp_path)
    assert load_run(tmp_path) == run
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "no temporary file stays behind"


def test_numbers_of_an_array_library_are_written(tmp_path):
    save_run(record(1, scoring={"coin": [[np.float32(50.0)]]}), tmp_path)
    assert load_run(tmp_path).scoring["coin"] == [[50.0]]


def test_full_report(tmp_path):
    markdown, page, paths = written(record(), tmp_path)
    assert "| ACC (= MFN), mean accuracy at the end | 59.09 | 60.0" in markdown
    for line in ("| MAA, mean over stages of the mean so far | 62.40 |", "| BWT, change since right after training | −6.59 |",
                 "| FWT, against training on each task alone | 1.37 | – |", "| New.ACC, mean right after training | 65.68 |",
                 "| Forgetting, mean loss of the earlier tasks | 7.53 |", "| total | 24 min 56 s | 5 min 36 s |", "| 39,981,056 |"):
        assert line in markdown, line  # fmt: skip
    assert "configs/coin.py" in page and "1a2b3c" in page and "question only" in page
    named = re.findall(r"\]\((\S+)\)", markdown)
    assert named == ["report_accuracy_coin.png", "report_accuracy_clean.png", "report_curves.png", "report_gates.png"]
    assert sorted(paths) == sorted(str(tmp_path / name) for name in ("report.md", "report.html", *named))
    for name in named:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and min(image.size) > 200


def test_blank_images_are_told_where_there_are_any(tmp_path):
    assert "blank" not in written(record(), tmp_path)[0]
    data = [{"rows": 9, "blank_images": 3 * (stage == 1)} for stage in range(3)]
    run = record(3, data=data, blank_images=[{}, None, {"TextVQA": 1200, "ImageNet_pad": 1}])
    text = written(run, tmp_path)[0]
    assert load_run(tmp_path) == run
    assert re.search(r"\| stage +\| rows +\| unreadable images, blank +\|", text) and re.search(r"\| 2 TextVQA +\| +9 +\| +3 +\|", text)
    assert "Images without which questions were asked" in text and "Images of which" not in text
    run = record(3, data=[{"rows": 9, "cut_images": 2}] * 3, cut_images=[{}, {"TextVQA": 3}, {}])
    cut = written(run, tmp_path)[0]
    assert re.search(r"\| stage +\| rows +\| cut off, as far as they go +\|", cut) and re.search(r"\| 2 TextVQA +\| +9 +\| +2 +\|", cut)
    assert "Images of which questions saw a part" in cut and re.search(r"\| 2 TextVQA +\| +TextVQA +\| +3 +\|", cut)
    assert re.search(r"\| 3 ImageNet +\| +TextVQA +\| +1,200 +\|\n\| 3 ImageNet +\| +ImageNet_pad +\| +1 +\|", text)


def test_html_is_self_contained(tmp_path):
    page = written(record(), tmp_path)[1]
    images = [attributes for tag, attributes in Tags(page).seen if tag == "img"]
    assert len(images) == 4 and all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_everything_is_escaped(tmp_path):
    hostile = '<script>alert("x")</script>&|`'
    run = record(2, method=hostile, tasks=("a$b$", hostile), gates={1: {hostile: [0.5, 0.5]}}, command=f"run {hostile} ````",
                 scoring={"coin": [[50.0], [40.0, 60.0]]}, isolated={hostile: 1.0}, baselines={hostile: {hostile: 2.0}},
                 counts=[{hostile: 1}], versions={hostile: hostile}, settings={hostile: hostile})  # fmt: skip
    markdown, page, _ = written(run, tmp_path)
    assert "<script" not in page and "&lt;script&gt;alert(&quot;x&quot;)" in page
    Tags(page)
    body, _, command = markdown.partition("`````\n")
    assert "<script" not in body and "run " + hostile in command, "only the fenced command keeps the text as it is"
    for line in body.splitlines():
        if line.startswith("|"):
            assert line.endswith("|") and not re.search(r"(?<!\\)`", line)


@pytest.mark.parametrize("stages", [1, 3])
def test_partial_run(tmp_path, stages):
    matrix = [*([list(row) + [None] * (8 - len(row)) for row in MATRIX[:stages]]), [1.0, *[None] * 7], None]
    run = record(stages, scoring={"coin": matrix[: stages + 2], "clean": matrix[:stages]}, counts=[None] * stages, seconds=[])
    markdown, page, _ = written(run, tmp_path, "published")
    assert f"over {stages} of 8 stages" in markdown and "not finished" in markdown
    assert f"the first {stages} stages of their matrix" in markdown
    Tags(page)
    assert "Published methods" not in markdown, "a partial ACC does not belong among the final ones"


@pytest.mark.parametrize("matrix", [[], [[None] * 8]])
def test_run_without_a_finished_stage(tmp_path, matrix):
    markdown, page, paths = written(record(1, scoring={"coin": matrix, "clean": []}, gates={}), tmp_path, "published")
    assert "None of the 8 stages is scored completely yet" in markdown
    Tags(page)
    assert len(paths) == 2


def test_one_mode_without_gates_and_isolated(tmp_path):
    markdown = written(record(scoring={"clean": MATRIX}, gates={}, isolated=None, baselines={}), tmp_path)[0]
    assert "## Gates" not in markdown and "FWT needs the accuracy of training on each task alone" in markdown
    assert "coin scoring |" not in markdown


def test_run_without_a_sequence(tmp_path):
    row = published.main_row("zero_shot").right_after
    run = record(method="zero_shot", scoring={"coin": [list(row)], "clean": [list(row)]}, gates={})
    markdown = written(run, tmp_path, "published")[0]
    assert run.finished and not run.sequential
    assert "| mean accuracy | 7.12 | 7.12 |" in markdown and "Accuracy matrix" not in markdown
    assert "| ScienceQA | 49.91 | 49.91 | 0.00 |" in markdown


def test_isolated_tasks(tmp_path):
    rows = [[None] * stage + [60.0 + stage] for stage in range(8)]
    run = record(scoring={"coin": rows, "clean": rows}, gates={}, isolated={task: 60.0 + stage for stage, task in enumerate(TASKS)})
    markdown = written(run, tmp_path)[0]
    assert run.finished and not run.sequential
    assert "| mean accuracy | 63.50 | 63.50 |" in markdown and "| VQAv2 | 66.00 | 66.00 | 66.00 | 12.50 |" in markdown
    partial = record(scoring={"coin": rows[:3], "clean": rows[:3]}, gates={})
    assert not partial.finished and not partial.sequential
    assert "| ImageNet | 62.00 | 62.00 |" in written(partial, tmp_path, "published")[0]


def test_comparison_with_the_papers():
    tables = published_section(record()).tables
    metric = {row[0].split(",")[0]: row[1:] for row in tables[0].rows}
    assert metric == {"ACC (= MFN)": ("59.09", "59.09", "0.00"), "MAA": ("62.40", "62.38", "+0.02"),
                      "BWT": ("−6.59", "−6.59", "0.00"), "FWT": ("1.37", "1.37", "0.00")}  # fmt: skip
    assert all(row[3] == row[6] == "0.00" for row in tables[1].rows) and len(tables[1].rows) == 8
    assert tables[2].rows[-1][:3] == ("proglora_dynamic", "this run, seed 0", "59.09")
    assert len(tables[2].rows) == len(published.MAIN_ROWS) + 1


@pytest.mark.parametrize(
    ("changes", "sentence", "tables"),
    [
        ({"method": "mine"}, "print no row for the method mine", 1),
        ({"benchmark": "CoIN"}, "matrix gives 62.40", 3),
        ({"benchmark": "coin_mini"}, "compare the pattern, not the levels", 3),
        ({"method": "branchlora"}, "as printed", 2),
        ({"tasks": tuple(reversed(TASKS)), "gates": {}}, "nothing to compare with", 0),
        ({"tasks": ORDERS["alphabet"], "gates": {}}, "ACC", 2),
    ],
)
def test_what_can_be_compared(changes, sentence, tables):
    section = published_section(record(**changes))
    assert sentence in " ".join((*section.notes, *(" ".join(table.head + table.rows[0]) for table in section.tables)))
    assert len(section.tables) == tables


def test_compare_runs(tmp_path):
    save_run(record(seed=1), tmp_path)
    lora = [[80.0 - 2 * stage] * (stage + 1) for stage in range(8)]
    text = compare_runs([record(), tmp_path, record(method="lora", scoring={"coin": lora}), record(3, seed=2)])
    assert "Not finished, left out: proglora_dynamic seed 2 (stage 3 of 8)." in text
    assert "| proglora_dynamic | 2 | 59.09 ± 0.00 | 62.40 ± 0.00 | −6.59 ± 0.00 | 65.68 ± 0.00 |" in text
    assert "| lora | 1 | 66.00 | 73.00 | −7.00 | 73.00 |" in text
    assert "| lora | 80.00 | 78.00 |" in text and "| lora | 66.00 | 66.00 |" in text
    assert "clean scoring" not in text, "not every run has it"


def test_spread_over_seeds():
    runs = [record(seed=seed, scoring={"coin": [[acc]]}, tasks=("GQA",)) for seed, acc in enumerate((54.8, 55.0, 53.3))]
    assert "| proglora_dynamic | 3 | 54.37 ± 0.93 |" in compare_runs(runs)


def test_labels_tell_settings_apart():
    text = compare_runs([record(), record()], labels=["bonus 0", "bonus 5"])
    assert "| bonus 0 | 1 |" in text and "| bonus 5 | 1 |" in text


def test_compare_errors():
    with pytest.raises(UserError, match="compare: no runs given"):
        compare_runs([])
    with pytest.raises(UserError, match="1 labels for 2 runs"):
        compare_runs([record(), record(seed=1)], labels=["a"])
    with pytest.raises(UserError, match="runs differ in their tasks"):
        compare_runs([record(), record(tasks=ORDERS["alphabet"])])
    with pytest.raises(UserError, match="runs differ in their benchmark"):
        compare_runs([record(), record(seed=1, benchmark="coin_mini")])
    with pytest.raises(UserError, match="proglora_dynamic has seed 0 2 times"):
        compare_runs([record(), record()])
    assert "No finished run" in compare_runs([record(2)])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": None}, "field 'tasks' is missing"),
        ({"tasks": []}, "must be a list of at least one name"),
        ({"scoring": {}}, "must be an object with at least one mode"),
        ({"scoring": {"odd": []}}, "scoring.odd: unknown mode; use one of coin, clean"),
        ({"scoring": {"coin": [[101.0]]}}, r"scoring.coin\[0\]\[0\]=101.0: not a percentage"),
        ({"scoring": {"coin": [[1.0] * 9]}}, r"scoring.coin\[0\]: 9 accuracies for 8 tasks"),
        ({"scoring": {"coin": [[1.0]] * 9}}, "9 rows for 8 tasks"),
        ({"scoring": {"coin": "x"}}, "scoring.coin: must be a list of rows"),
        ({"gates": {"8": {}}}, "must be the number of a stage, 0 to 7"),
        ({"gates": {"0": {"Other": [1.0]}}}, "not one of the tasks"),
        ({"gates": {"0": {"GQA": []}}}, "must be a list of numbers"),
        ({"isolated": {"GQA": "x"}}, "isolated.GQA='x': not a percentage"),
        ({"baselines": {"ceiling": {"GQA": -1}}}, "baselines.ceiling.GQA=-1: not a percentage"),
    ],
)
def test_broken_results(tmp_path, changes, sentence):
    (tmp_path / "results.json").write_text(json.dumps({**record().to_json(), **changes}))
    with pytest.raises(UserError, match=sentence):
        load_run(tmp_path)


def test_missing_and_cut_off_results(tmp_path):
    with pytest.raises(UserError, match="results.json: no such file"):
        load_run(tmp_path)
    (tmp_path / "results.json").write_text('{"method": "lo')
    with pytest.raises(UserError, match="not valid JSON"):
        load_run(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, an object is needed"):
        load_run(tmp_path)


def test_unknown_comparison(tmp_path):
    with pytest.raises(UserError, match="against=paper: unknown; use none or published"):
        write_report(tmp_path, "paper")


def test_empty_slots_of_the_pool_are_not_shown():
    section = gate_section(record(3))
    assert section.tables[0].head == ("questions of", "1 ScienceQA", "2 TextVQA", "3 ImageNet")
    experts = gate_section(record(method="moelora"))
    assert experts.tables[0].head[1:] == tuple(f"expert {index}" for index in range(8))
    assert "column = expert" in experts.pictures[0].caption and "own" not in experts.pictures[0].caption


def test_experts_that_nobody_asked_are_shown_and_modules_belong_to_their_tasks():
    idle = {1: {task: [0.5, 0.5, 0.0, 0.0] for task in TASKS[:2]}}
    branches = gate_section(record(2, method="branchlora", gates=idle))
    assert branches.tables[0].head[1:] == ("branch 0", "branch 1", "branch 2", "branch 3")
    for method in ("sema", "pclr"):
        section = gate_section(record(2, method=method))
        assert section.tables[0].head[1:] == ("1 ScienceQA", "2 TextVQA") and "the task's own block" in section.pictures[0].caption


def test_heat_map_cells_are_where_they_belong():
    """The cell of a high accuracy is darker than that of a low one, and an absent one is almost white."""
    png = report_figures.accuracy_matrix(("a", "b"), [[100.0], [0.0, 50.0]], "t")
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)
    height, width = pixels.shape
    # Sampled right of the labels, off the numbers in the middle of a cell.
    left, right = int(width * 0.35), int(width * 0.95)
    upper, lower = int(height * 0.56), int(height * 0.88)
    assert pixels[upper, left] < pixels[lower, right] < pixels[lower, left]
    assert pixels[upper, right] > 240


def test_figures_are_reproducible():
    draw = lambda: report_figures.accuracy_curves(TASKS, {"coin": MATRIX}, "t")  # noqa: E731
    assert draw() == draw()


def test_number_forms():
    assert [number(value) for value in (None, -0.001, 56.395, -6.5888)] == ["–", "0.00", "56.40", "−6.59"]
    assert [difference(2.0, 1.0), difference(1.0, 1.0), difference(None, 1.0)] == ["+1.00", "0.00", "–"]
    assert [duration(value) for value in (None, 42, 187.4, 59.9, 7500)] == ["–", "42.0 s", "3 min 07 s", "59.9 s", "2 h 05 min"]


def test_pages_of_plain_sections():
    sections = [Section("s", notes=("n",), tables=(Table(("a", "b"), (("1", "2"),), words=True),), literal="x ``` y")]
    assert "````\nx ``` y\n````" in to_markdown("t", sections) and "| --- | --- |" in to_markdown("t", sections)
    assert '<table class="words">' in to_html("t", sections)


def test_rows_that_were_left_out_are_told_where_there_are_any(tmp_path):
    page, _, _ = written(record(), tmp_path)
    table = page[page.index("Training rows of the stage's own tasks") :].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")][:10]
    assert cells[0] == ["stage", "rows", "left out, unusable"], "no record was cut short, so nothing is said about that"
    assert cells[2] == ["1 ScienceQA", "1,200", "0"] and cells[7] == ["6 Grounding", "1,205", "2"]
    page, _, _ = written(record(data=()), tmp_path)
    assert "Training rows" not in page


def test_padding_is_told_where_it_was_counted(tmp_path):
    counted = {"positions": 900_000, "padded_positions": 1_000_000, "batches": {"672": 90, "1024": 1000}}
    asked = [{}, {"TextVQA": counted}, {"TextVQA": counted | {"positions": 1}}]
    run = record(3, data=[{"rows": 5}, {"rows": 5} | counted, None], prompts=asked)
    page, _, _ = written(run, tmp_path)
    assert load_run(tmp_path) == run
    line = r"\| +900,000 +\| +10.0 +\| +672: 90, 1024: 1,000 +\|"
    assert re.search(rf"Positions trained on, replayed rows included\n\n.*padding, %.*\n.*\n\| 2 TextVQA +{line}\n\n", page)
    assert re.search(r"Positions of the prompts\n\n.*\n.*\n\| TextVQA +\| +1 +\| +100.0 +\|", page), "as they were asked last"
    page, _, _ = written(record(), tmp_path)
    assert "Positions" not in page
