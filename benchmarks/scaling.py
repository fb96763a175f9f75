"""Step time on 8, 64 and 256 chips: computed from the work of a step, an assumed (or measured) share of the peak, and counted collectives.

    python benchmarks/scaling.py              from what is committed; seconds
    python benchmarks/scaling.py --count      count the data-parallel step's collectives again first (compiles it; minutes, no accelerator)

Nothing here is measured but what says so. Collectives are those of compiled full-size programs: for TPUs those of `tools compile` in
benchmarks/results/tpu_compile/*.json, for H100 the data-parallel step compiled for eight devices. A chip's rows stay what they are in the
program (weak scaling); for H100 also two whole batches are split (strong scaling). Results: benchmarks/results/scaling.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from proglora_jax.methods.views import Cost  # noqa: E402
from proglora_jax.training.roofline import CHIPS, training_work  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
COUNTS = (8, 64, 256)
ROWS, POSITIONS, LABELS = 16, 704, 64  # of a chip in the data-parallel step; whole batches of 128 (LLaVA) and 896 (CoIN's scripts) below
STRONG = (128, 896)
COUNT_CONFIG = ["--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.train.micro_batches=1",
                "--config.model.remat=qkvo_mlp"]


@dataclasses.dataclass(frozen=True)
class Network:
    """How fast a chip sends.

    Attributes:
        rate: bytes a second that a chip sends to its neighbours, all ports together.
        inside: chips that are joined at that rate; beyond them `outside` counts.
        outside: bytes a second of a chip to chips further away; 0 where there are none.
        wraps: number of chips from which on the slice is a torus; below, its rings are open and halve the rate.
        hop: seconds that a message takes to the next chip (assumed).
        source: who says so.
    """

    rate: float
    inside: int
    outside: float = 0.0
    wraps: int = 1
    hop: float = 1e-6
    source: str = ""


_TPU = "Google's Cloud TPU documentation"
NETWORKS = {
    "H100": Network(
        450e9, 8, 50e9, 1, 3e-6, "NVIDIA's data sheet: NVLink 900 GB/s a GPU, both directions; beyond a host one 400 Gbit/s adapter a GPU, "
        "as in NVIDIA's DGX H100 reference design"),
    "TPU v5e": Network(200e9, 256, 0.0, 256, 1e-6, f"{_TPU}: 400 GB/s a chip, both directions; 2D, a torus at 16x16"),
    "TPU v5p": Network(600e9, 8960, 0.0, 64, 1e-6, f"{_TPU}: 1,200 GB/s a chip, both directions; 3D, a torus from 4x4x4"),
    "TPU v6e": Network(400e9, 256, 0.0, 256, 1e-6, f"{_TPU}: 800 GB/s a chip, both directions; 2D, a torus at 16x16"),
}
ASSUMED_SHARE = 0.5
"""Share of a chip's published peak that the operations of a step are assumed to reach where nothing is measured."""


def send_seconds(network: Network, chips: int, kind: str, size: float, times: int, group: int) -> float:
    """Seconds of a collective in a step, by a ring: every byte goes through the slowest link, and each turn of the ring waits for one hop.

    Args:
        network: of the chips.
        chips: of the mesh.
        kind: as HLO names it.
        size: bytes of its results on a chip.
        times: in a step.
        group: chips that take part together.
    """
    if group < 2:
        return 0.0
    turns, share = (group - 1), (group - 1) / group
    sent = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1.0}.get(kind, share) * size
    turns = {"all-reduce": 2 * turns, "collective-permute": 1}.get(kind, turns)
    rate = network.rate if group <= network.inside or not network.outside else network.outside
    return times * (sent / (rate / (1 if chips >= network.wraps else 2)) + turns * network.hop)


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        system: chips and model.
        chips: how many.
        mesh: "data x fsdp".
        rows: of a step, over all chips.
        compute: seconds of a step that a chip computes.
        sent: bytes that a chip sends in a step.
        network: seconds that it takes to send them.
    """

    system: str
    chips: int
    mesh: str
    rows: float
    compute: float
    sent: float
    network: float

    @property
    def hidden(self) -> float:
        """Seconds of a step whose network runs entirely beside its arithmetic."""
        return max(self.compute, self.network)

    @property
    def exposed(self) -> float:
        """Seconds of a step that waits for every byte."""
        return self.compute + self.network

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that is arithmetic: nothing hidden, all hidden."""
        return self.compute / self.exposed, self.compute / self.hidden


# ------------------------------------------------------------------------------------------------------------------ systems


