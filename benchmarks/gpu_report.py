"""The GPU benchmark's results: JSON, tables, ratios against the goals, and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases import Sizes

Row = dict[str, Any]
# Goal -> (what, at least, target, stretch); where smaller is better "must" is an upper bound. See the roofline in the text.
GOALS = (
    ("MFU, r 16, N 8, largest over batches", "at least", 0.45, 0.50, 0.55),
    ("step N 8 / N 1, r 16", "at most", 1.08, 1.05, 1.045),
    ("step N 8 / N 1, r 128, layers in a loop", "at most", 1.45, 1.35, 1.30),
    ("loop over blocks / fused, N 8, layers in a loop", "at least", 1.5, 2.0, 3.0),
    ("samples/s by PEFT's with checkpointing, N 8", "at least", 1.5, 1.8, 2.2),
    ("samples/s by PEFT's best setting, N 8", "at least", 1.1, 1.3, 1.5),
    ("samples/s by PEFT's best setting, N 1", "at least", 1.1, 1.3, 1.5),
    ("answers/s, at most 10 new tokens", "at least", 40, 55, 65),
    ("answers/s by generate's, batch 1", "at least", 6, 10, 15),
    ("answers/s by generate's, best batch", "at least", 1.1, 1.3, 1.5),
    ("memory of a step of 16 rows, GB", "at most", 64, 58, 54),
    ("compile, cold, s", "at most", 180, 90, 45),
    ("compile, from the cache, s", "at most", 20, 10, 5),
)


def write(rows: list[Row], sizes: Sizes, folder: Path, seconds: float, *, figure: bool) -> None:
    """Writes gpu.json and gpu.md, and gpu.png where asked for.

    Args:
        rows: results with the fields of their case under "fields".
        sizes: that were measured.
        folder: for the files.
        seconds: that it took so far.
        figure: whether to draw.
    """
    found = ratios(rows)
    content = {"tiny": sizes.tiny, "seconds": seconds, "versions": versions(), "goals": found, "rows": rows}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    drawn = figure and any("samples_per_s" in row for row in rows)
    (folder / "gpu.md").write_text("\n".join(_text(rows, sizes, found, seconds, drawn)) + "\n", encoding="utf-8")
    if drawn:
        (folder / "gpu.png").write_bytes(_figure(rows))


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    import importlib.metadata

    known = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers", "peft"):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = "missing"
    return known


def ratios(rows: list[Row]) -> dict[str, float | None]:
    """{goal: what was measured}; None where a row that it needs is missing."""
    here = [row for row in rows if "error" not in row]

    def pick(side: str, what: str, **fields: Any) -> list[Row]:
        return [row for row in here if all(row["fields"][key] == value for key, value in ({"side": side, "what": what} | fields).items())]

    plain = {"pool": "fused", "attention": "auto", "remat": "qkvo_mlp", "dropout": 0.0, "unroll": 0}
    # By their sizes, so that the same lines serve the tiny ones: the middle length, the small rank, the larger number of blocks.
    many = max((row["fields"]["blocks"] for row in rows), default=0)
    lengths = sorted({row["fields"]["positions"] for row in rows if row["fields"]["what"] == "train"})
    ranks = sorted({row["fields"]["rank"] for row in rows})
    middle = lengths[len(lengths) // 2] if lengths else 0
    small, large = (ranks[0], ranks[-1]) if len(ranks) > 1 else (ranks[0] if ranks else 0, -1)
    pool = [row for row in pick("ours", "train", blocks=many, rank=small, **plain) if row["fields"]["positions"] == middle]
    loop = pick("ours", "train", pool="loop")
    answers, theirs = pick("ours", "answer"), pick("peers", "answer")
    checked, free = (pick("peers", "train", blocks=many, remat=remat, compiled=False) for remat in ("full", "none"))
    one, peers_one = pick("ours", "train", blocks=1, rank=small, **plain), pick("peers", "train", blocks=1, compiled=False)
    main = [row for row in pool if one and row["fields"]["rows"] == one[0]["fields"]["rows"]]
    in_loop = plain | {"unroll": 1}  # over layers: to compile every block of every layer would take too long
    looped = [row for row in pick("ours", "train", rank=small, **in_loop) if loop and row["fields"]["rows"] == loop[0]["fields"]["rows"]]
    values = (
        max((row["mfu"] for row in pool if "mfu" in row), default=None),
        _by(main, one, "ms"), _by(*(pick("ours", "train", blocks=blocks, rank=large, **in_loop) for blocks in (many, 1)), "ms"),
        _by(loop, looped, "ms"), _by(pool, checked), _by(pool, checked + free), _by(one, peers_one), _best(answers),
        _by(answers, [row for row in theirs if row["fields"]["rows"] == 1]),
        _by(answers, [row for row in theirs if row["fields"]["rows"] > 1]),
        main[0]["planned_bytes"] / 1e9 if main and "planned_bytes" in main[0] else None,
        *(main[0].get(field) if main else None for field in ("compile_s", "compile_cached_s")),
    )  # fmt: skip
    return {goal[0]: value for goal, value in zip(GOALS, values, strict=True)}


def _best(rows: list[Row]) -> float | None:
    return max((row["samples_per_s"] for row in rows), default=None)


def _by(above: list[Row], below: list[Row], key: str = "samples_per_s") -> float | None:
    """Ratio of the best samples a second, or of the milliseconds of the only rows."""
    if not above or not below:
        return None
    choose: Callable = (lambda rows: _best(rows)) if key == "samples_per_s" else (lambda rows: rows[0][key])
    return choose(above) / choose(below)


# ------------------------------------------------------------------------------------------------------------------- text


def _text(rows: list[Row], sizes: Sizes, found: dict, seconds: float, drawn: bool) -> list[str]:
    devices = sorted({f"{row['device']}" for row in rows if "device" in row})
    text, known = sizes.config.text_config, ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["# Training and answering on one GPU, against transformers and PEFT", ""]
    if sizes.tiny:
        lines += ["**Tiny sizes: this shows that the benchmark runs. No number below means anything.**", ""]
    lines += [
        f"`python benchmarks/gpu.py{' --tiny' if sizes.tiny else ''}`; {', '.join(devices) or 'no device answered'}; {seconds:.0f} s in all; "
        f"{known}.", "",
        f"A LLaVA of {text.num_hidden_layers} layers of width {text.hidden_size} with random weights in {sizes.dtype}, random words and "
        f"images, {sizes.labels} supervised tokens a row, all seven linears adapted, projector trained, AdamW; answers of "
        f"{sizes.new_tokens} new tokens. N 1 is plain LoRA; N 8 is ProgLoRA (dynamic) here and a loop over eight active adapters in PEFT, "
        "which has no gates and grows its batch until one does not fit or gains less than 2%; torch.compile is of its decoder's layers. An "
        "answer's time is that of the program; a run reads images and writes answers beside it, a batch behind. MFU credits 4 operations per parameter and token, causal attention, and the head at the supervised "
        "positions; nothing of the adapters, the vision tower, the projector, or what is computed again. Milliseconds are medians of up to "
        f"{sizes.rounds} turns of {sizes.steps} steps, of 1 where it takes over a second (lowest-highest). Planned memory is the compiler's for the program; the peak is the "
        "allocator's, of a process so far.", "",
    ]
    lines += [] if not drawn else ["![Samples a second](gpu.png)", ""]
    lines += [] if sizes.tiny else ["What the profiles say, before and after: [gpu_notes.md](gpu_notes.md).", ""]
    lines += ["## Goals (set for 7B on one H100)", "", "| | | must | target | stretch | measured |", "|---|---|---:|---:|---:|---:|"]
    for name, kind, *wanted in GOALS:
        lines.append(f"| {name} | {kind} | {' | '.join(f'{value:g}' for value in wanted)} | {_number(found[name], '.3g')} |")
    for what, title in (("train", "Training"), ("answer", "Answering")):
        own = [row for row in rows if row["fields"]["what"] == what]
        if own:
            lines += ["", f"## {title}", "", *_table(own, what)]
    for row in rows:
        if "costliest_error" in row:
            lines += ["", f"No profile of {row['case']}: {row['costliest_error']}"]
        if row.get("costliest"):
            lines += ["", f"## Costliest kernels: {row['case']}", "", "| kernel | operation | ms a step | share | calls a step |",
                      "|---|---|---:|---:|---:|"]
            lines += [f"| `{one['kernel']}` | {one['operation']} | {one['ms']:.3g} | {one['share']:.1%} | {one['calls']:.0f} |"
                      for one in row["costliest"]]
    return lines


def _table(rows: list[Row], what: str) -> list[str]:
    columns = [("ms", "ms", ".1f"), ("samples_per_s", "samples/s", ".2f")]
    columns += [("tokens_per_s", "tokens/s", ".0f"), ("mfu", "MFU", ".1%")] if what == "train" else []
    columns += [("planned_bytes", "planned GB", ".2f"), ("peak_bytes", "peak GB", ".2f"), ("compile_s", "compile s", ".1f")]
    lines = ["| case | attention | " + " | ".join(title for _, title, _ in columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['error'].replace('|', '/')} |" + " |" * len(columns))
            continue
        cells = [_cell(row, key, form) for key, _, form in columns]
        lines.append(f"| {row['case']} | {row['attention']} | {' | '.join(cells)} |")
    return lines


def _cell(row: Row, key: str, form: str) -> str:
    if key == "ms":
        return f"{row['ms']:.1f} ({row['ms_lowest']:.1f}-{row['ms_highest']:.1f})"
    value = row.get(key)
    return _number(value / 1e9 if value is not None and key.endswith("bytes") else value, form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _figure(rows: list[Row]) -> bytes:
    """Samples a second of every case that ran, a panel for training and one for answering, as PNG."""
    from shared import OURS, THEIRS, Bar, bars

    bar = lambda row: Bar(row["case"].split(" ", 2)[2], row["samples_per_s"], colour=OURS if row["fields"]["side"] == "ours" else THEIRS)
    return bars({f"{title}, samples a second (blue: ours, orange: transformers and PEFT)": [
        bar(row) for row in rows if row["fields"]["what"] == what and "samples_per_s" in row]
        for what, title in (("train", "Training"), ("answer", "Answering"))})
