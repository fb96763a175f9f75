"""Puts the images of checked records into the folder of prepared images (config.data.image_cache_dir), as runs will ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from proglora_jax.data.check.findings import Findings, TaskRow
from proglora_jax.data.check.images import ImageState, ImageUses
from proglora_jax.data.check.progress import progress
from proglora_jax.data.check.records import SeenFile
from proglora_jax.data.image_cache import ImageCache
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.tasks import TASKS

_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Fill:
    """What to put where.

    Attributes:
        cache: the folder.
        spec: what the model's vision tower wants.
    """

    cache: ImageCache
    spec: ImageSpec


def wanted_images(
    walked: Iterable[tuple[TaskRow, SeenFile, SeenFile]], uses: ImageUses, states: Sequence[ImageState]
) -> list[tuple[str, str]]:
    """(path, mode) of all whole images: padded as in training; those that CoIN's scripts crop when they ask, cropped as well."""
    found: dict[tuple[int, str], None] = {}
    for row, train, questions in walked:
        found |= dict.fromkeys((number, "pad") for number in (*train.images, *questions.images))
        found |= dict.fromkeys((number, TASKS[row.task].coin_image_mode) for number in questions.images)
    return [(uses.paths[number], mode) for number, mode in found if number >= 0 and not states[number].kind]


def fill_folder(findings: Findings, fill: Fill, wanted: Sequence[tuple[str, str]], workers: int) -> None:
    """Prepares images that are not in the folder yet, and notes how many lie there; stops where the disk takes no more.

    Raises:
        UserError: for an image that cannot be read any more.
    """
    loaders = {mode: ImageLoader(fill.spec, mode, folder=fill.cache) for mode in {mode for _, mode in wanted}}

    def prepare(chunk: range) -> None:
        for path, mode in (wanted[number] for number in chunk):
            if fill.cache.writes:
                loaders[mode].pixels(path)

    chunks = [range(start, min(start + _CHUNK, len(wanted))) for start in range(0, len(wanted), _CHUNK)]
    with progress("prepared images", len(wanted), "images") as tick, ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(prepare, chunk): chunk for chunk in chunks}
        try:
            for job in as_completed(jobs):
                job.result()
                tick(len(jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    cache = fill.cache
    findings.note(cache.folder, "an image that lies there prepared", cache.found + cache.written)
    if not cache.writes:
        findings.note(cache.folder, "an image that could not be put there", len(wanted) - cache.found - cache.written)
