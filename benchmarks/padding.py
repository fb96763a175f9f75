"""How much of what training and prefill compute is padding: the default buckets against those before, by the order of the batches.

    python benchmarks/padding.py                a minute; numpy alone, no jax, no accelerator
    python benchmarks/padding.py --share 0.1    a look at a tenth of the records

CoIN's files were not at hand: its lengths are drawn, `tools check-data ROOT --model FOLDER` measures those of files that are there.

What is drawn. Known are the pieces of a record in LLaVA's template v1 with Vicuna's tokenizer: 35 tokens before the image (BOS, system
sentence, "USER: "), 576 positions of the image, 2 behind it, then the question, the instruction with its line break (11, once a record), 5
of " ASSISTANT:", the answer and its end; every later turn has 3 of "USER:", its question, 5, its answer and its end. Known too are CoIN's
numbers of records, and questions and images of its sources, hence the mean number of turns: GQA 943,000 questions of 72,140 images, VQAv2
443,757 of 82,783 (three an image at least), OCR-VQA 801,579 of 166,022, RefCOCO and RefCOCO+ 240,815 of 33,986, RefCOCOg 80,512 of 21,899;
the sizes of CoIN's files agree with all of a picture's questions in one record. ImageNet's question and its 100 names are known. Assumed
are the rest: means of questions by the datasets' words (6 to 9, at 1.1 tokens a word and one for the mark), answers of 1 to 6 tokens, boxes
of 24, ScienceQA's question, choices and hint of 105 tokens, 45 of OCR text in TextVQA, and how all of these and the turns scatter. Texts
that are a fifth shorter or a quarter longer are measured as well.

The embedded benchmark's records are tokenised as in a run. Results: benchmarks/results/padding.json, padding.md and padding.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from proglora_jax.data.padding import Padding, padding_by_length
from proglora_jax.data.plan import BUCKETS, GROUPINGS, PROMPT_LENGTHS, BatchPlan, plan_batches, row_buckets
from proglora_jax.data.rows import encode_rows
from proglora_jax.data.schema import TrainRow
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.data.tasks import TASKS, load_task
from proglora_jax.data.templates import get_template
from proglora_jax.data.tokens import Encoder, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEFORE, PROMPTS_BEFORE = ((704, 128), (1024, 512), (1536, 1024), (2048, 2048)), (704, 1024, 2048)
IMAGE, LONGEST, ROWS_ASKED, COMPILE_SECONDS = 576, 2048, 32, 36
START, BEHIND, INSTRUCTION, ROLE, LATER = 35, 2, 11, 5, 3
"""Tokens before the image and between it and the question, of the instruction, of " ASSISTANT:", of a later turn's "USER:"."""
ORDERS = {"modality_length": "CoIN's order", "bucket": "by bucket", "none": "plain shuffle"}
OTHERS = {
    "multiples of 64 (256, 640, 704, 768, 896, 1024, 1536, 2048)": (256, 640, 704, 768, 896, 1024, 1536, 2048),
    "without 672": tuple(top for top, _ in BUCKETS if top != 672), "every 64": tuple(range(64, LONGEST + 1, 64)),
}
"""Other sets of padded lengths, for comparison."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Training records of a task: i64[n] positions, i64[n] supervised tokens, bool[n] images; i64[m] positions of its prompts."""

    lengths: np.ndarray
    labels: np.ndarray
    has_image: np.ndarray
    prompts: np.ndarray


