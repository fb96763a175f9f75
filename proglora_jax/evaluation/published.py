"""Published results on CoIN as data: accuracy matrices, rows and ablations of the papers, in percent, as printed.

Sources: P1 = ProgLoRA (Findings of ACL 2025), P2 = Lightweight ProgLoRA, P3 = BranchLoRA (arXiv 2506.02041), P4 = PCLR (ICLR 2026).
The rows of LoRA, MoELoRA, zero-shot and multi-task were scored by CoIN on random subsets of 4,000 questions that are not published.
`doubts` names printed numbers that do not follow from the printed matrix or rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

COIN_ORDER = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCR-VQA")
ALPHABETICAL_ORDER = ("GQA", "Grounding", "ImageNet", "OCR-VQA", "ScienceQA", "TextVQA", "VizWiz", "VQAv2")

LLAVA_7B = "LLaVA-1.5-7B"
LLAVA_13B = "LLaVA-1.5-13B"
QWEN = "Qwen-VL"

SOURCES = {"P1": "ProgLoRA", "P2": "Lightweight ProgLoRA", "P3": "BranchLoRA", "P4": "PCLR"}


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One line of a results table.

    Attributes:
        method: name of the method in our configs.
        source: paper, a key of SOURCES.
        right_after: accuracy on each task right after training on it, in `order`; for zero-shot and multi-task the only row.
        final: accuracy on each task after the last stage.
        acc: ACC (P1) or MFN (P2).
        maa: MAA.
        bwt: BWT.
        fwt: FWT.
        variant: what differs from the paper's main setting; empty for the main row.
        backbone: model.
        order: tasks.
        new_acc: New.ACC (P4).
        forgetting: Forgetting (P4).
        doubts: metric -> why its printed value does not follow from the rows.
    """

    method: str
    source: str
    right_after: tuple[float, ...] | None = None
    final: tuple[float, ...] | None = None
    acc: float | None = None
    maa: float | None = None
    bwt: float | None = None
    fwt: float | None = None
    variant: str = ""
    backbone: str = LLAVA_7B
    order: tuple[str, ...] = COIN_ORDER
    new_acc: float | None = None
    forgetting: float | None = None
    doubts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name in configs and reports: method, variant, and the model where it is not LLaVA-1.5-7B."""
        model = {LLAVA_7B: "", LLAVA_13B: "13b", QWEN: "qwen"}[self.backbone]
        words = "".join(letter if letter.isalnum() else " " for letter in self.variant.lower()).split()
        return "_".join([self.method, *words, *filter(None, [model])])


def _rows(text: str) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, line.split())) for line in text.strip().splitlines())


# method -> accuracy matrix: row = stage, column = task in COIN_ORDER. P1 Tables 6, 7, 8 and P2 Table 4; LLaVA-1.5-7B.
MATRICES: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "moelora": _rows("""
        75.78
        31.40 51.73
        40.98 13.15 96.70
        37.42 35.53  6.62 59.42
        47.15 41.69  5.53 45.27 58.88
        59.06 13.97  0.25 32.62 30.40 37.50
        33.27 50.48  8.15 51.75 28.52  0.97 64.22
        63.09 38.63 10.50 37.38 43.62  0.59 43.15 60.08"""),
    "proglora_static": _rows("""
        76.27
        75.72 60.07
        74.95 58.56 92.65
        74.60 56.08 88.86 58.45
        75.58 57.38 89.67 54.66 57.33
        74.53 56.66 90.20 54.67 56.01 17.68
        73.58 57.02 92.24 52.45 56.43 13.28 64.45
        72.70 57.08 91.20 53.12 56.04 12.54 63.64 63.54"""),
    "proglora_dynamic": _rows("""
        76.27
        59.06 60.78
        70.92 52.57 97.32
        51.56 50.33 79.68 61.27
        65.62 50.79 81.17 48.99 60.16
        40.08 47.53 77.75 50.61 48.30 39.35
        76.90 56.79 73.90 53.64 40.63 35.96 65.83
        74.84 51.83 83.90 49.93 53.87 31.19 62.71 64.44"""),
    # The entry [1][1] prints 57.34 in the matrix and 57.54 in P2's Table 1; only 57.54 fits the printed metrics.
    "proglora_light": _rows("""
        74.32
        58.48 57.54
        69.13 53.09 97.01
        50.11 50.02 80.37 60.98
        67.63 50.11 80.09 47.96 58.90
        40.12 45.98 75.37 49.25 49.36 35.43
        72.90 54.89 72.91 51.37 38.98 33.69 64.98
        71.98 45.37 79.73 48.94 50.89 29.82 61.99 62.46"""),
}


def _row(method: str, source: str, right_after: str, final: str, printed: str, **more) -> PublishedRow:
    """A row from text: accuracies separated by blanks, and printed ACC, MAA, BWT, FWT with "-" for a number not given."""
    numbers = [None if word == "-" else float(word) for word in printed.split()]
    rows = [tuple(map(float, text.split())) or None for text in (right_after, final)]
    return PublishedRow(method, source, *rows, *numbers, **more)


# The main table: LLaVA-1.5-7B, CoIN's order.
MAIN_ROWS: Sequence[PublishedRow] = (
    _row("zero_shot", "P1", "49.91 2.88 0.33 2.08 0.90 0.00 0.68 0.17", "", "- 7.12 - -"),
    _row("multi_task", "P1", "56.77 49.35 95.55 56.65 53.90 30.09 59.50 55.65", "", "- 57.18 - -"),
    _row("lora", "P1", "82.45 49.99 96.05 56.40 55.45 31.27 62.20 57.08", "21.26 28.74 10.25 36.78 32.45 0.83 42.50 57.08",
         "28.74 32.97 -32.62 -4.82"),
    _row("lwf", "P1", "81.36 50.59 96.84 51.98 48.19 25.13 41.30 64.12", "26.78 37.52 12.64 35.18 25.24 2.87 38.92 64.12",
         "30.41 34.95 -27.03 -8.75"),
    _row("ewc", "P1", "82.81 51.76 96.80 46.19 48.68 26.82 66.37 63.46", "30.33 36.08 11.62 35.75 37.50 3.48 44.98 63.46",
         "32.90 36.93 -27.46 -5.81"),
    _row("moelora", "P1", "75.78 51.73 96.70 59.42 58.88 37.50 64.22 60.08", "63.09 38.63 10.50 37.38 43.62 0.59 43.15 60.08",
         "37.13 42.76 -25.91 -4.01"),
    _row("olora", "P1", "76.27 54.23 96.10 53.66 53.22 30.72 52.69 55.47", "62.92 38.31 56.11 30.57 43.87 14.79 44.23 55.47",
         "43.28 50.28 -15.76 -4.26",
         doubts={"fwt": "implies an isolated mean of 63.31 where the related methods imply 64.31 (-5.26)"}),
    _row("sema", "P1", "76.27 58.14 96.56 59.14 59.13 35.60 55.49 52.12", "68.63 43.27 58.45 38.38 50.19 23.73 48.34 52.12",
         "47.88 54.78 -17.49 -2.75", doubts={"bwt": "the two rows give -13.67"}),
    _row("mocl", "P1", "76.25 53.41 97.29 61.03 58.56 38.58 64.32 56.32", "65.25 45.65 59.25 39.87 48.89 24.37 52.98 56.32",
         "49.07 55.21 -14.11 -1.09", doubts={"bwt": "the two rows give -14.15"}),
    _row("proglora_static", "P1", "76.27 60.07 92.65 58.45 57.33 17.68 64.45 63.54", "72.70 57.08 91.20 53.12 56.04 12.54 63.64 63.54",
         "58.73 66.44 -2.57 1.06", doubts={"fwt": "implies an isolated mean of 60.25; static and dynamic share the run that gives 64.31"}),
    _row("proglora_dynamic", "P1", "76.27 60.78 97.32 61.27 60.16 39.35 65.83 64.44", "74.84 51.83 83.90 49.93 53.87 31.19 62.71 64.44",
         "59.09 62.38 -6.59 1.37", doubts={"maa": "the matrix gives 62.40"}),
    _row("proglora_light", "P2", "74.32 57.54 97.01 60.98 58.90 35.43 64.98 62.46", "71.98 45.37 79.73 48.94 50.89 29.82 61.99 62.46",
         "56.39 61.00 -7.56 -0.36"),
    _row("branchlora", "P3", "", "", "44.20 49.94 -20.98 -"),
    _row("pclr", "P4", "", "", "62.19 - -2.97 -", new_acc=65.16, forgetting=3.39),
)  # fmt: skip

_COLLAPSE = "implies an isolated mean of 74.46, which is impossible; 64.31 gives -2.81"
_UNVERIFIABLE = {"fwt": "the static rows imply different isolated means"}

# Ablations, other orders, templates and backbones.
OTHER_ROWS: Sequence[PublishedRow] = (
    _row("proglora_static", "P1", "", "", "54.60 63.43 -2.62 0.83", variant="weights 1", doubts=_UNVERIFIABLE),
    _row("proglora_static", "P1", "", "", "56.06 65.06 -4.84 0.90", variant="no recall", doubts=_UNVERIFIABLE),
    _row("proglora_static", "P1", "", "", "57.62 66.00 -2.76 0.97", variant="random recall", doubts=_UNVERIFIABLE),
    _row("proglora_dynamic", "P1", "", "", "57.52 62.12 -8.07 1.08", variant="no recall"),
    _row("proglora_dynamic", "P1", "", "", "59.14 62.74 -6.47 1.40", variant="phi 500"),
    _row("proglora_dynamic", "P1", "", "", "59.66 63.23 -6.21 1.38", variant="phi 1000"),
    _row("proglora_dynamic", "P1", "", "", "61.04 64.88 -6.23 1.39", variant="rank 64"),
    _row("proglora_dynamic", "P1", "", "", "62.63 65.01 -6.09 1.43", variant="rank 128"),
    _row("proglora_light", "P2", "", "", "51.34 59.83 -10.16 -12.96", variant="L=6", doubts={"fwt": _COLLAPSE}),
    _row("proglora_dynamic", "P1", "76.27 60.95 97.69 59.88 58.87 37.03 67.34 66.49", "75.50 55.44 82.37 53.57 52.38 29.34 63.01 66.49",
         "59.76 62.72 -5.80 1.32", variant="Diverse templates"),
    _row("proglora_dynamic", "P1", "76.85 60.11 97.95 60.32 57.21 38.15 68.93 65.23", "75.35 56.26 85.62 52.36 49.14 31.70 64.10 65.23",
         "59.97 63.74 -5.62 1.41", variant="10Type templates"),
    _row("proglora_dynamic", "P1", "39.23 8.11 90.75 56.98 69.37 56.52 60.96 69.95", "57.03 4.65 66.32 42.42 68.96 54.62 32.18 69.95",
         "49.51 42.85 -6.96 0.04", variant="alphabetical order", order=ALPHABETICAL_ORDER),
    _row("branchlora", "P3", "", "", "49.27 55.73 -19.29 -", backbone=LLAVA_13B),
    _row("moelora", "P3", "", "", "42.51 49.14 -23.62 -", backbone=LLAVA_13B),
    _row("branchlora", "P3", "", "", "46.47 - - -", variant="10Type templates"),
    _row("pclr", "P4", "", "", "54.66 - - -", variant="no integration", new_acc=64.54, forgetting=11.29),
    _row("pclr", "P4", "", "", "60.78 - - -", variant="no progressive", new_acc=65.23, forgetting=5.09),
    _row("zero_shot", "P1", "64.56 48.15 11.82 44.50 9.57 0.00 64.10 27.50", "", "- 33.78 - -", backbone=QWEN),
    _row("lora", "P1", "67.69 66.36 53.70 59.30 36.38 63.10 71.00 47.80", "31.05 42.45 29.57 55.57 15.30 40.33 67.75 47.80",
         "41.23 43.35 -16.94 -2.87", backbone=QWEN),
    _row("moelora", "P1", "73.99 50.91 29.84 60.03 39.44 3.93 73.44 55.10", "54.66 48.82 29.15 56.31 35.97 1.30 55.33 55.10",
         "42.08 46.83 -6.26 -1.15", backbone=QWEN),
    _row("proglora_dynamic", "P1", "68.33 56.17 31.98 57.38 40.63 8.46 68.78 57.13", "68.07 53.08 30.22 53.16 45.22 1.26 68.58 57.13",
         "47.09 52.07 -1.51 0.23", backbone=QWEN),
)  # fmt: skip

# Mean accuracy of training on each task alone that the printed FWT implies, by method (the rows themselves are not printed).
IMPLIED_ISOLATED_MEAN: Mapping[str, float] = {
    "lora": 66.18, "lwf": 66.19, "ewc": 66.17, "moelora": 67.05, "proglora_dynamic": 64.31, "proglora_light": 64.31,
    "sema": 64.31, "mocl": 64.31,
}  # fmt: skip

# Name of a row -> the row, all of them.
ROWS: Mapping[str, PublishedRow] = {row.name: row for row in (*MAIN_ROWS, *OTHER_ROWS)}


def main_row(method: str) -> PublishedRow | None:
    """The row of a method in the main table (LLaVA-1.5-7B, CoIN's order), None if the papers print none."""
    return next((row for row in MAIN_ROWS if row.method == method), None)
