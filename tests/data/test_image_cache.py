"""The folder of prepared images: the same bits, read again by later runs, never those of another file; spoiled files, several writers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
from data_fixtures import save_pattern
from disks import full_disk
from PIL import Image

from proglora_jax.data import image_cache, image_files, images
from proglora_jax.data.errors import UserError
from proglora_jax.data.image_cache import ImageCache, recipe
from proglora_jax.data.images import MODES, ImageLoader, ImageSpec

SPEC = ImageSpec(24)
WAY = recipe(24, "pad", (1, 2, 3), 3)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "prepared")


@pytest.fixture
def paths(tmp_path):
    """Images of several kinds: wide, high, square, of the right size, grey, 16 bits, with transparency, JPEG."""
    rng = np.random.default_rng(0)
    place = tmp_path / "images"
    found = [save_pattern(str(place / f"{w}x{h}.png"), w, h) for w, h in ((60, 41), (41, 60), (50, 50), (24, 24), (300, 7))]
    more = {
        "grey.png": rng.integers(0, 256, (30, 40), np.uint8), "deep.png": rng.integers(0, 65536, (30, 40), np.uint16),
        "clear.png": rng.integers(0, 256, (40, 30, 4), np.uint8), "photo.jpg": rng.integers(0, 256, (40, 64, 3), np.uint8),
    }  # fmt: skip
    for name, pixels in more.items():
        Image.fromarray(pixels).save(place / name)
        found.append(str(place / name))
    return found


def kept(folder: str) -> list[Path]:
    """The files in the folder."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def no_decoder(path):
    raise AssertionError(f"{path} was decoded")


def told(caplog) -> list[str]:
    """The warnings."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_and_a_later_run_decodes_nothing(folder, paths, mode, monkeypatch, caplog):
    plain = ImageLoader(SPEC, mode)
    expected = {path: (plain.pixels(path), plain(path)) for path in paths}
    first = ImageLoader(SPEC, mode, folder=ImageCache(folder))
    for path in paths:
        assert np.array_equal(first.pixels(path), expected[path][0])
    assert len(kept(folder)) == len(paths)
    monkeypatch.setattr(images, "read_rgb", no_decoder)
    again = ImageCache(folder)
    for loader in (ImageLoader(SPEC, mode, folder=again), ImageLoader(SPEC, mode, cache_bytes=1 << 20, folder=again)):
        for path in paths * 2:
            pixels, normalised = loader.pixels(path), loader(path)
            assert pixels.dtype == np.uint8 and pixels.tobytes() == expected[path][0].tobytes() and pixels.shape == (24, 24, 3)
            assert normalised.dtype == np.float32 and normalised.tobytes() == expected[path][1].tobytes()
    assert again.found == 5 * len(paths) and again.written == 0 and not told(caplog), "the memory's are not read again"


def test_files_lie_spread_over_subfolders(folder, paths):
    loader = ImageLoader(SPEC, folder=ImageCache(folder))
    for path in paths:
        loader(path)
    assert all(path.parent.parent == Path(folder) and len(path.parent.name) == 2 for path in kept(folder))
    assert {path.stat().st_size for path in kept(folder)} == {32 + 3 * 24 * 24}


def test_a_source_that_changes_gives_its_new_pixels(folder, tmp_path):
    path = str(tmp_path / "a.bmp")  # files of one size, whatever they show
    for number, colour in enumerate(((200, 0, 0), (0, 200, 0))):
        Image.new("RGB", (30, 30), colour).save(path)
        os.utime(path, ns=(10**18, 10**18 + number))
        for _ in range(2):
            assert ImageLoader(SPEC, folder=ImageCache(folder)).pixels(path)[5, 5].tolist() == list(colour)
    assert len(kept(folder)) == 2
    os.remove(path)
    with pytest.raises(UserError, match="no such image"):
        ImageLoader(SPEC, folder=ImageCache(folder)).pixels(path)


def test_another_data_set_with_equal_names_sizes_and_times_is_another(folder, tmp_path):
    """Also where it is put in the place of the first by a link."""
    link = tmp_path / "data"
    for number, colour in enumerate(((200, 0, 0), (0, 200, 0))):
        root = tmp_path / f"data{number}"
        root.mkdir()
        Image.new("RGB", (30, 30), colour).save(root / "a.bmp")
        os.utime(root / "a.bmp", ns=(10**18, 10**18))
        link.unlink(missing_ok=True)
        link.symlink_to(root)
        for path in (root / "a.bmp", link / "a.bmp", link / "." / "a.bmp"):
            assert ImageLoader(SPEC, folder=ImageCache(folder)).pixels(str(path))[5, 5].tolist() == list(colour)
    assert len(kept(folder)) == 2


def test_whatever_pixels_depend_on_is_in_the_key(folder, paths, monkeypatch):
    cache, path = ImageCache(folder), paths[0]
    specs = [SPEC, ImageSpec(25), ImageSpec(24, (0.5, 0.5, 0.5)), ImageSpec(24, resample=2)]
    for spec, mode in [*((spec, "pad") for spec in specs), (SPEC, "crop"), (SPEC, "squash")]:
        expected = ImageLoader(spec, mode).pixels(path)
        for _ in range(2):
            assert np.array_equal(ImageLoader(spec, mode, folder=cache).pixels(path), expected)
    assert (cache.found, cache.written) == (6, 6)
    ImageLoader(ImageSpec(24, std=(0.1, 0.2, 0.3)), "pad", folder=cache).pixels(path)
    assert (cache.found, cache.written) == (7, 6), "pixels lie there before they are normalised"
    for module, name in ((image_cache, "PIXELS_VERSION"), (PIL, "__version__"), (image_cache.platform, "machine")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, (lambda: "z80") if name == "machine" else 99)
            assert recipe(24, "pad", (1, 2, 3), 3) != WAY
    with monkeypatch.context() as patch:
        patch.setattr(image_cache.features, "version", lambda codec: "another")
        assert recipe(24, "pad", (1, 2, 3), 3) != WAY
    assert recipe(24, "pad", (1, 2, 3), 3) == WAY


def test_the_version_follows_the_code():
    """What is written here must change with the code: if pixels may change with it, raise PIXELS_VERSION as well."""
    parts = (image_files.read_rgb, image_files._opened, image_files._to_rgb, image_files.prepare_pixels)
    text = "".join(map(inspect.getsource, parts)) + f"{image_files._LONG_STRIP} {image_files._LARGEST_CANVAS}"
    assert (image_files.PIXELS_VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, "c3dfc597c43473fb")


# ---- what the folder holds is not what was written


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_another(path: Path) -> None:
    """The folder's file of another image, whole but under this name."""
    place = path.parents[1]
    source = save_pattern(str(place.parent / "other.png"), 33, 31)
    before = set(kept(place))
    ImageLoader(SPEC, folder=ImageCache(str(place))).pixels(source)
    (other,) = set(kept(place)) - before
    shutil.move(other, path)


