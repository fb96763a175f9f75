"""From an image file to uint8 pixels: decoding that is tolerant of what real archives hold, and CLIP's padding, resizing and cropping."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile

from proglora_jax.data.errors import UserError

T = TypeVar("T")

PIXELS_VERSION = 1
"""Of what this file does to pixels. Raise it with every change after which an image may give others: folders of prepared images
(`data.image_cache`) of the time before are then not read."""
# Above this ratio only the part that the centre crop keeps is resized: the whole strip might not fit into memory.
_LONG_STRIP = 8
# Largest square canvas, in pixels (400 MB); a thin strip that needs more is shrunk before it is padded.
_LARGEST_CANVAS = 1 << 27


class _Tolerance(threading.local):
    """Pillow's switch for files that are cut off, thread by thread: Pillow itself has one for all."""

    on = False

    def __bool__(self) -> bool:
        return self.on


_tolerance = ImageFile.LOAD_TRUNCATED_IMAGES = _Tolerance()


def open_rgb(path: str) -> Image.Image:
    """First frame of an image file as RGB. EXIF rotation is not applied, transparency is ignored: as CoIN does.

    Raises:
        UserError: "<path>: no such image ...", "<path>: cannot be read as an image (...)", "<path>: has too many pixels ..."
    """
    return read_rgb(path)[0]


def read_rgb(path: str) -> tuple[Image.Image, str]:
    """(image as `open_rgb` gives it, why it could not be decoded strictly; "" for one that is whole).

    Published archives hold cut-off files; CoIN trains on what can be decoded of them.
    """
    try:
        return _opened(path, _to_rgb), ""
    except _Damaged as strict:
        return _opened(path, _to_rgb, tolerant=True), strict.reason


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image file turned out to hold.

    Attributes:
        width, height: pixels.
        format: kind told from the content, e.g. "JPEG".
        mode: how pixels are stored, in Pillow's words, e.g. "RGB", "CMYK", "I;16".
        rotated: whether its EXIF data ask for a rotation (which is not applied).
    """

    width: int
    height: int
    format: str
    mode: str
    rotated: bool


def inspect_image(path: str, *, tolerant: bool = False) -> ImageFacts:
    """Decodes a whole image and says what it was; a file that is cut off is an error unless `tolerant`; errors as `open_rgb`."""
    return _opened(path, _facts, tolerant=tolerant)


class _Damaged(UserError):
    """An image whose bytes cannot be decoded; `reason` says why."""

    reason = ""


def _opened(path: str, read: Callable[[Image.Image], T], *, tolerant: bool = False) -> T:
    """`read(image)` of a file, with a sentence for whatever fails."""
    _tolerance.on = tolerant
    try:
        with Image.open(path) as image:
            return read(image)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image; check config.data.root, download it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has too many pixels to be opened safely; shrink it") from error
    except Exception as error:  # decoders raise many kinds for damaged bytes
        reason = type(error).__name__ if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0][:120]
        damaged = _Damaged(f"{path}: cannot be read as an image ({reason}); download it again")
        damaged.reason = reason
        raise damaged from error
    finally:
        _tolerance.on = False


def _facts(image: Image.Image) -> ImageFacts:
    kind, mode = image.format or "", image.mode
    width, height = _to_rgb(image).size
    rotated = False
    with contextlib.suppress(Exception):  # EXIF data are never needed, and may be damaged in any way
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageFacts(width, height, kind, mode, rotated)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey: keep the high byte. Pillow's own conversion would saturate everything above 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def prepare_pixels(
    image: Image.Image, size: int, mode: str, background: tuple[int, int, int], resample: int = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Pads or not, resizes the shorter side to `size` (antialiased), crops the centre; or resizes both sides to `size`.

    Args:
        image: RGB.
        size: pixels.
        mode: "pad", "crop" or "squash".
        background: RGB colour of the padding.
        resample: Pillow's filter.

    Returns:
        uint8[size,size,3].

    Source: CLIP's and ViT's image processors in their PIL form; CoIN's `image_aspect_ratio=pad`.
    """
    if mode == "squash":
        return np.asarray(image.resize((size, size), resample))
    width, height = image.size
    if mode == "pad" and width != height:
        side = max(width, height)
        if side * side > _LARGEST_CANVAS and side > _LONG_STRIP * size:
            scale = _LONG_STRIP * size / side
            image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
            (width, height), side = image.size, max(image.size)
        canvas = Image.new("RGB", (side, side), background)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image, width, height = canvas, side, side
    short = min(width, height)
    new = (size if width == short else int(size * width / short), size if height == short else int(size * height / short))
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    if max(new) > _LONG_STRIP * size:
        across, down = width / new[0], height / new[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), resample, box=box))
    if image.size != new:
        image = image.resize(new, resample)
    return np.asarray(image.crop((left, top, left + size, top + size)))
