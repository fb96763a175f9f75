"""The text of a report of `tools compile`: memory of a chip against its HBM, FLOPs, and collectives in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proglora_jax.continual.report_page import Table

_GIB = 1 << 30


def compile_text(report: Mapping[str, Any]) -> str:
    """The report for people.

    Args:
        report: from `compile_ahead.compile_ahead`.
    """
    axes = ", ".join(f"{name} {size}" for name, size in report["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [
        f"{report['chips']} x {report['chip']} ({report['topology']}), mesh {axes}; {report['model']}, {report['method']}, "
        f"remat {report['remat']}, attention {report['attention']}, micro-batches {report['micro_batches']}; {versions}",
        f"backbone {report['backbone_bytes'] / 1e9:.2f} GB, {report['backbone_bytes_per_chip'] / 1e9:.2f} GB of it on a chip; trainable "
        f"{report['trainable_bytes'] / 1e6:.1f} MB",
    ]
    if reason := report.get("attention_reason"):  # reports of earlier versions do not say it
        lines.append(f"attention {report['attention']}: {reason}")
    lines += report.get("notes", ())
    for program in report["programs"]:
        lines += ["", *_program(program, report["hbm"])]
    if report["advice"]:
        lines += ["", "It does not fit:", *(f"  - {sentence}" for sentence in report["advice"])]
    return "\n".join(lines)


def _program(program: Mapping[str, Any], hbm: int) -> list[str]:
    known = [name for name in ("rows", "images", "positions", "labels", "new_tokens") if name in program]
    sizes = ", ".join(f"{program[name]} {name.replace('_', ' ')}" for name in known)
    head = f"{program['program']}: {sizes}" + (f", remat {program['remat']}" if "remat" in program else "")
    if not program["fits"]:
        return [f"{head}: DOES NOT FIT into {hbm / _GIB:.2f} GiB: {program['error']}"]
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in program["memory"].items())
    per_token = f", {program['flops_per_new_token'] / 1e9:.3g} GFLOP a new token" if program["flops_per_new_token"] else ""
    ratio = program["flops_of_a_chip_to_its_share"]  # the compiler for GPUs does not say it
    return [
        f"{head}: {program['memory_total'] / _GIB:.2f} of {hbm / _GIB:.2f} GiB a chip ({parts})",
        f"  matmuls of a chip: {program['flops'] / 1e12:.4g} TFLOP{per_token}" + (f"; computed to its share: {ratio:.2f}" if ratio else ""),
        *(f"  {line}" for line in collective_lines(program["collectives"])),
    ]


def collective_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Collectives of a kind together, those of a run and those of every new token apart; the largest single one beside."""
    lines = []
    for turn in (False, True):
        for kind in sorted({one["kind"] for one in found if one["turn"] == turn}):
            group = [one for one in found if one["kind"] == kind and one["turn"] == turn]
            total, moved = (sum(one["times"] * one["bytes"] for one in group), sum(one["moved"] for one in group))
            largest = max(group, key=lambda one: one["bytes"])
            count = sum(one["times"] for one in group)
            lines.append(f"{kind}{', every new token' if turn else ''}: {count} of {total / 1e6:.1f} MB in all, {moved / 1e6:.1f} MB sent "
                         f"by a chip; the largest {largest['bytes'] / 1e6:.2f} MB x {largest['times']} {', '.join(largest['shapes'][:3])}")
    return lines or ["no collectives"]


def summary_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One line per program of several reports."""
    rows = []
    for report in reports:
        for program in report["programs"]:
            moved = sum(one["moved"] for one in program.get("collectives", ()) if not one["turn"])
            memory = f"{program['memory_total'] / _GIB:.2f}" if program["fits"] else "does not fit"
            rows.append((
                report["topology"], report["model"].rpartition(" ")[2], "x".join(str(size) for size in report["mesh"].values()),
                program["program"], str(program["rows"]), str(program["positions"]), f"{program['flops'] / 1e12:.4g}", memory,
                f"{report['hbm'] / _GIB:.2f}", f"{moved / 1e9:.2f}" if program["fits"] else "-"))
    head = ("slice", "model", "mesh", "program", "rows", "positions", "TFLOP a chip", "GiB a chip", "HBM GiB", "GB sent by a chip")
    return Table(head, tuple(rows))
