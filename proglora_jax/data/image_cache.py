"""A folder of images as they are after decoding, padding or cropping, and resizing: uint8 pixels, to be read again by later runs.

A file holds a header and the raw pixels. Measured for 336 x 336 pixels of photo-like JPEGs of 640 x 480 (`benchmarks/input.py` draws
such), padded and cropped, CPU time on one core, the file in the system's cache:

    format               images read a second    KB an image    ms to write
    raw, with crc32             7,000               339             0.1
    .npy through mmap           2,600               339             0.2
    zlib, level 1             650 to 830         232 to 301       5 to 7
    PNG, level 1              310 to 340         134 to 182       7 to 8
    WebP, fastest             460 to 470         116 to 133         3
    WebP, usual               430 to 550          88 to 117      73 to 84
    the JPEG itself           160 to 180             78              -

To unpack takes a third of the time of decoding the JPEG, so only raw pixels are worth a folder; 100,000 images are 34 GB.

A file's name is a hash of all that its pixels depend on, so a source that changes or moves is read anew. Nothing is ever deleted: the
folder, or any part of it, may be removed when no run needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import PIL
from absl import logging
from PIL import features

from proglora_jax.data.errors import UserError
from proglora_jax.data.image_files import PIXELS_VERSION

# What the file is, the key of its pixels, their number a side, their checksum.
_HEADER = struct.Struct("<8s16sII")
_MAGIC = b"pixels-1"
_CODECS = ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "avif")
# Left free: bytes, or a part of a small disk. It may be the one that checkpoints are written to.
_RESERVE, _SHARE = 2 << 30, 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the pixels of an image lie, or would lie.

    Attributes:
        source: the image file.
        state: its size and time of change, in ns, before it was read.
        file: the file of its pixels.
        header: what that file begins with, up to the checksum.
        size: pixels a side.
    """

    source: str
    state: tuple[int, int]
    file: str
    header: bytes
    size: int


def recipe(size: int, mode: str, background: tuple[int, int, int], resample: int) -> bytes:
    """All that pixels depend on besides their file: arguments as for `image_files.prepare_pixels`, and the code that does it."""
    codecs = {name: features.version(name) for name in _CODECS}
    made_by = [PIXELS_VERSION, PIL.__version__, codecs, platform.machine()]
    return json.dumps([size, mode, background, int(resample), *made_by]).encode()


class ImageCache:
    """The folder; threads and processes may share one, also over a network.

    Attributes:
        folder: the folder.
        writes: whether images are still written; a disk that refuses one ends that.
        found: images that were read from the folder.
        written: images that were written.
    """

    def __init__(self, folder: str, setting: str = "config.data.image_cache_dir", *, must_write: bool = False):
        """Args: folder: made where it is not there; setting: what sentences call it; must_write: refuse a folder that can only be read.

        Raises:
            UserError: "<setting>=<folder>: cannot be written (<what the system says>); ..."
        """
        self.folder, self._setting = folder, setting
        self.writes, self.found, self.written, self._spoiled = True, 0, 0, 0
        self._lock = threading.Lock()
        probe = os.path.join(folder, f"{secrets.token_hex(8)}.partial")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(probe, "wb") as file:
                file.write(b"0")
            os.remove(probe)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if os.path.isdir(folder) and not must_write:  # filled ahead, and mounted for reading
                self._stop(str(reason))
                return
            raise UserError(f"{setting}={folder}: cannot be written ({reason}); give a folder that can, or leave it out") from error

    def entry(self, path: str, size: int, way: bytes) -> Entry | None:
        """The place of an image's pixels.

        Args:
            path: the image file.
            size: pixels a side.
            way: what `recipe` says of them.

        Returns:
            None where there is no such file.
        """
        state = _state(path)
        if state is None:
            return None
        told = b"\0".join([way, os.fsencode(os.path.realpath(path)), repr(state).encode()])
        key = hashlib.blake2b(told, digest_size=16)
        name = key.hexdigest()
        file = os.path.join(self.folder, name[:2], name[2:])
        return Entry(path, state, file, _HEADER.pack(_MAGIC, key.digest(), size, 0)[:-4], size)

    def read(self, entry: Entry) -> np.ndarray | None:
        """uint8[size,size,3], or None where the folder does not have them, or not as they were written (logged once)."""
        whole = np.empty(_HEADER.size + 3 * entry.size**2, np.uint8)
        try:
            with open(entry.file, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                count = file.readinto(whole) if length == whole.nbytes else -1
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return self._refuse(entry, str(error.strerror))
        if count != whole.nbytes:
            return self._refuse(entry, f"{length:,} bytes, not {whole.nbytes:,}")
        pixels = whole[_HEADER.size :]
        if whole[: _HEADER.size].tobytes() != entry.header + struct.pack("<I", zlib.crc32(pixels)):
            return self._refuse(entry, "its checksum or its header is another")
        with self._lock:
            self.found += 1
        pixels.setflags(write=False)
        return pixels.reshape(entry.size, entry.size, 3)

    def write(self, entry: Entry, pixels: np.ndarray) -> None:
        """Keeps uint8[size,size,3], unless their file has changed meanwhile; what the disk refuses is logged once, and ends writing."""
        if not self.writes or _state(entry.source) != entry.state:
            return
        partial = f"{entry.file}.{secrets.token_hex(8)}.partial"
        pixels = np.ascontiguousarray(pixels)
        try:
            disk = shutil.disk_usage(self.folder)
            if disk.free < min(_RESERVE, disk.total // _SHARE):
                self._stop(f"the disk is nearly full, {disk.free / 2**30:.1f} GiB are left for other files")
                return
            os.makedirs(os.path.dirname(entry.file), exist_ok=True)
            try:
                with open(partial, "wb") as file:
                    file.write(entry.header + struct.pack("<I", zlib.crc32(pixels)))
                    file.write(pixels)
                os.replace(partial, entry.file)  # without fsync: what a power cut spoils, the checksum shows
            except OSError:
                with contextlib.suppress(OSError):
                    os.remove(partial)
                raise
        except OSError as error:
            self._stop(str(error.strerror))
            return
        with self._lock:
            self.written += 1

    def _refuse(self, entry: Entry, why: str) -> None:
        with self._lock:
            self._spoiled += 1
            first = self._spoiled == 1
        if first:
            logging.warning("%s: is not as it was written (%s); its image is decoded and kept again, as are others like it.",
                            entry.file, why)

    def _stop(self, why: str) -> None:
        with self._lock:
            first, self.writes = self.writes, False
        if first:
            logging.warning("%s=%s: no more images are kept there (%s); those that are there are still read.",
                            self._setting, self.folder, why)


def _state(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
