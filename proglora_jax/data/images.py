"""From an image file to the model's pixels: CLIP preparation with PIL and numpy, tolerant of what real archives hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from absl import logging
from PIL import ExifTags, Image, ImageFile

from proglora_jax.data.errors import UserError

T = TypeVar("T")


class _Tolerance(threading.local):
    """Pillow's switch for files that are cut off, thread by thread: Pillow itself has one for all."""

    on = False

    def __bool__(self) -> bool:
        return self.on


_tolerance = ImageFile.LOAD_TRUNCATED_IMAGES = _Tolerance()

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = ("pad", "crop", "squash")
BAD_IMAGE_POLICIES = ("raise", "blank")
# Above this ratio only the part that the centre crop keeps is resized: the whole strip might not fit into memory.
_LONG_STRIP = 8
# Largest square canvas, in pixels (400 MB); a thin strip that needs more is shrunk before it is padded.
_LARGEST_CANVAS = 1 << 27


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What the vision tower wants to see.

    Attributes:
        size: height and width in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        resample: how pixels are interpolated, in Pillow's numbers: 2 bilinear (ViT), 3 bicubic (CLIP).
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_folder(cls, folder: str, *, vit: bool = False) -> ImageSpec:
        """Reads `preprocessor_config.json` or `processor_config.json` of a Hugging Face folder.

        Args:
            folder: the model's.
            vit: whether a ViT's file is read, where a missing field means 0.5 for mean and std, and bilinear; else CLIP's values.

        Raises:
            UserError: "<folder>: holds no preprocessor_config.json or processor_config.json; ..." or "<file>: field ...".
        """
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    config = json.load(file)
                config = config.get("image_processor", config)
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"{path}: not a readable JSON object; copy it again from the model's folder") from error
            if "image_mean" in config or "crop_size" in config or "size" in config:
                means = _triple(config, "image_mean", path, (0.5,) * 3 if vit else CLIP_MEAN)
                deviations = _triple(config, "image_std", path, (0.5,) * 3 if vit else CLIP_STD)
                return cls(_side(config, path), means, deviations, _resample(config, path, 2 if vit else 3))
        raise UserError(
            f"{folder}: holds no preprocessor_config.json or processor_config.json with image settings; copy it from the model's folder"
        )

    @property
    def background(self) -> tuple[int, int, int]:
        """RGB colour of padding and of images that stand in for unreadable ones: the integer part of 255 * mean."""
        return tuple(int(255 * m) for m in self.mean)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """f32[..., 3] model input of uint8[..., 3] pixels."""
        scaled = pixels.astype(np.float32)
        scaled *= np.float32(1 / 255)
        scaled -= np.asarray(self.mean, np.float32)
        scaled /= np.asarray(self.std, np.float32)
        return scaled


def _side(config: dict, path: str) -> int:
    sizes = []
    for field in ("crop_size", "size"):
        value = config.get(field)
        numbers = list(value.values()) if isinstance(value, dict) else [value]
        sizes += [n for n in numbers if n is not None]
    if not sizes or any(not isinstance(n, int) or n < 1 or n != sizes[0] for n in sizes):
        raise UserError(f"{path}: fields size={config.get('size')} and crop_size={config.get('crop_size')} must give one square size")
    return sizes[0]


def _resample(config: dict, path: str, default: int) -> int:
    value = config.get("resample", default)
    if value not in tuple(Image.Resampling):
        raise UserError(f"{path}: field resample={value!r} must be one of Pillow's filters, 0 to 5 (2 is bilinear, 3 bicubic)")
    return int(value)


