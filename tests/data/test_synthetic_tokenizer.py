"""The base model's tokenizer: nothing is lost, known words are one piece, and transformers reads it to the same ids."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.data.synthetic.benchmark import draw_items
from proglora_jax.data.synthetic.generic import draw_scene, draw_turns
from proglora_jax.data.synthetic.layout import TASKS
from proglora_jax.data.synthetic.words import named_rng
from proglora_jax.data.templates import INSTRUCTIONS, with_instruction


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer."""
    return pieces.build_tokenizer()


def ids_of(tokenizer, text: str) -> list[int]:
    """Ids without BOS."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_specials_come_first_and_pieces_are_unique(tokenizer):
    vocabulary = pieces.vocabulary()
    assert vocabulary == pieces.vocabulary() and len(set(vocabulary)) == len(vocabulary)
    assert 400 <= len(vocabulary) <= 700
    for name, token in (("<unk>", pieces.UNK), ("<s>", pieces.BOS), ("</s>", pieces.EOS), ("<pad>", pieces.PAD), ("<image>", pieces.IMAGE)):
        assert tokenizer.token_to_id(name) == token and vocabulary[token] == name
    assert tokenizer.get_vocab_size() == len(vocabulary)


@pytest.mark.parametrize("name", list(TASKS))
def test_answers_survive_and_every_word_is_known(tokenizer, name):
    known = set(range(pieces.IMAGE + 95, len(pieces.vocabulary())))
    for item in draw_items(name, 0, "test", 150):
        for question, answer in item.turns:
            answer += "." if name == "ImageNet" else ""
            assert tokenizer.decode(ids_of(tokenizer, answer)) == answer
            assert tokenizer.decode(ids_of(tokenizer, question)) == question
            prompt, whole = ids_of(tokenizer, "ASSISTANT:"), ids_of(tokenizer, f"ASSISTANT: {answer}")
            assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[len(prompt) :]) == answer
            words = [i for i in ids_of(tokenizer, question + " " + answer) if tokenizer.id_to_token(i)[-1].isalnum()]
            assert set(words) <= known | {i for i in words if tokenizer.id_to_token(i).startswith("\u2581")}


def test_instructions_and_the_generic_mixture_survive(tokenizer):
    for tasks in INSTRUCTIONS.values():
        for name, choices in tasks.items():
            for choice in choices:
                text = with_instruction("What?", choice, name)
                assert tokenizer.decode(ids_of(tokenizer, text)) == text
                assert not any(len(tokenizer.id_to_token(i)) == 1 and tokenizer.id_to_token(i).isalnum() for i in ids_of(tokenizer, text))
    for i in range(100):
        rng = named_rng(9, "tokenizer", i)
        for turn in draw_turns(rng, draw_scene(rng), 2):
            assert all(tokenizer.decode(ids_of(tokenizer, text)) == text for text in turn)


@pytest.mark.parametrize(
    "text", ["[0.41, 0.28, 0.60, 0.93]", "[1.00, 0.00, 0.5, 12.345]", "House.", "Zyx {q}~!\n\n a  b ", "\nA. x\nB. y", " ", "[[", "[ 1"]
)
def test_any_ascii_text_survives(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_boxes_are_short_and_numbers_are_pieces(tokenizer):
    box = tokenizer.encode("[0.41, 0.28, 0.60, 0.93]", add_special_tokens=False).tokens
    assert box == ["\u2581[", "\u25810.41", ",", "\u25810.28", ",", "\u25810.60", ",", "\u25810.93", "]"]


def test_unknown_characters_become_unk(tokenizer):
    assert pieces.UNK in ids_of(tokenizer, "caf\u00e9")


def test_transformers_reads_the_same_tokenizer(tokenizer, tmp_path):
    pieces.save_tokenizer(str(tmp_path), 512)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: <image>\nWhat is in [0.41, 0.28]?\nAnswer the question using a single word or phrase. ASSISTANT:"
    chunks = text.split("<image>")
    piecewise = [pieces.BOS, *ids_of(tokenizer, chunks[0]), pieces.IMAGE, *ids_of(tokenizer, chunks[1])]
    assert theirs(text).input_ids == piecewise
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 3, 0)
    assert theirs.convert_tokens_to_ids("<image>") == pieces.IMAGE and theirs.model_max_length == 512
    answer = "[0.41, 0.28, 0.60, 0.93]"
    assert theirs.decode(theirs(answer, add_special_tokens=False).input_ids) == answer
