"""Decodes every image that records name, once, on all cores.

Threads, not processes: decoding releases the interpreter lock. 3,000 JPEGs of 640 x 480 pixels on two cores take 5.0 s with one
thread, 2.5 s with two and 3.0 s with two processes. The lock is held for 0.09 of an image's 1.7 ms: by estimate, ten cores have work.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from proglora_jax.data.errors import UserError
from proglora_jax.data.image_files import ImageFacts, inspect_image

IMAGE_KINDS = MISSING, CORRUPT, TRUNCATED = "missing_image", "corrupt_image", "truncated_image"
# Images per job: large enough that handing jobs out costs nothing, small enough that the last ones end together.
_CHUNK = 16
_EXTENSIONS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP"}


class ImageUses:
    """The distinct images that records name, numbered in order of their first mention.

    Attributes:
        paths: absolute path of each.
        first: (file, position, id) of the first record that names each.
        count: number of records that name each.
    """

    def __init__(self):
        self._numbers: dict[str, int] = {}
        self.paths: list[str] = []
        self.first: list[tuple[str, int, str]] = []
        self.count = array("q")

    def add(self, path: str, file: str, position: int, id: str) -> int:
        """Notes that a record names an image and gives the image's number."""
        number = self._numbers.setdefault(path, len(self.paths))
        if number == len(self.paths):
            self.paths.append(path)
            self.first.append((file, position, id))
            self.count.append(0)
        self.count[number] += 1
        return number


@dataclass(frozen=True, slots=True)
class ImageState:
    """What came of one image.

    Attributes:
        kind: "" if it is whole, else missing_image, corrupt_image or truncated_image.
        reason: a sentence that names the file, or "".
        content: 64-bit hash of the file's bytes; of its path where they cannot be read.
        size: (width, height) in pixels; (0, 0) where unknown.
        notes: what is unusual about it but does no harm.
    """

    kind: str
    reason: str
    content: int
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()


def look_at_images(paths: Sequence[str], workers: int, tick: Callable[[int], None]) -> list[ImageState]:
    """Decodes all images: first strictly, then what fails as training would.

    Args:
        paths: distinct paths.
        workers: threads.
        tick: told how many more images are done.

    Returns:
        One state per path, in order.
    """
    states: list[ImageState | None] = [None] * len(paths)
    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is found out here
        jobs = {pool.submit(_look_at_some, [paths[i] for i in chunk]): chunk for chunk in chunks}
        try:
            for job in as_completed(jobs):
                for number, state in zip(jobs[job], job.result()):
                    states[number] = state
                tick(len(jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    doubtful = [number for number, state in enumerate(states) if state.kind == CORRUPT]
    with ThreadPoolExecutor(workers) as pool:
        for number, state in zip(doubtful, pool.map(_second_look, [paths[i] for i in doubtful], [states[i] for i in doubtful])):
            states[number] = state
    return states


def _look_at_some(paths: Sequence[str]) -> list[ImageState]:
    return [_look_at(path) for path in paths]


def _look_at(path: str) -> ImageState:
    try:
        facts = inspect_image(path)
        with open(path, "rb") as file:
            content = hashlib.blake2b(file.read(), digest_size=8).digest()
    except (UserError, OSError) as error:
        missing = isinstance(error.__cause__ or error, FileNotFoundError | NotADirectoryError)
        return ImageState(MISSING if missing else CORRUPT, str(error), hash(path))
    return ImageState("", "", int.from_bytes(content, "little"), (facts.width, facts.height), _notes(path, facts))


def _second_look(path: str, strict: ImageState) -> ImageState:
    """What cannot be decoded strictly may still be usable: training takes what it can get of a file that is cut off."""
    try:
        facts = inspect_image(path, tolerant=True)
    except UserError as error:
        return ImageState(CORRUPT, str(error), strict.content)
    reason = strict.reason.partition("(")[2].rpartition(")")[0]
    sentence = f"{path}: is cut off or damaged ({reason}); training uses what can be decoded of it; download it again"
    return ImageState(TRUNCATED, sentence, strict.content, (facts.width, facts.height), _notes(path, facts))


def _notes(path: str, facts: ImageFacts) -> tuple[str, ...]:
    notes = []
    extension = os.path.splitext(path)[1].lower()
    if _EXTENSIONS.get(extension, facts.format) != facts.format:
        notes.append(f"{facts.format} data under the name {extension} (read by content)")
    if facts.mode not in ("RGB", "L"):
        notes.append(f"pixels of mode {facts.mode} (converted to RGB)")
    if facts.rotated:
        notes.append("an EXIF rotation (not applied, as in CoIN)")
    return tuple(sys.intern(note) for note in notes)