def data_parallel(counted: dict[str, Any], share: float) -> Iterator[Line]:
    """H100s that each hold the whole 7B model: only gradients of what trains are sent."""
    from proglora_jax.models.presets import llava15_7b
    from proglora_jax.training.settings import ModelSettings
    from proglora_jax.training.shapes import abstract_backbone

    config = llava15_7b()
    targets = abstract_backbone(config, ModelSettings()).targets()
    work = training_work(config, targets, POSITIONS, LABELS, "qkvo_mlp", Cost(7 * 16, 16, 16)).model
    peak = CHIPS["NVIDIA H100 80GB HBM3"].peak

    def line(name: str, chips: int, rows: float) -> Line:
        # More rows than were compiled for are computed in parts; gradients that are summed inside the loop over layers are so in each.
        parts = max(1, round(rows / chips / ROWS))
        asked = [one | {"times": one["times"] * (parts if one["times"] > 1 else 1)} for one in counted["collectives"]]
        spent, sent = _all_chips(NETWORKS["H100"], chips, asked, lambda one: chips)
        return Line(f"H100, 7B, {name}", chips, f"{chips} x 1", rows, rows / chips * work / (peak * share), sent, spent)

    for chips in COUNTS:
        yield line(f"{ROWS} rows a chip", chips, ROWS * chips)
    for batch in STRONG:
        for chips in COUNTS:
            if batch >= chips:
                yield line(f"batch {batch}", chips, batch)


def slices(reports: list[dict[str, Any]], share: float) -> Iterator[Line]:
    """TPU slices of other sizes with a chip's share of the rows and the axis fsdp as in the program that was compiled."""
    for report in reports:
        train = next((one for one in report["programs"] if one["program"] == "train" and one["fits"]), None)
        if train is None:
            continue
        chip = next(chip for chip in CHIPS.values() if chip.name == report["chip"])
        model = report["model"].rpartition("_")[2].upper()
        known = report["mesh"]["fsdp"] * report["mesh"]["model"]
        for chips in COUNTS:
            fsdp = min(known, chips)
            # Gradients are summed over all chips; what is gathered along fsdp stays within that axis.
            group = lambda one: chips if one["kind"] == "all-reduce" else min(one["group"] or fsdp, fsdp) if known > 1 else chips
            spent, sent = _all_chips(NETWORKS[chip.name], chips, train["collectives"], group)
            rows = train["rows"] / report["chips"] * chips
            name = f"{report['chip']}, {model}, {train['rows'] / report['chips']:g} rows a chip"
            yield Line(name, chips, f"{chips // fsdp} x {fsdp}", rows, train["flops"] / (chip.peak * share), sent, spent)


def _all_chips(network: Network, chips: int, collectives: list[dict[str, Any]], group) -> tuple[float, float]:
    """(seconds, bytes sent) of a step's collectives on so many chips; `group` says how many of them a collective joins."""
    spent = sent = 0.0
    for one in collectives:
        if one["turn"]:
            continue
        ways = group(one)
        spent += send_seconds(network, chips, one["kind"], one["bytes"], one["times"], ways)
        share = (ways - 1) / ways
        factor = {"all-reduce": 2 * share, "reduce-scatter": ways - 1, "collective-permute": 1.0}.get(one["kind"], share)
        sent += one["bytes"] * one["times"] * factor
    return spent, sent


# ----------------------------------------------------------------------------------------------------------------- counting


def count() -> dict[str, Any]:
    """Collectives of the 7B data-parallel training step, compiled for eight devices; call it where JAX has eight."""
    import jax

    from proglora_jax.continual.doctor_plan import planned_stages
    from proglora_jax.core import mesh as meshes
    from proglora_jax.models.presets import llava15_7b
    from proglora_jax.training import collectives, programs, shapes
    from proglora_jax.training.attention_choice import choose_attention
    from proglora_jax.training.config_file import load_config
    from proglora_jax.training.settings import from_config

    flags = ["--config.data.root=unused", *COUNT_CONFIG]
    settings = from_config(load_config(str(ROOT / "configs/coin.py:backbone=llava15_7b,batches=mcitlib64"), flags))
    settings, _ = choose_attention(settings, jax.default_backend())
    mesh = meshes.make_mesh(dataclasses.asdict(settings.mesh), jax.devices()[:8])
    llava = shapes.abstract_backbone(llava15_7b(), settings.model)
    stage = planned_stages(settings, llava, mesh)[-1].shapes
    compiled = programs.trace_train_step(settings, llava, stage, 8 * ROWS, (POSITIONS, 128), mesh).lower().compile()
    found = [dataclasses.asdict(one) for one in collectives.collectives(compiled.as_text())]
    return {"rows": 8 * ROWS, "positions": POSITIONS, "devices": 8, "platform": jax.default_backend(), "jax": jax.__version__,
            "collectives": found}


def _count_in_a_process() -> dict[str, Any]:
    code = "import json, scaling; print('counted ' + json.dumps(scaling.count()))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("counted ")]
    if not found:
        raise SystemExit(f"error: the step could not be compiled: {done.stderr[-500:]}")
    return json.loads(found[-1].removeprefix("counted "))


# ------------------------------------------------------------------------------------------------------------------ results


def measured_share() -> tuple[float, str]:
    """(MFU to plan with, where it is from): the GPU benchmark's largest of the pool, if its results are here and no tiny ones."""
    path = RESULTS / "gpu.json"
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        best = next(iter(report["goals"].values()))
        if not report["tiny"] and best:
            return best, f"measured by benchmarks/gpu.py on one {report['rows'][0]['device']}"
    return ASSUMED_SHARE, "assumed"


