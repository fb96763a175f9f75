"""The figures of a report as PNG bytes: accuracy matrix, accuracy over stages, mean gates."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from proglora_jax.evaluation.sequence import mean_so_far

_INK = "#1b1f24"
_GREY = "#66707b"
_EMPTY = "#f7f8f9"
_HEAT = "Blues"
_LINES = {"coin": ("#0b5394", "-"), "clean": ("#c2570c", "--")}
_DPI = 130
_CELL_WIDTH, _CELL_HEIGHT = 1.0, 0.52  # inches

Cells = Sequence[Sequence[float | None]]


def accuracy_matrix(tasks: Sequence[str], accuracy: Cells, title: str) -> bytes:
    """Heat map of an accuracy matrix.

    Args:
        tasks: names, in training order.
        accuracy: [stages][tasks] percent; None where not scored.
        title: title of the figure.

    Returns:
        PNG bytes; rows are stages, columns tasks, the cell of the task just trained is outlined.
    """
    cells = [[*row, *[None] * (len(tasks) - len(row))] for row in accuracy]
    rows = [f"{stage + 1}  {tasks[stage]}" for stage in range(len(accuracy))]
    outlined = [(stage, stage) for stage in range(len(accuracy))]
    return _heat_map(cells, rows, tasks, title, "after training on", "accuracy (%) on", 100.0, "{:.1f}", outlined)


def mean_gates(
    gates: Mapping[str, Sequence[float]], columns: Sequence[str], own: Sequence[tuple[int, int]], title: str, unit: str = "block"
) -> bytes:
    """Heat map of the mean gate per evaluated task and block.

    Args:
        gates: task -> mean gate of each block; rows in this order.
        columns: label of each block.
        own: (row, column) of each task's own block, outlined.
        title: title of the figure.
        unit: what a column is.

    Returns:
        PNG bytes.
    """
    cells = [[*values, *[None] * (len(columns) - len(values))] for values in gates.values()]
    top = max(1.0, *(value for row in cells for value in row if value is not None))
    return _heat_map(cells, list(gates), columns, title, "questions of", unit, top, "{:.2f}", own)


def accuracy_curves(tasks: Sequence[str], scoring: Mapping[str, Cells], title: str) -> bytes:
    """Small multiples: the mean over the tasks so far, then the accuracy of each task, over the stages.

    Args:
        tasks: names, in training order.
        scoring: mode -> accuracy matrix, percent.
        title: title of the figure.

    Returns:
        PNG bytes.
    """
    columns = 3
    lines = math.ceil((len(tasks) + 1) / columns)
    figure = Figure(figsize=(10.0, 2.25 * lines + 1.0), dpi=_DPI, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(tasks) + 1 :]:
        panel.set_axis_off()
    for order, (mode, accuracy) in enumerate(scoring.items()):
        means = mean_so_far(accuracy)
        _curve(panels[0], mode, list(range(1, len(means) + 1)), means, labelled=order == 0)
        for index in range(len(tasks)):
            points = [(stage + 1, row[index]) for stage, row in enumerate(accuracy) if index < len(row) and row[index] is not None]
            _curve(panels[index + 1], mode, [stage for stage, _ in points], [value for _, value in points], labelled=order == 0)
    for index, panel in enumerate(panels[: len(tasks) + 1]):
        name, weight = ("Mean of the tasks so far", "bold") if index == 0 else (_literal(tasks[index - 1]), "normal")
        panel.set_title(name, fontsize=12, color=_INK, loc="left", fontweight=weight)
        _style_panel(panel, len(tasks), marked=index == 0)
        # The last panel of a column carries the stage numbers, also where the grid below it is empty.
        panel.tick_params(labelbottom=index + columns > len(tasks))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=13, color=_INK, x=0.01, ha="left")
    figure.supxlabel("stages finished", fontsize=12, color=_INK)
    figure.supylabel("accuracy (%)", fontsize=12, color=_INK)
    return png(figure)


def _curve(panel: Axes, mode: str, stages: Sequence[int], values: Sequence[float], labelled: bool) -> None:
    """One line; a labelled one carries its last value to the right of its end."""
    if not values:
        return
    colour, style = _LINES.get(mode, (_GREY, ":"))
    # The labelled line is drawn last, so that it stays visible where the scoring modes agree.
    panel.plot(stages, values, style, color=colour, marker="o", markersize=4, linewidth=2, label=f"{mode} scoring", clip_on=False,
               zorder=4 if labelled else 3)  # fmt: skip
    if labelled:
        panel.annotate(f"{values[-1]:.1f}", (stages[-1], values[-1]), (7, 0), textcoords="offset points", va="center", fontsize=11,
                       color=colour)  # fmt: skip


def _style_panel(panel: Axes, stages: int, marked: bool) -> None:
    # Room on the right for the label of the last value.
    panel.set_xlim(0.6, stages + 0.2 + 0.16 * stages)
    panel.set_ylim(0, 100)
    panel.set_xticks(range(1, stages + 1))
    panel.set_yticks(range(0, 101, 25))
    panel.tick_params(labelsize=10, colors=_INK, length=0)
    panel.grid(axis="y", color="#dfe3e8", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color("#9aa4af")
    if marked:
        panel.set_facecolor("#f1f4f8")


def _heat_map(
    cells: Cells,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_title: str,
    column_title: str,
    top: float,
    form: str,
    outlined: Sequence[tuple[int, int]],
) -> bytes:
    """A table of numbers whose cells are coloured from 0 to `top`; absent cells are grey and blank."""
    width = 2.6 + max(_CELL_WIDTH * len(columns), 3.0)
    figure = Figure(figsize=(width, 1.5 + _CELL_HEIGHT * max(len(rows), 1)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    colours = colormaps[_HEAT]
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if value is None:
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_EMPTY, edgecolor="white", linewidth=2))
                continue
            # Only the lighter part of the map is used, so that one dark ink is readable on every cell.
            shade = colours(0.02 + 0.6 * min(max(value / top, 0.0), 1.0))
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=12, color=_INK)
    for row, column in outlined:
        if row < len(cells) and column < len(cells[row]) and cells[row][column] is not None:
            axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=_INK, linewidth=1.6))
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), map(_literal, columns), fontsize=11)
    axes.set_yticks(range(len(rows)), map(_literal, rows), fontsize=11)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, colors=_INK)
    axes.set_xlabel(column_title, fontsize=12, color=_GREY, labelpad=8)
    # The rows' title stands above their labels, as in a table: a turned one would not fit beside few rows.
    axes.annotate(row_title, (0, 1), (-4, 5), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=12, color=_GREY)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=13, color=_INK, x=0.01, ha="left")
    return png(figure)


def _literal(text: str) -> str:
    """Text that matplotlib shows as it stands (a pair of dollars would start a formula)."""
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes, without the program's version in them."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