def in_the_way(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILED = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit": flip,
    "foreign": lambda path: path.write_text("notes of somebody"),
    "another format": lambda path: path.write_bytes(b"pixels-0" + path.read_bytes()[8:]),
    "of another image": of_another,
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_noticed_and_made_again(folder, paths, how, caplog):
    expected = ImageLoader(SPEC).pixels(paths[0])
    ImageLoader(SPEC, folder=ImageCache(folder)).pixels(paths[0])
    (file,) = kept(folder)
    whole = file.read_bytes()
    SPOILED[how](file)
    cache = ImageCache(folder)
    for _ in range(3):
        assert np.array_equal(ImageLoader(SPEC, folder=cache).pixels(paths[0]), expected)
    assert (cache.found, cache.written) == (2, 1) and file.read_bytes() == whole
    (warning,) = told(caplog)
    assert str(file) in warning and "is not as it was written" in warning


def test_many_spoiled_files_are_one_warning(folder, paths, caplog):
    for spoil in (False, True, False):
        loader = ImageLoader(SPEC, folder=ImageCache(folder))
        for file in kept(folder) if spoil else ():
            flip(file)
        for path in paths:
            assert np.array_equal(loader.pixels(path), ImageLoader(SPEC).pixels(path))
    assert len(told(caplog)) == 1


def test_a_folder_where_a_file_should_be_stops_writing_only(folder, paths, caplog):
    ImageLoader(SPEC, folder=ImageCache(folder)).pixels(paths[0])
    in_the_way(kept(folder)[0])
    cache = ImageCache(folder)
    for path in paths:
        assert np.array_equal(ImageLoader(SPEC, folder=cache).pixels(path), ImageLoader(SPEC).pixels(path))
    assert len(told(caplog)) == 2 and not cache.writes and not kept(folder)


# ---- what is not kept


def test_blank_and_cut_images_are_counted_in_every_run(folder, tmp_path, paths):
    photo = paths[-1]
    content = Path(photo).read_bytes()
    Path(photo).write_bytes(content[: len(content) // 2])
    gone = str(tmp_path / "none.jpg")
    plain = ImageLoader(SPEC, on_bad="blank")
    for _ in range(2):
        loader = ImageLoader(SPEC, on_bad="blank", folder=ImageCache(folder))
        for path in (photo, gone, str(tmp_path)):
            assert np.array_equal(loader.pixels(path), plain.pixels(path))
        assert loader.cut == {photo} and loader.bad == {gone, str(tmp_path)}
    assert not kept(folder)


def test_a_source_that_changes_while_it_is_decoded_is_not_kept(folder, paths, monkeypatch):
    loader, read = ImageLoader(SPEC, folder=ImageCache(folder)), images.read_rgb

    def changed(path):
        found = read(path)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(images, "read_rgb", changed)
    loader.pixels(paths[0])
    assert not kept(folder)
    loader.pixels(paths[0])
    assert len(kept(folder)) == 1


# ---- the disk


@pytest.mark.parametrize("place", ["file", "file/under", "/proc/nowhere", "long" * 100, "zero\0byte"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / place)
    with pytest.raises(UserError) as error:
        ImageCache(folder)
    text = str(error.value)
    assert text.startswith(f"config.data.image_cache_dir={folder}: cannot be written (") and "\n" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_can_only_be_read_is_read(folder, paths, caplog, monkeypatch):
    """A volume that is mounted so; to fill it is refused."""
    first = ImageLoader(SPEC, folder=ImageCache(folder)).pixels(paths[0])

    def refuse(path, mode="r", *rest, **options):
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open(path, mode, *rest, **options)

    monkeypatch.setattr(image_cache, "open", refuse, raising=False)
    cache = ImageCache(folder)
    loader = ImageLoader(SPEC, folder=cache)
    np.testing.assert_array_equal(loader.pixels(paths[0]), first)
    loader.pixels(paths[1])
    assert (cache.writes, cache.found, cache.written) == (False, 1, 0)
    assert len([line for line in caplog.messages if "no more images are kept there (Read-only file system)" in line]) == 1
    with pytest.raises(UserError, match="--fill-image-cache=.*: cannot be written .Read-only"):
        ImageCache(folder, "--fill-image-cache", must_write=True)


@pytest.mark.parametrize("how", ["refuses", "nearly full"])
def test_a_full_disk_ends_writing_with_one_warning(folder, paths, how, caplog, monkeypatch):
    cache = ImageCache(folder)
    loader, plain = ImageLoader(SPEC, folder=cache), ImageLoader(SPEC)
    loader.pixels(paths[0])
    usage = type(shutil.disk_usage(folder))
    with monkeypatch.context() as patch, full_disk(1000) if how == "refuses" else contextlib.nullcontext():
        if how == "nearly full":
            patch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 40, (1 << 40) - (2 << 30) + 1, (2 << 30) - 1))
        for path in paths:
            assert np.array_equal(loader.pixels(path), plain.pixels(path))
    assert (cache.writes, cache.found, cache.written) == (False, 1, 1) and len(kept(folder)) == 1, "nothing half written is left"
    (warning,) = told(caplog)
    assert warning.startswith(f"config.data.image_cache_dir={folder}: no more images are kept there (")
    assert ("File too large" if how == "refuses" else "nearly full, 2.0 GiB are left") in warning


def test_a_small_disk_keeps_a_share_free(folder, paths, monkeypatch):
    """5 % of 1 GiB are 51.2 MiB."""
    cache, usage = ImageCache(folder), type(shutil.disk_usage(folder))
    for path, free, writes in zip(paths, (52 << 20, 51 << 20), (True, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(1 << 30, (1 << 30) - free, free))
        ImageLoader(SPEC, folder=cache).pixels(path)
        assert cache.writes == writes and len(kept(folder)) == 1


def test_a_folder_that_is_removed_meanwhile_is_made_again(folder, paths, caplog):
    loader = ImageLoader(SPEC, folder=ImageCache(folder))
    loader.pixels(paths[0])
    shutil.rmtree(folder)
    os.makedirs(folder)
    for path in paths:
        loader.pixels(path)
    assert len(kept(folder)) == len(paths) and not told(caplog)


WRITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from proglora_jax.data.image_cache import ImageCache
from proglora_jax.data.images import ImageLoader, ImageSpec

folder, *paths = sys.argv[1:]
cache, plain = ImageCache(folder), ImageLoader(ImageSpec(24))
loader = ImageLoader(ImageSpec(24), folder=cache)
expected = {path: plain.pixels(path) for path in paths}
print("ready", flush=True)
sys.stdin.readline()

def work(number):
    path = paths[number % len(paths)]
    assert np.array_equal(loader.pixels(path), expected[path])
    entry = cache.entry(path, 24, loader._recipe)
    cache.write(entry, expected[path])
    assert np.array_equal(cache.read(entry), expected[path])

with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(600)))
print(cache.written, cache.writes)
"""


def test_processes_and_threads_write_one_folder_at_once(folder, paths):
    """Each writes every image again and again and reads it between: nobody ever sees a half or a missing one."""
    command = [sys.executable, "-c", WRITER, folder, *paths]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and not errors, errors
        written, writes = said.split()
        assert int(written) >= 600 and writes == "True"
    assert len(kept(folder)) == len(paths)
    loader = ImageLoader(SPEC, folder=ImageCache(folder))
    assert all(np.array_equal(loader.pixels(path), ImageLoader(SPEC).pixels(path)) for path in paths)