def main() -> None:
    """Computes, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="compile the data-parallel step and count its collectives again")
    parser.add_argument("--share", type=float, default=ASSUMED_SHARE, help="of a TPU's peak that the operations of a step reach")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = RESULTS / "scaling.json"
    counted = json.loads(path.read_text(encoding="utf-8"))["counted"] if path.exists() and not arguments.count else _count_in_a_process()
    reports = [json.loads(one.read_text(encoding="utf-8")) for one in sorted((RESULTS / "tpu_compile").glob("*.json"))]
    gpu, origin = measured_share()
    lines = [*data_parallel(counted, gpu), *slices(reports, arguments.share)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = [dataclasses.asdict(line) | {"hidden": line.hidden, "exposed": line.exposed} for line in lines]
    content = {"gpu_mfu": gpu, "gpu_mfu_is": origin, "tpu_share": arguments.share, "counted": counted, "lines": table}
    (arguments.out / "scaling.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(_text(lines, gpu, origin, arguments.share, counted)) + "\n"
    (arguments.out / "scaling.md").write_text(text, encoding="utf-8")
    (arguments.out / "scaling.png").write_bytes(_figure(lines))
    print(text)


def _text(lines: list[Line], gpu: float, origin: str, share: float, counted: dict[str, Any]) -> list[str]:
    reduced = sum(one["bytes"] * one["times"] for one in counted["collectives"] if one["kind"] == "all-reduce")
    head = [
        "# Scaling model: a training step on 8, 64 and 256 chips", "",
        "`python benchmarks/scaling.py`. **Computed, not timed.** Work and collectives are those of the full-size programs; speeds are "
        "assumptions:", "",
        f"- H100: MFU {gpu:.1%}, {origin}, as the GPU benchmark counts it, of 989 TFLOP/s; the same at every number of rows a chip, which "
        "is too kind where a chip has fewer than 8 (marked *).",
        f"- TPU: the matmuls of a chip's program run at {share:.0%} of the published peak, assumed; the adapter's and what is computed "
        "again are in them.",
        "- A collective is a ring over all its chips, each byte through the slowest link, one hop a turn; within an open slice at half the "
        "rate. NCCL's trees and a reduction within each host first would send fewer bytes between hosts.",
        f"- What H100s send is what the step, compiled for {counted['devices']} devices, reduces: {reduced / 1e6:.0f} MB a step of {ROWS} "
        f"rows a chip, since the backbone is whole on each and gets no gradient. More rows are computed in parts of {ROWS}, and the "
        "adapters' gradients are reduced in each part, as the compiled TPU programs with parts do.",
        "- The step's time lies between the two columns: every byte hidden behind arithmetic, and none.",
        *(f"- {name}: sends {network.rate / 1e9:.0f} GB/s" + (f", beyond {network.inside} chips {network.outside / 1e9:.0f}" if
          network.outside else "") + f"; a hop takes {network.hop * 1e6:.0f} us (assumed). {network.source}." for name, network in
          NETWORKS.items()),
        "", "![Efficiency](scaling.png)", "",
        "| system | chips | data x fsdp | rows a step | compute ms | MB sent by a chip | network ms | step ms | samples/s | efficiency |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        worst, best = line.efficiency
        few = "*" if line.system.startswith("H100") and line.rows / line.chips < 8 else ""
        head.append(
            f"| {line.system} | {line.chips} | {line.mesh} | {line.rows:g}{few} | {line.compute * 1e3:.0f} | {line.sent / 1e6:,.0f} | "
            f"{line.network * 1e3:.1f} | {line.hidden * 1e3:.0f}-{line.exposed * 1e3:.0f} | {line.rows / line.exposed:.0f}-"
            f"{line.rows / line.hidden:.0f} | {worst:.1%}-{best:.1%} |")
    return head


def _figure(lines: list[Line]) -> bytes:
    """Efficiency with nothing hidden against the number of chips, a line per system, as PNG."""
    from matplotlib.figure import Figure

    from proglora_jax.continual.compare_figures import line_style
    from proglora_jax.continual.report_figures import png

    drawn = Figure(figsize=(8.5, 4), dpi=110, layout="constrained")
    panel = drawn.subplots()
    for order, system in enumerate(dict.fromkeys(line.system for line in lines)):
        own = [line for line in lines if line.system == system]
        panel.plot([line.chips for line in own], [100 * line.efficiency[0] for line in own], label=system, **line_style(order))
    panel.set_xscale("log", base=2)
    panel.set_xticks(COUNTS, map(str, COUNTS))
    panel.set_xlabel("chips")
    panel.set_title("Share of a step that is arithmetic if no byte is hidden, %", fontsize=11, loc="left")
    panel.set_ylim(0, 102)
    panel.spines[["top", "right"]].set_visible(False)
    drawn.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9, handlelength=4)
    return png(drawn)


if __name__ == "__main__":
    main()