def main() -> None:
    """Draws, measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of CoIN's records to draw")
    arguments = parser.parse_args()
    coin = drawn_coin(arguments.share)
    found = {
        "buckets": {"before": BEFORE, "default": BUCKETS}, "share": arguments.share,
        "coin": {task: measured(records, batch_rows()[task]) for task, records in coin.items()},
        "texts": {f"{scale:g}": totals(drawn_coin(arguments.share / 4, scale), {"before": BEFORE, "default": BUCKETS})
                  for scale in (0.8, 1.0, 1.25)},
        "sets": totals(coin, {"before": BEFORE, "default": BUCKETS} | {name: widened(tops) for name, tops in OTHERS.items()}),
        "prompts": prompts(coin, {"before": PROMPTS_BEFORE, "default": PROMPT_LENGTHS}),
        "embedded": embedded(),
    }  # fmt: skip
    write(found, RESULTS)


# ----------------------------------------------------------------------------------------------------------------- lengths


def drawn_coin(share: float = 1.0, scale: float = 1.0, seed: int = 0) -> dict[str, Records]:
    """Records of CoIN's eight tasks as the module's docstring says.

    Args:
        share: how many, of as many as CoIN has.
        scale: factor on the tokens of questions, answers and hints (not on ImageNet's, which are known).
        seed: of the drawing.
    """
    draw = _Draw(np.random.default_rng(seed), scale)
    counts = {name: max(256, round(share * task.train_records)) for name, task in TASKS.items()}
    asked = {name: max(64, round(share * task.eval_questions)) for name, task in TASKS.items()}
    whole = {
        "TextVQA": draw.single(counts, asked, "TextVQA", 9, 2.5, 3, 2, extra=(45, 35)),
        "VizWiz": draw.single(counts, asked, "VizWiz", 8.5, 5, 2, 1.5),
        "GQA": draw.turns("GQA", counts, asked, lambda n: 1 + draw.rng.negative_binomial(6, 6 / 18.07, n), 10, 3, 1.4, 0.7),
        "VQAv2": draw.turns("VQAv2", counts, asked, lambda n: 3 + draw.rng.poisson(2.36, n), 8, 2.5, 1.8, 1),
        "OCRVQA": draw.turns("OCRVQA", counts, asked, lambda n: 3 + draw.rng.binomial(3, 0.61, n), 8, 2, 6, 7),
        "Grounding": draw.boxes(counts["Grounding"], asked["Grounding"]),
        "ScienceQA": draw.choices(counts["ScienceQA"], asked["ScienceQA"]),
    }
    # "What is the object in the image?" has 8 tokens; every name is followed by a point.
    answers = draw.rng.choice([2, 3, 4, 5, 6, 7], counts["ImageNet"], p=[0.1, 0.3, 0.3, 0.15, 0.1, 0.05]) + 2
    fixed = START + IMAGE + BEHIND + 8 + INSTRUCTION + ROLE
    whole["ImageNet"] = Records(fixed + answers, answers, np.ones(len(answers), bool), np.full(asked["ImageNet"], fixed))
    return {name: whole[name] for name in TASKS}


class _Draw:
    """Draws lengths of texts, and puts records together."""

    def __init__(self, rng: np.random.Generator, scale: float):
        self.rng, self.scale = rng, scale

    def words(self, mean: float, deviation: float, count: int, least: int = 1) -> np.ndarray:
        """i64[count] tokens of texts: gamma, rounded."""
        drawn = self.scale * self.rng.gamma((mean / deviation) ** 2, deviation**2 / mean, count)
        return np.maximum(least, np.rint(drawn)).astype(np.int64)

    def single(self, counts, asked, name, question, spread, answer, answer_spread, extra=(0, 1)) -> Records:
        """Records of one question; `extra` text has a mean and a deviation."""
        prompt = lambda n: (START + IMAGE + BEHIND + self.words(question, spread, n, 4) + INSTRUCTION + ROLE
                            + (self.words(*extra, n) if extra[0] else 0))
        answers = self.words(answer, answer_spread, counts[name]) + 1
        return Records(prompt(counts[name]) + answers, answers, np.ones(counts[name], bool), prompt(asked[name]))

    def turns(self, name, counts, asked, turns, question, spread, answer, answer_spread) -> Records:
        """Records of all questions about an image; `turns` draws how many."""
        count = counts[name]
        owner = np.repeat(np.arange(count), turns(count))
        questions, answers = self.words(question, spread, len(owner), 3), self.words(answer, answer_spread, len(owner)) + 1
        sums = lambda values: np.bincount(owner, values, count).astype(np.int64)
        lengths = START + IMAGE + BEHIND + INSTRUCTION - LATER + sums(LATER + questions + ROLE + answers)
        prompts = START + IMAGE + BEHIND + self.words(question, spread, asked[name], 3) + INSTRUCTION + ROLE
        return Records(np.minimum(lengths, LONGEST), np.minimum(sums(answers), LONGEST), np.ones(count, bool), prompts)

    def boxes(self, count: int, asked: int) -> Records:
        """Grounding: the instruction stands in every turn; a third of a record's expressions name one object, in RefCOCOg half."""
        long = self.rng.random(count) < 21_899 / 55_885
        turns = np.where(long, 2 * (1 + self.rng.poisson(0.84, count)), 3 * (1 + self.rng.poisson(1.37, count)))
        owner = np.repeat(np.arange(count), turns)
        words = np.where(long[owner], self.words(11, 5.5, len(owner)), self.words(5, 2.5, len(owner)))
        sums = lambda values: np.bincount(owner, values, count).astype(np.int64)
        lengths = START + IMAGE + BEHIND - LATER + sums(LATER + 16 + words + ROLE + 25)
        prompts = START + IMAGE + BEHIND + 16 + self.words(6, 3, asked) + ROLE
        return Records(np.minimum(lengths, LONGEST), np.minimum(25 * turns, LONGEST), np.ones(count, bool), prompts)

    def choices(self, count: int, asked: int) -> Records:
        """ScienceQA: some records and questions have an image, as many as CoIN's; the answer is a letter."""
        def prompt(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
            pictured = np.arange(n) < share * n
            text = np.where(pictured, self.words(105, 40, n, 30), self.words(95, 35, n, 30))
            return START + text + ROLE + np.where(pictured, IMAGE + BEHIND, 0), pictured

        lengths, pictured = prompt(count, 6_218 / 12_726)
        return Records(lengths + 2, np.full(count, 2), pictured, prompt(asked, 2_017 / 4_241)[0])


def batch_rows() -> dict[str, int]:
    """Rows of a step of each task in configs/coin.py."""
    spec = importlib.util.spec_from_file_location("coin_config", ROOT / "configs" / "coin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.make().train.batch_sizes)


# ----------------------------------------------------------------------------------------------------------------- padding


def widened(tops: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Padded lengths as buckets whose label slots bind nobody."""
    return tuple((top, LONGEST) for top in tops)


def planned(records: Records, rows: int, grouping: str, buckets, image: int = IMAGE, known: BatchPlan | None = None) -> BatchPlan:
    """The plan of an epoch; `known` is one of the same order with other buckets, whose rows are taken."""
    if known is None or grouping == "bucket":
        return plan_batches(records.lengths, records.labels, records.has_image, batch_size=rows, buckets=buckets, seed=0,
                            grouping=grouping, image_positions=image)
    place = row_buckets(records.lengths, records.labels, buckets)
    return dataclasses.replace(known, buckets=tuple(buckets), bucket=place[known.rows].max(axis=1).astype(np.int32))


def parts(plan: BatchPlan, records: Records) -> dict[str, Padding]:
    """Padding of all batches ("all"), of those with images ("images"), and if each were as long as its longest row ("least")."""
    tops, kinds = np.asarray([plan.buckets[place][0] for place in plan.bucket]), records.has_image[plan.rows].any(axis=1)
    made = lambda chosen, lengths: Padding.of(plan.positions[chosen].sum(), lengths[chosen], plan.batch_size)
    every = np.ones(len(plan), bool)
    return {"all": plan.padding(), "images": made(kinds, tops), "least": made(every, records.lengths[plan.rows].max(axis=1))}


def measured(records: Records, rows: int) -> dict:
    """What is padding in a task's batches, in percent, by order and buckets."""
    result: dict = {"records": len(records.lengths), "rows": rows, "mean": float(records.lengths.mean()),
                    "longest": int(records.lengths.max())}
    for grouping in GROUPINGS:
        known = None
        for name, buckets in (("before", BEFORE), ("default", BUCKETS)):
            known = planned(records, rows, grouping, buckets, known=known)
            found = parts(known, records)
            result[f"{grouping} {name}"] = {part: 100 * padding.share for part, padding in found.items()} | {
                "batches": found["all"].to_json()["batches"]}
    return result


def totals(coin: Mapping[str, Records], sets: Mapping[str, Sequence]) -> dict:
    """Percent of padding over all tasks by set of buckets and order, and how many shapes all of them together use."""
    sizes, result = batch_rows(), {name: {} for name in sets}
    for grouping in ("modality_length", "bucket"):
        sums: dict[str, dict[str, Padding]] = {name: {} for name in sets}
        for task, records in coin.items():
            known = None
            for name, buckets in sets.items():
                known = planned(records, sizes[task], grouping, buckets, known=known)
                for part, padding in parts(known, records).items():
                    sums[name][part] = sums[name].get(part, Padding()) + padding
        for name, found in sums.items():
            shapes, rows = found["all"].batches, sum(len(records.lengths) for records in coin.values())
            result[name][grouping] = {part: 100 * padding.share for part, padding in found.items()} | {
                "shapes": len(shapes), "mean_padded": found["all"].padded_positions / rows}
    return result


def prompts(coin: Mapping[str, Records], sets: Mapping[str, Sequence[int]]) -> dict:
    """Percent of padding in the prompts of each task, which are asked short ones first, and of all as often as a run asks them."""
    result = {}
    for name, tops in sets.items():
        found = {task: padding_by_length(records.prompts, tops, ROWS_ASKED) for task, records in coin.items()}
        times = {task: len(coin) - place for place, task in enumerate(coin)}
        total = sum((padding for task, padding in found.items() for _ in range(times[task])), Padding())
        result[name] = {task: 100 * padding.share for task, padding in found.items()} | {
            "all": 100 * total.share, "shapes": len(total.batches)}
    return result


def embedded() -> dict:
    """The embedded benchmark's records by task, in the buckets of configs/coin_mini.py against a single one."""
    folder = ROOT / "proglora_jax" / "assets" / "coin_mini_base"
    vision = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    encoder = Encoder(load_tokenizer(str(folder)), get_template("vicuna_v1_bare"), patches, 92)
    own, result = ((80, 8), (92, 24)), {}
    with tempfile.TemporaryDirectory() as root:
        write_benchmark(root, 0, 320, 8)
        for name in TASKS:
            rows = [TrainRow(example, 0, index) for index, example in enumerate(load_task(root, name).train)]
            encoded = encode_rows(rows, encoder)
            records = Records(encoded.lengths, encoded.labels, encoded.has_image, np.zeros(0, np.int64))
            result[name] = {"mean": float(encoded.lengths.mean()), "longest": int(encoded.lengths.max())} | {
                f"{grouping} {label}": 100 * planned(records, 32, grouping, buckets, patches).padding().share
                for grouping in GROUPINGS for label, buckets in (("one", own[1:]), ("own", own))}
    return result


# ----------------------------------------------------------------------------------------------------------------- results


def write(found: Mapping, folder: Path) -> None:
    """Writes the numbers, the tables and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "padding.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "padding.md").write_text("\n".join(text(found)) + "\n", encoding="utf-8")
    (folder / "padding.png").write_bytes(figure(found["coin"]))


def text(found: Mapping) -> list[str]:
    """The lines of padding.md."""
    shown = lambda values: ", ".join(map(str, values))
    of_orders = lambda *what: [f"{order}: {one}" for order in ORDERS.values() for one in what]
    lines = [
        "# Padding", "",
        "`python benchmarks/padding.py`. **CoIN's files were not at hand**: the lengths of its records are drawn, from what is known of",
        "them and from assumptions about the rest (the benchmark's docstring says which is which). `tools check-data ROOT --model FOLDER`",
        "measures real files.", "",
        f"Padded lengths of training: {shown(top for top, _ in BUCKETS)}; before: {shown(top for top, _ in BEFORE)}. Batches have the",
        "rows of `configs/coin.py`. CoIN's order (`grouping=modality_length`) shuffles rows of all lengths into a batch, and all rows of a",
        "batch are as long as its longest: what stands under \"longest row\" no buckets can save, only rows of like length in a batch",
        "(`grouping=bucket`).", "", "![Padding](padding.png)", "", "## Training, share of padding in percent, CoIN (drawn)", "",
    ]
    columns = [(grouping, name, part) for grouping in ORDERS
               for name, part in (("before", "all"), ("default", "all"), ("default", "least"))]
    lines += table(("task", "records", "mean positions", "rows a batch", *of_orders("before", "default", "longest row")), [
        (task, f"{row['records']:,}", f"{row['mean']:.0f}", row["rows"],
         *(row[f"{grouping} {name}"][part] for grouping, name, part in columns)) for task, row in found["coin"].items()])
    lines += ["Batches by padded length in CoIN's order: " + "; ".join(
        f"{task} " + ", ".join(f"{top}: {count}" for top, count in row["modality_length default"]["batches"].items())
        for task, row in found["coin"].items()) + ".", "", "## Sets of padded lengths, all tasks", "",
        f"Each shape that is used costs a compile, {COMPILE_SECONDS} s at 7B on a GPU the first time. In the first two sets a batch's labels "
        "count as well; in the others lengths alone, so that these are at their best.", ""]
    pairs = [(name, row["modality_length"], row["bucket"]) for name, row in found["sets"].items()]
    lines += table(("padded lengths", "CoIN's order: padding", "shapes used", "by bucket: padding", "with images", "shapes used"), [
        *((name, own["all"], own["shapes"], near["all"], near["images"], near["shapes"]) for name, own, near in pairs),
        ("each batch as long as its longest row", pairs[1][1]["least"], "", pairs[1][2]["least"], "", "")])
    before, now = (own["mean_padded"] for _, own, _ in pairs[:2])
    more = pairs[1][1]["shapes"] - pairs[0][1]["shapes"]
    lines += [f"In CoIN's order a row is padded to {now:.0f} positions on average, {before:.0f} before: {100 * (1 - now / before):.0f} % "
              f"less to compute, for {more} more compiles ({more * COMPILE_SECONDS} s).", ""]
    lines += table(("length of texts, by that above", "CoIN's order: before", "default", "by bucket: before", "default"), [
        (scale, *(row[name][grouping]["all"] for grouping in ("modality_length", "bucket") for name in ("before", "default")))
        for scale, row in found["texts"].items()])
    lines += ["## Prompts, share of padding in percent, CoIN (drawn)", "",
              f"Padded to {shown(PROMPT_LENGTHS)}; before to {shown(PROMPTS_BEFORE)}. Batches of {ROWS_ASKED}, short prompts first.",
              "All: as often as a sequence of eight stages asks them.", ""]
    lines += table(("", *TASKS, "all", "shapes used"), [
        (name, *(row[task] for task in (*TASKS, "all")), row["shapes"]) for name, row in found["prompts"].items()])
    lines += ["## The embedded benchmark, share of padding in percent, measured", "",
              "320 records a task in batches of 32: one bucket of 92 positions, and the buckets 80 and 92 of `configs/coin_mini.py`.", ""]
    return (lines + table(("task", "mean positions", "longest", *of_orders("one", "own")), [
        (task, row["mean"], row["longest"], *(row[f"{grouping} {label}"] for grouping in ORDERS for label in ("one", "own")))
        for task, row in found["embedded"].items()]))[:-1]


def table(head: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    """Lines of a table, and an empty one; numbers that are not whole with one decimal."""
    cell = lambda value: f"{value:.1f}" if isinstance(value, float) else str(value)
    return [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def figure(coin: Mapping) -> bytes:
    """Padding by task, before and now, in CoIN's order and by bucket, as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    places = np.arange(len(coin))
    for panel, grouping in zip(drawn.subplots(1, 2, sharey=True), ("modality_length", "bucket")):
        for shift, name, colour in ((-0.2, "before", "#b9c4d0"), (0.2, "default", "#2f6fb0")):
            heights = [row[f"{grouping} {name}"]["all"] for row in coin.values()]
            panel.bar(places + shift, heights, 0.38, color=colour, label=name)
        least = [row[f"{grouping} default"]["least"] for row in coin.values()]
        panel.scatter(places + 0.2, least, marker="_", s=220, color="#10243a", label="each batch as long as its longest row", zorder=3)
        panel.set_title(f"{ORDERS[grouping]} (grouping={grouping})", fontsize=11, loc="left")
        panel.set_xticks(places, coin, rotation=35, ha="right")
        panel.grid(axis="y", color="#dfe3e8", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("padding, %")
    drawn.axes[1].legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)
    main()
