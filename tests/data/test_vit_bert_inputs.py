"""What ViT and BERT are fed: images as ViT's own processor makes them, word pieces as BERT's own tokenizer does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_encoders
import transformers
from data_fixtures import save_pattern
from PIL import Image

from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageLoader, ImageSpec
from proglora_jax.data.word_pieces import load_word_pieces

LONG = "What is the object in the image?\nAnswer the question using a single word or phrase."
TEXTS = [LONG, "[0.41, 0.28]", "Crème-brûlée", "a", "", "日本"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny BERT, its tokenizer, and the image settings of ViT-B/16."""
    path = tmp_path_factory.mktemp("encoders")
    tiny_encoders.bert(path)
    fields = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    (path / "preprocessor_config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (224, 224), (37, 500), (100, 100)])
@pytest.mark.parametrize("resample", [2, 3])
def test_images_equal_those_of_the_vit_processor(tmp_path, size, resample):
    path = save_pattern(str(tmp_path / "a.png"), *size)
    fields = {"image_mean": [0.5] * 3, "image_std": [0.5, 0.25, 0.5], "resample": resample, "size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    with Image.open(path) as image:
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = ImageLoader(ImageSpec.from_folder(str(tmp_path), vit=True), "squash")(path)
    assert ours.shape == (224, 224, 3)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_image_settings_that_are_left_out_are_those_of_a_vit(folder, tmp_path):
    assert ImageSpec.from_folder(str(folder), vit=True) == ImageSpec(224, (0.5,) * 3, (0.5,) * 3, 2)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32}')
    assert ImageSpec.from_folder(str(tmp_path), vit=True) == ImageSpec(32, (0.5,) * 3, (0.5,) * 3, 2)
    assert ImageSpec.from_folder(str(tmp_path)).resample == 3
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32, "resample": "bilinear"}')
    with pytest.raises(UserError, match="field resample='bilinear' must be one of Pillow's filters, 0 to 5"):
        ImageSpec.from_folder(str(tmp_path), vit=True)


def test_word_pieces_equal_those_of_the_tokenizer_in_plain_python(folder):
    pieces = load_word_pieces(str(folder), len(tiny_encoders.WORDS), 30)
    theirs = transformers.BertTokenizerLegacy(str(folder / "vocab.txt"))
    ours = pieces(TEXTS)
    for ids, text in zip(ours, TEXTS, strict=True):
        expected = theirs(text)["input_ids"]
        assert ids == (expected if len(expected) <= 30 else [*expected[:29], theirs.sep_token_id])
        assert ids[0] == theirs.cls_token_id
    assert theirs.convert_ids_to_tokens(ours[0][1:5]) == ["what", "is", "the", "object"]  # lower-cased, whole words
    assert [len(ours[i]) for i in (0, 3, 4)] == [30, 3, 2]  # long texts lose their end, short ones are not padded


def test_what_is_no_tokenizer_of_a_bert_is_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.json or vocab.txt; copy the tokenizer's files into it"):
        load_word_pieces(str(tmp_path), 10, 40)
    with pytest.raises(UserError, match=f"the tokenizer has {len(tiny_encoders.WORDS)} ids but the model's vocabulary has 10 rows"):
        load_word_pieces(str(folder), 10, 40)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded") as caught:
        load_word_pieces(str(tmp_path), 10, 40)
    assert "\n" not in str(caught.value)
