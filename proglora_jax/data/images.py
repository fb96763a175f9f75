"""What images a vision tower wants, and the loader that gives them: prepared, from a bounded cache or anew, and normalised."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from absl import logging
from PIL import Image

from proglora_jax.data.errors import UserError
from proglora_jax.data.image_cache import Entry, ImageCache, recipe
from proglora_jax.data.image_files import prepare_pixels, read_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = ("pad", "crop", "squash")
BAD_IMAGE_POLICIES = ("raise", "blank")


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
        # A row of pixels at once: over the three channels alone numpy takes six times as long for the same numbers.
        scaled = pixels.reshape(*pixels.shape[:-2], -1).astype(np.float32)
        width = scaled.shape[-1] // 3
        scaled *= np.float32(1 / 255)
        scaled -= np.tile(np.asarray(self.mean, np.float32), width)
        scaled /= np.tile(np.asarray(self.std, np.float32), width)
        return scaled.reshape(pixels.shape)


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
    """Loads images of one spec and mode, optionally from a bounded cache or a folder; safe to share between threads.

    Attributes:
        spec: the image spec.
        mode: "pad", "crop" or "squash".
        on_bad: "raise" or "blank".
        bad: paths that were replaced by a blank image.
        cut: paths of files that are cut off or damaged, of which what could be decoded was used, as CoIN does.
    """

    def __init__(
        self, spec: ImageSpec, mode: str = "pad", on_bad: str = "raise", cache_bytes: int = 0, *,
        advice: str = "set config.data.on_bad_image=blank", folder: ImageCache | None = None,
    ):
        """Args: spec, mode, on_bad: as in `load_image`; cache_bytes: memory for prepared uint8 pixels, 0 for none; advice: what else can
        be done about a bad image; folder: where prepared pixels are kept, too.

        Raises:
            UserError: "config.evaluate.image_mode=x: choose one of ...", "config.data.on_bad_image=x: choose one of raise, blank"
        """
        if mode not in MODES:
            raise UserError(f"config.evaluate.image_mode={mode}: choose one of {', '.join(MODES)}")
        if on_bad not in BAD_IMAGE_POLICIES:
            raise UserError(f"config.data.on_bad_image={on_bad}: choose one of {', '.join(BAD_IMAGE_POLICIES)}")
        self.spec, self.mode, self.on_bad, self._cache_bytes = spec, mode, on_bad, cache_bytes
        self._advice, self._folder = advice, folder
        self._recipe = recipe(spec.size, mode, spec.background, spec.resample) if folder else b""
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
        entry = self._folder.entry(path, self.spec.size, self._recipe) if self._folder else None
        pixels = self._folder.read(entry) if entry else None
        if pixels is None:
            pixels = self._prepared(path, entry)
        self._remember(path, pixels)
        return pixels

    def _prepared(self, path: str, entry: Entry | None) -> np.ndarray:
        """The pixels of a file, decoded; only those of a whole one are kept in the folder, as the others are counted in every run."""
        try:
            image, damage = read_rgb(path)
            pixels = prepare_pixels(image, self.spec.size, self.mode, self.spec.background, self.spec.resample)
        except UserError as error:
            if self.on_bad == "raise":
                raise UserError(f"{error}, or {self._advice}.") from error
            with self._lock:
                if path not in self.bad:
                    logging.warning("%s. A blank image stands in (number %d of this run).", error, len(self.bad) + 1)
                self.bad.add(path)
            return np.broadcast_to(np.asarray(self.spec.background, np.uint8), (self.spec.size, self.spec.size, 3))
        if damage:
            self._note_cut(path, damage)
        elif entry:
            self._folder.write(entry, pixels)
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


def missing_images(paths: Iterable[str | None]) -> list[str]:
    """Paths that name no file, each once, in order: the check before a run."""
    wanted = dict.fromkeys(path for path in paths if path is not None)
    return [path for path in wanted if not os.path.isfile(path)]
