"""Image preparation: the golden table, odd formats, damaged files, the cache, and specs of model folders."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from data_fixtures import save_pattern, write_json
from PIL import Image

from proglora_jax.data.errors import UserError
from proglora_jax.data.image_files import prepare_pixels
from proglora_jax.data.images import CLIP_MEAN, CLIP_STD, ImageLoader, ImageSpec, load_image, missing_images

BLANK = (-0.01125, -0.01120, -0.00133)
# (width, height), mode, channel means, pixel (168, 168), pixel (0, 0)
GOLDEN = [
    ((640, 427), "crop", (0.06901, 0.15958, 0.26632), (1.63837, -0.19129, 1.23581), (-0.88716, 1.66967, -1.48022)),
    ((640, 427), "pad", (0.04207, 0.10351, 0.12038), (1.81355, -0.07123, 1.30691), BLANK),
    ((427, 640), "crop", (0.06903, 0.15900, 0.26633), (0.99604, -0.46143, 1.23581), (-1.54409, 1.42955, -1.48022)),
    ((427, 640), "pad", (0.04269, 0.10415, 0.12036), (1.08363, -0.34137, 1.30691), BLANK),
    ((500, 500), "crop", (0.06968, 0.16200, 0.16990), (1.27341, 1.32450, 0.41105), (-1.76307, -1.70707, -1.48022)),
    ((500, 500), "pad", (0.06968, 0.16200, 0.16990), (1.27341, 1.32450, 0.41105), (-1.76307, -1.70707, -1.48022)),
    ((333, 1000), "crop", (0.06767, 0.16179, 0.28198), (0.85005, -0.01120, -0.21463), (0.09093, 0.55910, -1.48022)),
    ((333, 1000), "pad", (0.01565, 0.04616, 0.06671), (1.02523, 0.19891, -0.07243), BLANK),
]


@pytest.mark.parametrize(("size", "mode", "means", "centre", "corner"), GOLDEN)
def test_golden_values(tmp_path, size, mode, means, centre, corner):
    image = load_image(save_pattern(str(tmp_path / "a.png"), *size), 336, mode=mode)
    assert image.shape == (336, 336, 3) and image.dtype == np.float32
    # One grey level is about 0.0146: other Pillow versions may round differently.
    np.testing.assert_allclose(image.mean(axis=(0, 1), dtype=np.float64), means, atol=2e-4)
    np.testing.assert_allclose(image[168, 168], centre, atol=0.02)
    np.testing.assert_allclose(image[0, 0], corner, atol=0.02)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (256, 3), (4, 64, 3), (2, 5, 7, 3), (0, 3)])
def test_normalised_bit_for_bit_as_channel_by_channel(shape):
    spec = ImageSpec(8, CLIP_MEAN, (0.5, 0.26130258, 0.3))
    pixels = (np.arange(np.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)
    found = spec.normalise(pixels)
    assert found.shape == shape and found.dtype == np.float32
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std)):
        expected = [(np.float32(one) * np.float32(1 / 255) - np.float32(mean)) / np.float32(std) for one in pixels[..., channel].flat]
        assert found[..., channel].ravel().tolist() == expected


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 500), (333, 1000), (336, 336), (337, 336)])
def test_equals_the_clip_processor(tmp_path, size):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    path = save_pattern(str(tmp_path / "a.png"), *size)
    processor = processors.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    with Image.open(path) as image:
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(load_image(path, 336, mode="crop"), theirs, atol=1e-6)


def test_pad_colour_and_offset(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (8, 3), (255, 0, 0)).save(path)
    pixels = ImageLoader(ImageSpec(8), "pad").pixels(path)
    assert ImageSpec(8).background == (122, 116, 104)
    assert (pixels[:2] == (122, 116, 104)).all() and (pixels[2:5] == (255, 0, 0)).all() and (pixels[5:] == (122, 116, 104)).all()


def _save(image, path, **options):
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "I;16"])
def test_odd_formats_become_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    if mode == "I;16":
        image, extension = Image.fromarray(grey.astype(np.uint16) * 257), "png"
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
        extension = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    loaded = ImageLoader(ImageSpec(64), "crop").pixels(_save(image, tmp_path / f"a.{extension}"))
    # Reducing grey to a palette or to black and white loses more than reading it back may.
    expected = np.asarray(image.convert("RGB")) if mode in ("P", "1") else np.repeat(grey[..., None], 3, axis=-1)
    assert loaded.shape == (64, 64, 3) and np.abs(loaded.astype(int) - expected).max() <= 4


def test_gif_named_jpg_uses_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:])
    path = tmp_path / "a.jpg"
    path.write_bytes(data.getvalue())
    assert ImageLoader(ImageSpec(20)).pixels(str(path))[5, 5].tolist() == [250, 0, 0]


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 40, 20))
    pixels = ImageLoader(ImageSpec(40)).pixels(_save(image, tmp_path / "a.jpg", exif=exif, quality=95))
    assert pixels[2].min() > 200 and pixels[-2].max() < 50


def test_truncated_files_are_read_as_far_as_they_go(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert np.isfinite(load_image(str(path), 56)).all()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"GIF89a"])
def test_damaged_files(tmp_path, content):
    path = str(tmp_path / "a.jpg")
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(UserError, match="cannot be read as an image") as caught:
        load_image(path, 8)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    blank = load_image(path, 8, on_bad="blank")
    np.testing.assert_allclose(blank, np.broadcast_to(BLANK, (8, 8, 3)), atol=1e-4)


def test_missing_files(tmp_path):
    path = str(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="none.jpg: no such image"):
        load_image(path, 8)
    loader = ImageLoader(ImageSpec(8), on_bad="blank")
    assert loader(path).shape == loader(str(tmp_path)).shape == (8, 8, 3) and loader.bad == {path, str(tmp_path)}
    assert missing_images([path, None, path, str(tmp_path), __file__]) == [path, str(tmp_path)]


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too many pixels"):
        load_image(save_pattern(str(tmp_path / "a.png"), 30, 30), 8)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(20000, 2), (2, 20000), (1, 1), (40000, 1)])
def test_extreme_shapes(mode, size):
    assert prepare_pixels(Image.new("RGB", size, (9, 9, 9)), 56, mode, (0, 0, 0)).shape == (56, 56, 3)


def test_strips_are_cropped_as_if_resized_whole():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (30, 900, 3), np.uint8))
    ours = prepare_pixels(image, 56, "crop", (0, 0, 0))
    new = int(56 * 900 / 30)
    whole = image.resize((new, 56), Image.Resampling.BICUBIC).crop(((new - 56) // 2, 0, (new - 56) // 2 + 56, 56))
    assert np.abs(ours.astype(int) - np.asarray(whole)).max() <= 1


def test_cache_is_bounded_and_exact(tmp_path):
    paths = [save_pattern(str(tmp_path / f"{i}.png"), 20 + i, 16) for i in range(5)]
    cached, plain = ImageLoader(ImageSpec(16), cache_bytes=3 * 16 * 16 * 3), ImageLoader(ImageSpec(16))
    for path in paths + paths[::-1]:
        assert np.array_equal(cached(path), plain(path)) and len(cached._cache) <= 3 and not plain._cache
    assert cached._used == 3 * 16 * 16 * 3
    os.remove(paths[0])
    assert np.array_equal(cached(paths[0]), cached(paths[0]))


def test_specs_of_model_folders(tmp_path):
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    settings = {**sizes, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    write_json(str(tmp_path / "old" / "preprocessor_config.json"), settings)
    write_json(str(tmp_path / "new" / "processor_config.json"), {"image_processor": settings, "patch_size": 14})
    write_json(str(tmp_path / "small" / "preprocessor_config.json"), {"size": 48, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert ImageSpec.from_folder(str(tmp_path / "old")) == ImageSpec.from_folder(str(tmp_path / "new")) == ImageSpec(336)
    assert ImageSpec.from_folder(str(tmp_path / "small")) == ImageSpec(48, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "settings",
    [{"size": {"height": 3, "width": 4}}, {"size": "x"}, {"size": 8, "image_std": [0, 1, 1]}, {"size": 8, "image_mean": [1]}, {"size": {}}],
)
def test_bad_specs(tmp_path, settings):
    write_json(str(tmp_path / "preprocessor_config.json"), settings)
    with pytest.raises(UserError, match="preprocessor_config.json: field"):
        ImageSpec.from_folder(str(tmp_path))


def test_missing_specs(tmp_path):
    with pytest.raises(UserError, match="holds no preprocessor_config.json"):
        ImageSpec.from_folder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("[1")
    with pytest.raises(UserError, match="not a readable JSON object"):
        ImageSpec.from_folder(str(tmp_path))
    for options in ({"mode": "x"}, {"on_bad": "x"}):
        with pytest.raises(UserError, match="=x: choose one of"):
            load_image("a", 8, **options)
