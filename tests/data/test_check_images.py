"""The check of images: which damage is found, what is only odd, and agreement with what training loads."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from check_fixtures import check, edit, image_path, json_path, only, pristine, root  # noqa: F401 (two are fixtures)
from PIL import Image, ImageFile

from proglora_jax.data.errors import UserError
from proglora_jax.data.image_files import inspect_image, open_rgb, prepare_pixels
from proglora_jax.data.images import ImageLoader, ImageSpec, load_image


def cut_off(path, share=0.5):
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[: int(len(content) * share)])


def png_bomb(path):
    """A PNG of a few bytes that claims 40,000 x 40,000 pixels."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def not_an_image(path):
    with open(path, "w", encoding="utf-8") as file:
        file.write("<html>404 Not Found</html>")


@pytest.mark.parametrize(
    "damage, kind, words",
    [
        (os.remove, "missing_image", "no such image"),
        (lambda path: open(path, "wb").close(), "corrupt_image", "cannot be read as an image"),
        (not_an_image, "corrupt_image", "cannot be read as an image"),
        (png_bomb, "corrupt_image", "too many pixels"),
        (cut_off, "truncated_image", "is cut off or damaged (image file is truncated"),
        (lambda path: cut_off(path, 0.01), "corrupt_image", "cannot be read as an image"),
    ],
)
def test_damaged_images(root, damage, kind, words):
    path = image_path(root, "TextVQA", record=3)
    damage(path)
    findings = check(root)
    sentence = only(findings, kind)
    assert words in sentence and path in sentence
    assert sentence.startswith(f"{json_path(root, 'TextVQA')}: record 3 (id 10000003): ")
    assert {row.task: row.problems[kind] for row in findings.rows if row.problems} == {"TextVQA": 1}
    if kind == "truncated_image":
        assert open_rgb(path).size == findings_size(path)
    else:
        with pytest.raises(UserError) as error:
            load_image(path, 8)
        assert str(error.value).removesuffix(", or set config.data.on_bad_image=blank.") in sentence


def findings_size(path):
    facts = inspect_image(path, tolerant=True)
    return facts.width, facts.height


def test_a_cut_off_png_is_found(root):
    path = image_path(root, "ScienceQA", record=image_records(root, "ScienceQA")[0])
    assert path.endswith(".png")
    cut_off(path, 0.7)
    assert path in only(check(root, "ScienceQA", counts="any"), "truncated_image")


def image_records(root, task):
    records = json.loads(json_path(root, task).read_text(encoding="utf-8"))
    return [number for number, record in enumerate(records) if "image" in record]


def test_an_image_of_many_records_is_reported_once(root):
    def share(records):
        for record in records[1:4]:
            record["image"] = records[0]["image"]

    edit(root, "GQA", "train", share)
    path = image_path(root, "GQA")
    os.remove(path)
    findings = check(root, "GQA", instruction_sets=("Original",))
    assert only(findings, "missing_image").endswith("(3 more records name it)")
    assert findings.rows[0].problems == {"missing_image": 1}


def test_odd_images_are_remarked_on_but_no_problem(root):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(image_path(root, "OCRVQA", record=0), format="GIF")
    rgb.convert("CMYK").save(image_path(root, "OCRVQA", record=1), format="JPEG")
    rgb.save(image_path(root, "OCRVQA", record=2), format="JPEG", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(image_path(root, "OCRVQA", record=3), format="PNG")
    findings = check(root, "OCRVQA")
    assert findings.ok
    remarks = {remark: example for (where, remark), (_, example) in findings.notes.items() if where == "images"}
    assert remarks["GIF data under the name .jpg (read by content)"] == image_path(root, "OCRVQA", record=0)
    assert remarks["pixels of mode CMYK (converted to RGB)"] == image_path(root, "OCRVQA", record=1)
    assert remarks["an EXIF rotation (not applied, as in CoIN)"] == image_path(root, "OCRVQA", record=2)
    assert remarks["pixels of mode I;16 (converted to RGB)"] == image_path(root, "OCRVQA", record=3)


def test_decoding_is_strict_thread_by_thread(tmp_path):
    """While one thread takes what it can get of a file, no other one does."""
    whole, path = str(tmp_path / "whole.jpg"), str(tmp_path / "a.jpg")
    for place in (whole, path):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(place)
    cut_off(path)

    def attempt(number: int) -> str:
        try:
            return inspect_image(path, tolerant=number % 2 == 1).format
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attempt, range(64)))
    assert all(said == "JPEG" for said in found[1::2]) and all("truncated" in said for said in found[::2])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_cut_off_images_are_noted_once_and_used_as_far_as_they_go(tmp_path, caplog):
    whole, path = str(tmp_path / "whole.png"), str(tmp_path / "cut.jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(whole)
    Image.fromarray(pixels).save(path)
    cut_off(path)
    loader = ImageLoader(ImageSpec(32))
    first = [loader(path) for _ in range(2)]
    loader(whole)
    assert loader.cut == {path} and not loader.bad
    assert len(re.findall(r"cut.jpg: is cut off or damaged \(.*truncated.*\)", caplog.text)) == 1
    ImageFile.LOAD_TRUNCATED_IMAGES, before = True, ImageFile.LOAD_TRUNCATED_IMAGES
    try:  # what Pillow gives where everything is tolerated
        with Image.open(path) as image:
            np.testing.assert_array_equal(first[1], load_array(image.convert("RGB")))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    np.testing.assert_array_equal(first[0], first[1])


def load_array(image: Image.Image) -> np.ndarray:
    """What the model sees of an image."""
    spec = ImageSpec(32)
    return spec.normalise(prepare_pixels(image, spec.size, "pad", spec.background))
