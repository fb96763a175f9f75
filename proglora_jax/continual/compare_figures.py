"""The figures of a comparison as PNG bytes: mean accuracy of the tasks so far by method, and the pictures of examples side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from proglora_jax.continual.report_figures import png
from proglora_jax.evaluation.sequence import mean, standard_deviation

_INK, _GREY, _RULE, _DPI = "#1b1f24", "#66707b", "#dfe3e8", 130
# Seven hues that stay apart for most colour-blind eyes, each once solid and once dashed; markers tell them apart in print.
_HUES = ("#0b5394", "#d1495b", "#2a9d55", "#e08e0b", "#7b4fa3", "#0f9bb3", "#6b4c2f")
_DASHES, _MARKERS = ("-", (0, (4, 1.6))), ("o", "s", "^", "D", "v", "P", "X")
_TILE, _GAP, _HEAD = 224, 24, 26  # pixels


def step_curves(curves: Mapping[str, Sequence[Sequence[float]]], levels: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str],
                title: str) -> bytes:
    """Mean accuracy of the tasks so far against the stage, with bands of one standard deviation over seeds.

    Args:
        curves: method -> per seed the means after each stage, percent.
        levels: as `curves`, for methods without a sequence (zero-shot, multi-task): means over the same tasks, drawn dotted.
        tasks: names in training order.
        title: title of the figure.

    Returns:
        PNG bytes; the legend names the methods in the order of their last values, which it shows.
    """
    figure = Figure(figsize=(11.5, 6.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    names, lines = [*curves, *levels], []
    for order, name in enumerate(names):
        runs = curves[name] if name in curves else levels[name]
        centre = [mean(values) for values in zip(*runs)]
        spread = [standard_deviation(values) or 0.0 for values in zip(*runs)]
        stages, style = range(1, len(centre) + 1), line_style(order) | ({"linestyle": (0, (1, 1.8))} if name in levels else {})
        axes.fill_between(stages, [c - s for c, s in zip(centre, spread)], [c + s for c, s in zip(centre, spread)], linewidth=0, alpha=0.1,
                          color=style["color"])  # fmt: skip
        line, = axes.plot(stages, centre, **style)
        lines.append((centre[-1], name, line))
    lines.sort(key=lambda entry: -entry[0])
    figure.legend([line for *_, line in lines], [f"{value:5.1f}  {_literal(name)}" for value, name, _ in lines], loc="outside right center",
                  frameon=False, fontsize=11, title="after the last stage", title_fontsize=11, handlelength=3.4,
                  labelspacing=0.75)  # fmt: skip
    axes.set_xlim(0.8, len(tasks) + 0.2)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(1, len(tasks) + 1), [f"{stage}\n{_literal(task)}" for stage, task in enumerate(tasks, 1)], fontsize=10)
    axes.tick_params(length=0, colors=_INK, labelsize=10)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("stages finished, and the task that was trained", fontsize=11, color=_GREY)
    axes.set_ylabel("mean accuracy of the tasks so far (%)", fontsize=11, color=_GREY)
    figure.suptitle(title, fontsize=13, color=_INK, x=0.01, ha="left")
    return png(figure)


def line_style(order: int) -> dict[str, object]:
    """How the line of the method with this place is drawn; 14 of them can be told apart, in print too."""
    dashes = _DASHES[order // len(_HUES) % 2]
    marker = _MARKERS[order % len(_MARKERS)]
    return {"color": _HUES[order % len(_HUES)], "linestyle": dashes, "marker": marker, "markersize": 5.5, "linewidth": 1.9}


def pictures_in_a_row(paths: Sequence[str | None], letters: Sequence[str]) -> bytes:
    """The pictures of examples side by side, each under its letter, as PNG bytes; an empty frame where a question has none.

    A file that cannot be read gives an empty frame too: the answers beside it are worth showing all the same.
    """
    width = len(paths) * _TILE + (len(paths) - 1) * _GAP
    sheet = Image.new("RGB", (width, _TILE + _HEAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    for index, (path, letter) in enumerate(zip(paths, letters, strict=True)):
        left = index * (_TILE + _GAP)
        pen.text((left, 1), letter, fill=_INK, font=font)
        picture = _tile(path)
        if picture is None:
            pen.rectangle((left, _HEAD, left + _TILE - 1, _HEAD + _TILE - 1), outline=_RULE, width=2)
            said = "no picture" if path is None else "picture not found"
            pen.text((left + _TILE / 2, _HEAD + _TILE / 2), said, fill=_GREY, font=font, anchor="mm")
        else:
            sheet.paste(picture, (left + (_TILE - picture.width) // 2, _HEAD + (_TILE - picture.height) // 2))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _tile(path: str | None) -> Image.Image | None:
    """A picture scaled to fit a tile; small ones are enlarged, pixel by pixel where they are very small."""
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _literal(text: str) -> str:
    """Text that matplotlib shows as it stands."""
    return text.replace("$", r"\$")
