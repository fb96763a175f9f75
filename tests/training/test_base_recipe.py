"""The base model's recipe: what patches are taught, how conversations are encoded, what the folder holds, and the shipped folder."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import proglora_jax
from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.checkpoints.sources import read_config
from proglora_jax.data.errors import UserError
from proglora_jax.data.synthetic import scenes
from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.data.synthetic.benchmark import draw_items
from proglora_jax.data.synthetic.words import named_rng
from proglora_jax.training import base_alignment, base_language, base_recipe

SHIPPED = pathlib.Path(proglora_jax.__file__).parent / "assets" / "coin_mini_base"


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer."""
    return pieces.build_tokenizer()


def test_patch_labels_name_what_lies_there(tokenizer):
    ids = tokenizer.get_vocab()
    rng = named_rng(0, "labels")
    scene = scenes.shapes_scene(rng, [("red", "square")])
    x1, y1, x2, y2 = scene.elements[0].box
    words, boxes = base_alignment.patch_labels(scene, ids)
    inside = ((y1 + y2) // 2 // 8) * 6 + (x1 + x2) // 2 // 8
    named = {tokenizer.id_to_token(i) for i in words[inside] if i >= 0}
    assert named == {"\u2581red", "\u2581square"}
    assert [tokenizer.id_to_token(i) for i in boxes[inside]] == [f"\u2581{v / 48:.2f}" for v in (x1, y1, x2, y2)]
    empty = [p for p in range(36) if boxes[p, 0] < 0]
    assert empty and {tokenizer.id_to_token(words[p, 0]) for p in empty} == {"\u2581picture"}


def test_patch_labels_of_a_sign_hold_word_and_letter(tokenizer):
    scene = scenes.sign_scene(named_rng(1, "labels"), ["hotel"])
    words, _ = base_alignment.patch_labels(scene, tokenizer.get_vocab())
    for row, column, letter in scene.canvas.letters:
        named = {tokenizer.id_to_token(i) for i in words[row * 6 + column] if i >= 0}
        assert {"\u2581hotel", letter, "\u2581" + scene.facts["colours"][0]} <= named


def test_every_picture_of_the_mixture_can_be_labelled(tokenizer):
    pool = base_alignment.draw_pictures(0, "test", 60, tokenizer.get_vocab())
    assert pool.pixels.shape == (60, 48, 48, 3) and pool.words.shape == (60, 36, 6) and pool.boxes.shape == (60, 36, 4)
    assert (pool.words[..., 0] >= 0).all()
    again = base_alignment.draw_pictures(0, "test", 60, tokenizer.get_vocab())
    np.testing.assert_array_equal(pool.pixels, again.pixels)
    np.testing.assert_array_equal(pool.words, again.words)


def test_conversations_are_encoded_as_in_tuning(tokenizer):
    ids, labels = base_language.encode_turns(tokenizer, [("What is it?", "a dog"), ("Which?", "b")], 36)
    assert ids.count(pieces.IMAGE) == 36 and ids[0] == pieces.BOS and ids.count(pieces.EOS) == 2
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.count("USER:") == 2 and text.count("ASSISTANT:") == 2
    assert all(ids[position + 1] == label for position, label, _ in labels)
    first = [label for _, label, turn in labels if turn == 0]
    assert tokenizer.decode(first) == "a dog" and first[-1] == pieces.EOS
    blind, _ = base_language.encode_turns(tokenizer, [("What is it?", "a dog")], 0)
    assert pieces.IMAGE not in blind


def test_too_long_conversations_lose_their_last_turns(tokenizer):
    ids, labels = base_language.encode_turns(tokenizer, [("What is the red one?", "It is a dog.")] * 20, 36)
    assert len(ids) <= base_language.LENGTH and len(labels) <= base_language.MOST_LABELS
    assert ids[-1] == pieces.EOS


def test_saved_folder_loads_here_and_holds_everything(tmp_path, tokenizer):
    config = base_recipe.base_config(len(tokenizer.get_vocab()), tied=True)
    tree = base_recipe.initial_tree(config, 0)
    out = tmp_path / "base"
    base_recipe.save_base(tree, config, str(out))
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "preprocessor_config.json", "processor_config.json"}
    llava = load_llava(out, jnp.float32)
    assert not llava.config.tie_word_embeddings
    np.testing.assert_array_equal(llava.language.lm_head.kernel[...], np.asarray(tree["language"]["embed_tokens"]).T)
    np.testing.assert_array_equal(llava.projector_params()["linear_1"]["kernel"], tree["mm_projector"]["linear_1"]["kernel"])


def test_make_base_does_not_overwrite(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        base_recipe.make_base(str(tmp_path))


def _prompt(tokenizer, question: str) -> list[int]:
    head, tail = f"USER: <image>\n{question} ASSISTANT:".split("<image>")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (head, tail)]
    return [pieces.BOS, *ids[0], *[pieces.IMAGE] * 36, *ids[1]]


def test_the_shipped_folder_fits_the_recipe(tokenizer):
    config = read_config(SHIPPED)
    assert config == base_recipe.base_config(len(tokenizer.get_vocab()))
    assert (SHIPPED / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_str(pretty=True)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6_000_000


def test_the_shipped_model_sees_and_speaks(tokenizer):
    llava = load_llava(SHIPPED, jnp.float32)

    @jax.jit
    def next_token(pixels, tokens, last):
        x = llava.embed(tokens, llava.project(llava.encode_image(base_alignment.normalise(pixels))))
        return jnp.argmax(llava.logits(llava.decode(x).hidden[0, last]))

    right = 0
    for i in range(20):
        rng = named_rng(7, "shipped", i)
        scene = scenes.shapes_scene(rng, scenes.random_things(rng, 1, distinct=True))
        one = scene.elements[0]
        ids = _prompt(tokenizer, f"Tell me how the {one.name} is painted.")
        ids += tokenizer.encode(f"The {one.name} is painted", add_special_tokens=False).ids
        tokens = jnp.asarray([ids + [pieces.PAD] * (80 - len(ids))])
        guess = int(next_token(scene.canvas.pixels[None], tokens, len(ids) - 1))
        right += tokenizer.id_to_token(guess) == f"\u2581{one.colour}"
    assert right >= 15


def test_transformers_loads_the_shipped_folder_and_agrees(tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(SHIPPED, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    item = draw_items("GQA", 3, "test", 1)[0]
    ids = _prompt(tokenizer, item.turns[0][0])
    image = np.asarray(base_alignment.normalise(jnp.asarray(item.pixels[None])))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    llava = load_llava(SHIPPED, jnp.float32)
    x = llava.embed(jnp.asarray([ids]), llava.project(llava.encode_image(jnp.asarray(image))))
    np.testing.assert_allclose(llava.logits(llava.decode(x).hidden), expected, atol=2e-4, rtol=1e-4)
