"""Input: images a second and core from JPEG to pixels, and how long a training loop waits for its batches.

    python benchmarks/input.py              both
    python benchmarks/input.py --no-loop    images only; their rate is of CPU time, so other programs disturb it little
    python benchmarks/input.py --draw       tables and figure again, from the numbers that are there

Images are drawn: smooth colours with noise, which compress like photos (the table says how large they are). The loop is one task of
configs/coin_mini.py as the main job runs it, once decoding each image anew and once from the cache of decoded images; what counts is the
time between asking for a batch and having it, from the third step on. Results: benchmarks/results/input.json, .md and .png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from shared import RESULTS, ROOT, Bar, bars, conditions, load_of, read
from shared import write as write_files

from proglora_jax.data.image_cache import ImageCache
from proglora_jax.data.image_files import open_rgb, prepare_pixels
from proglora_jax.data.images import ImageLoader, ImageSpec

SIZES = ((640, 480), (1024, 768))
SKIP = 2
"""Steps of a loop that are not counted: they compile."""


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-loop", action="store_true", help="leave the training loop out")
    parser.add_argument("--images", type=int, default=64, help="of each size")
    parser.add_argument("--steps", type=int, default=100, help="of the loop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        return write(read(arguments.out, "input"), arguments.out)
    found = conditions()
    with tempfile.TemporaryDirectory() as folder:
        images = [image_rates(Path(folder), size, arguments.images) for size in SIZES]
        caches = () if arguments.no_loop else (0, 256)
        loops = [loop_stall(Path(folder) / f"run_{cache}", Path(folder) / "data", cache, arguments.steps) for cache in caches]
    write(found | {"images": images, "loops": loops}, arguments.out)


def draw(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Photo-like JPEGs of quality 90: a few smooth waves a channel, and noise."""
    width, height = size
    rng, y, x = np.random.default_rng(0), np.arange(height)[:, None, None] / height, np.arange(width)[None, :, None] / width
    paths = []
    for index in range(count):
        waves = sum(rng.uniform(10, 60, 3) * np.sin(rng.uniform(1, 12, 3) * x + rng.uniform(1, 12, 3) * y + rng.uniform(0, 6, 3))
                    for _ in range(5))
        pixels = np.clip(128 + waves + rng.normal(0, 5, (height, width, 1)), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{width}_{index}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def image_rates(folder: Path, size: tuple[int, int], count: int) -> dict:
    """Milliseconds of CPU time an image: to open and decode, to pad and resize, to normalise; and images a second with a thread a core,
    decoded and, in turns with that, from a folder of prepared images."""
    paths, spec = draw(folder, size, count), ImageSpec(336)
    loader = ImageLoader(spec)
    parts: dict[str, list[float]] = {"decode": [], "resize": [], "normalise": []}
    for path in paths:
        marks = [time.process_time()]
        image = open_rgb(path)
        image.load()
        marks.append(time.process_time())
        pixels = prepare_pixels(image, spec.size, "pad", spec.background, spec.resample)
        marks.append(time.process_time())
        spec.normalise(pixels)
        marks.append(time.process_time())
        for name, begin, end in zip(parts, marks, marks[1:]):
            parts[name].append(1e3 * (end - begin))
    with tempfile.TemporaryDirectory() as prepared, concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kept = ImageLoader(spec, folder=ImageCache(prepared))
        list(pool.map(kept, paths))
        spent = {loader: np.zeros(2), kept: np.zeros(2)}
        for begin in range(0, count, 8):
            for one, times in spent.items():
                began = np.array([time.process_time(), time.perf_counter()])
                list(pool.map(one, paths[begin : begin + 8]))
                times += np.array([time.process_time(), time.perf_counter()]) - began
        file_bytes = statistics.mean(path.stat().st_size for path in Path(prepared).glob("*/*"))
    rates, from_folder = ((count / times).tolist() for times in spent.values())
    medians = {f"{name}_ms": statistics.median(values) for name, values in parts.items()}
    return {"width": size[0], "height": size[1], "file_kb": statistics.mean(map(os.path.getsize, paths)) / 1e3, **medians,
            "per_s_and_core": rates[0], "per_s": rates[1],
            "folder": {"file_kb": file_bytes / 1e3, "per_s_and_core": from_folder[0], "per_s": from_folder[1]}}


def loop_stall(workdir: Path, root: Path, cache_mb: int, steps: int) -> dict:
    """Runs one task of the embedded benchmark and notes when the loop asked for each batch and when it had it."""
    from proglora_jax import main as job
    from proglora_jax.data.pipeline import TrainIterator
    from proglora_jax.training.config_file import load_config

    asked: list[float] = []
    had: list[float] = []
    original = TrainIterator.__next__

    def noted(self):
        asked.append(time.perf_counter())
        batch = original(self)
        had.append(time.perf_counter())
        return batch

    flags = {"data.root": root, "data.tasks": "TextVQA", "data.image_cache_mb": cache_mb, "train.max_steps": steps,
             "evaluate.subset_size": 1, "evaluate.batch_size": 1, "run.tensorboard": False}  # fmt: skip
    config = load_config(f"{ROOT / 'configs/coin_mini.py'}:method=lora", [f"--config.{name}={value}" for name, value in flags.items()])
    TrainIterator.__next__ = noted
    try:
        job.run(config, workdir)
    finally:
        TrainIterator.__next__ = original
    return {"image_cache_mb": cache_mb, "steps": len(had) - SKIP} | stall(asked, had)


def stall(asked: list[float], had: list[float]) -> dict[str, float]:
    """Share of the time between the first counted batch and the last that was spent waiting, and milliseconds of a step and of a wait."""
    waits = [end - begin for begin, end in zip(asked[SKIP + 1 :], had[SKIP + 1 :])]
    whole = had[-1] - had[SKIP]
    return {"stall": sum(waits) / whole, "step_ms": 1e3 * whole / len(waits), "wait_ms": 1e3 * statistics.median(waits)}


def write(found: dict, folder: Path) -> None:
    """The numbers, the tables and the figure."""
    command = f"`python benchmarks/input.py{'' if found['loops'] else ' --no-loop'}`"
    lines = ["# Input: images and waiting", "", f"{command}, {found['cores']} cores{load_of(found)}.", "",
             "![Images and waiting](input.png)", "",
             "| JPEG | KB | decode, ms | pad and resize to 336, ms | normalise, ms | images a second and core | images a second |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {one['width']}x{one['height']} | {one['file_kb']:.0f} | {one['decode_ms']:.2f} | {one['resize_ms']:.2f} | "
              f"{one['normalise_ms']:.2f} | {one['per_s_and_core']:.0f} | {one['per_s']:.0f} |" for one in found["images"]]
    lines += [f"| from the cache folder | {stored['file_kb']:.0f} | – | – | {one['normalise_ms']:.2f} | {stored['per_s_and_core']:.0f} | "
              f"{stored['per_s']:.0f} |" for one, stored in from_folder(found)]
    lines += ["", "Milliseconds are of CPU time, medians; the rate a core is of CPU time, with a thread on each core."]
    if found["loops"]:
        lines += ["", "| training loop of coin_mini | steps | step, ms | median wait, ms | share of the time that is waiting |",
                  "|---|---:|---:|---:|---:|"]
        lines += [f"| {'decodes every time' if not one['image_cache_mb'] else 'images cached'} | {one['steps']} | {one['step_ms']:.1f} | "
                  f"{one['wait_ms']:.2f} | {one['stall']:.2%} |" for one in found["loops"]]
    write_files(folder, "input", found, lines, figure(found))


def from_folder(found: dict) -> list[tuple[dict, dict]]:
    """The first size with its rates from the cache folder, where all images are alike; [] where earlier numbers have none."""
    return [(one, one["folder"]) for one in found["images"][:1] if "folder" in one]


def figure(found: dict) -> bytes:
    """Images a second, and the share of a loop that is waiting."""
    sources = [(f"{one['width']}x{one['height']}", one) for one in found["images"]]
    sources += [("from the cache folder", stored) for _, stored in from_folder(found)]
    rates = [Bar(f"{source}, {name}", one[key]) for source, one in sources
             for key, name in (("per_s_and_core", "a core"), ("per_s", f"{found['cores']} cores"))]
    waits = [Bar("decodes every time" if not one["image_cache_mb"] else "images cached", 100 * one["stall"]) for one in found["loops"]]
    return bars({"Files to pixels, images a second": rates, "Share of coin_mini's training loop that waits for a batch, %": waits})


if __name__ == "__main__":
    main()