def _triple(config: dict, field: str, path: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = config.get(field, default)
    ok = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    if not ok or (field == "image_std" and min(value) <= 0):
        raise UserError(f"{path}: field {field}={value} must be three numbers (above 0 for image_std)")
    return tuple(float(v) for v in value)


def load_image(
    path: str, size: int, mean: tuple[float, float, float] = CLIP_MEAN, std: tuple[float, float, float] = CLIP_STD,
    mode: str = "pad", on_bad: str = "raise",
) -> np.ndarray:
    """Reads one image for the model.

    Args:
        path: file; its kind is told from its content.
        size: height and width of the result in pixels.
        mean, std: per channel.
        mode: "pad" pastes it centred on a square of the mean colour first; "crop" loses the borders of the longer side; "squash" keeps
            everything and loses the proportions.
        on_bad: "raise", or "blank" for an image of the mean colour (logged).

    Returns:
        f32[H,W,3].

    Raises:
        UserError: "<path>: no such image", "<path>: cannot be read as an image (...)", "<path>: has too many pixels ..."
    """
    return ImageLoader(ImageSpec(size, tuple(mean), tuple(std)), mode, on_bad)(path)


class ImageLoader:
    """Loads images of one spec and mode, optionally from a bounded cache; safe to share between threads.

    Attributes:
        spec: the image spec.
        mode: "pad", "crop" or "squash".
        on_bad: "raise" or "blank".
        bad: paths that were replaced by a blank image.
        cut: paths of files that are cut off or damaged, of which what could be decoded was used, as CoIN does.
    """

    def __init__(
        self, spec: ImageSpec, mode: str = "pad", on_bad: str = "raise", cache_bytes: int = 0, *,
        advice: str = "set config.data.on_bad_image=blank",
    ):
        """Args: spec, mode, on_bad: as in `load_image`; cache_bytes: memory for prepared uint8 pixels, 0 for none; advice: what else can
        be done about a bad image.

        Raises:
            UserError: "config.evaluate.image_mode=x: choose one of ...", "config.data.on_bad_image=x: choose one of raise, blank"
        """
        if mode not in MODES:
            raise UserError(f"config.evaluate.image_mode={mode}: choose one of {', '.join(MODES)}")
        if on_bad not in BAD_IMAGE_POLICIES:
            raise UserError(f"config.data.on_bad_image={on_bad}: choose one of {', '.join(BAD_IMAGE_POLICIES)}")
        self.spec, self.mode, self.on_bad, self._cache_bytes = spec, mode, on_bad, cache_bytes
        self._advice = advice
        self.bad: set[str] = set()
        self.cut: set[str] = set()
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def __call__(self, path: str) -> np.ndarray:
        """f32[H,W,3] of one file; errors as for `load_image`."""
        return self.spec.normalise(self.pixels(path))

    def pixels(self, path: str) -> np.ndarray:
        """uint8[H,W,3] of one file, before normalisation."""
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        try:
            image, damage = read_rgb(path)
            if damage:
                self._note_cut(path, damage)
            pixels = prepare_pixels(image, self.spec.size, self.mode, self.spec.background, self.spec.resample)
        except UserError as error:
            if self.on_bad == "raise":
                raise UserError(f"{error}, or {self._advice}.") from error
            with self._lock:
                if path not in self.bad:
                    logging.warning("%s. A blank image stands in (number %d of this run).", error, len(self.bad) + 1)
                self.bad.add(path)
            pixels = np.broadcast_to(np.asarray(self.spec.background, np.uint8), (self.spec.size, self.spec.size, 3))
        self._remember(path, pixels)
        return pixels

    def _note_cut(self, path: str, damage: str) -> None:
        with self._lock:
            if path not in self.cut:
                logging.warning("%s: is cut off or damaged (%s); what can be decoded of it is used (number %d of this run).", path, damage,
                                len(self.cut) + 1)
            self.cut.add(path)

    def _remember(self, path: str, pixels: np.ndarray) -> None:
        if pixels.nbytes > self._cache_bytes:
            return
        with self._lock:
            if path not in self._cache:
                self._used += pixels.nbytes
            self._cache[path] = pixels
            while self._used > self._cache_bytes:
                self._used -= self._cache.popitem(last=False)[1].nbytes


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


def missing_images(paths: Iterable[str | None]) -> list[str]:
    """Paths that name no file, each once, in order: the check before a run."""
    wanted = dict.fromkeys(path for path in paths if path is not None)
    return [path for path in wanted if not os.path.isfile(path)]
