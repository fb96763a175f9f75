"""The golden ids of LLaVA's prompts, by LLaMA's own tokenizer where its folder is given, and by a stand-in with the same ids otherwise."""

from __future__ import annotations

import os

import llama_pieces
import numpy as np
import pytest

from proglora_jax.data.batch import ANSWER, IMAGE
from proglora_jax.data.schema import Example, Question
from proglora_jax.data.templates import TEMPLATES, re_template
from proglora_jax.data.tokens import encode_example, encode_prompt, load_tokenizer

VICUNA = TEMPLATES["vicuna_v1"]
IMAGE_TOKEN = 32000
PATCHES, LIMIT = 576, 2048
BEFORE = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173, 29892, 322, 1248,
    568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871,
]  # fmt: skip
OPEN = [319, 1799, 9047, 13566, 29901]
BOX = [518, 29900, 29889, 29946, 29896, 29892, 29871, 29900, 29889, 29906, 29947, 29962]
USER, GLUED_USER = [3148, 1001, 29901], [11889, 29901]
REAL = pytest.param(
    "llama", marks=pytest.mark.skipif(
    "LLAMA_TOKENIZER" not in os.environ, reason="LLaMA's tokenizer is not here: name its folder (Vicuna's) in LLAMA_TOKENIZER"))


@pytest.fixture(scope="module", params=["stand-in", REAL])
def folders(request, tmp_path_factory):
    """{legacy: folder} of a tokenizer."""
    if request.param == "llama":
        return dict.fromkeys((True, False), os.environ["LLAMA_TOKENIZER"])
    root = tmp_path_factory.mktemp("tokenizers")
    return {legacy: llama_pieces.save(root / str(legacy), legacy=legacy) for legacy in (True, False)}


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def tokenizer(request, folders):
    """A tokenizer of a language model, to which <image> and <pad> are added as a run does."""
    return load_tokenizer(folders[request.param], 32064, legacy=request.param, add_image_token=True)


def answers_of(encoded):
    """Ids of each supervised run."""
    places = np.flatnonzero(encoded.segments == ANSWER)
    return [encoded.tokens[run].tolist() for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]


def test_special_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.image_token_id) == (1, 2, 0, IMAGE_TOKEN)
    assert tokenizer.size == 32002


def test_the_golden_prompt(tokenizer):
    question = Question("1", "ImageNet", "/x.jpg", "A user\nA chat", "")
    ids = encode_prompt(question, tokenizer, VICUNA, 1, LIMIT).tokens.tolist()
    # A lone mark stands before the image (of the blank after "USER:") and after it (every part begins as a text of its own).
    assert ids[: len(BEFORE) + 3] == [*BEFORE, IMAGE_TOKEN, 29871, 13] and ids[-5:] == OPEN
    expanded = encode_prompt(question, tokenizer, VICUNA, PATCHES, LIMIT).tokens.tolist()
    assert expanded == [*ids[: len(BEFORE)], *[IMAGE_TOKEN] * PATCHES, *ids[len(BEFORE) + 1 :]]


def test_a_prompt_without_an_image_has_no_lone_mark(tokenizer):
    ids = encode_prompt(Question("1", "ScienceQA", None, "A user", ""), tokenizer, VICUNA, PATCHES, LIMIT).tokens.tolist()
    assert ids == [*BEFORE[:-1], 319, 1404, *OPEN]


@pytest.mark.parametrize(("answer", "ids"), [("A", [319]), ("2", [29871, 29906]), ("[0.41, 0.28]", BOX)])
def test_answers_and_their_supervised_ids(tokenizer, answer, ids):
    encoded = encode_example(Example("1", "GQA", "/x.jpg", (("A", answer),)), tokenizer, VICUNA, 1, LIMIT)
    assert answers_of(encoded) == [[*ids, 2]]
    assert encoded.tokens.tolist()[-len(ids) - 6 :] == [*OPEN, *ids, 2]


def test_later_turns_begin_as_the_flag_says(tokenizer):
    """CoIN trained with 3148 1001 after </s>; transformers of today write 11889."""
    encoded = encode_example(Example("1", "GQA", "/x.jpg", (("A", "A"), ("A", "2"), ("A", "[0.41, 0.28]"))), tokenizer, VICUNA, 1, LIMIT)
    later = USER if tokenizer.legacy else GLUED_USER
    first = [*BEFORE, IMAGE_TOKEN, 29871, 13]
    ids = encoded.tokens.tolist()
    assert ids[:38] == first
    tail = [319, 2, *later, 319, *OPEN, 29871, 29906, 2, *later, 319, *OPEN, *BOX, 2]
    assert ids[-len(tail) :] == tail
    assert answers_of(encoded) == [[319, 2], [29871, 29906, 2], [*BOX, 2]]
    assert [tokenizer.decode(run) for run in answers_of(encoded)] == ["A", "2", "[0.41, 0.28]"]
    # The mask comes from the construction: with either flag no turn is lost, where the original masks the whole record.
    assert encoded.supervised == 2 + 3 + 13


def test_truncation_keeps_the_left_part_within_the_budget(tokenizer):
    """2,048 positions less 576 of an image leave 1,472 ids; text alone has all 2,048."""
    turns = (("A user " * 10, "A"),) * 120
    for image, budget in (("/x.jpg", LIMIT - PATCHES), (None, LIMIT)):
        record = Example("1", "GQA", image, turns)
        whole = encode_example(record, tokenizer, VICUNA, PATCHES, 10**6)
        cut = encode_example(record, tokenizer, VICUNA, PATCHES, LIMIT)
        assert cut.truncated and len(cut.tokens) == LIMIT and np.count_nonzero(cut.segments != IMAGE) == budget
        assert np.array_equal(cut.tokens, whole.tokens[:LIMIT]) and 0 < cut.supervised < whole.supervised
    long = encode_example(Example("1", "GQA", "/x.jpg", (("A user " * 2000, "A"),)), tokenizer, VICUNA, PATCHES, LIMIT)
    assert long.truncated and long.supervised == 0 and len(long.tokens) == LIMIT


def test_another_instruction_set_changes_the_last_line_only(tokenizer):
    record = Example("7", "GQA", "/x.jpg", (("A user\nthe answers.", "A"), ("A", "2")))
    diverse = re_template(record, "Diverse", 0)
    assert diverse.turns[0][0] == "A user\nRespond to the question briefly, using only one word or a phrase."
    assert diverse.turns[1:] == record.turns[1:] and re_template(diverse, "Original", 0).turns[0][0] == (
        "A user\nAnswer the question using a single word or phrase.")
    before, after = (encode_example(each, tokenizer, VICUNA, 1, LIMIT) for each in (record, diverse))
    assert answers_of(before) == answers_of(after) == [[319, 2], [29871, 29906, 2]]
    shared = len(BEFORE) + 3 + 2  # up to "A user" after the image
    assert before.tokens[:shared].tolist() == after.tokens[:shared].tolist() and before.tokens.tolist() != after.tokens.tolist()
