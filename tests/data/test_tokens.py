"""Encoding: the ids of joint tokenisation, labels by construction, segments, cuts, and tokenizers that cannot be used."""

from __future__ import annotations

import itertools
import json

import llama_pieces
import numpy as np
import pytest
from data_fixtures import save_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proglora_jax.data.batch import ANSWER, IMAGE, INSTRUCTION, TEMPLATE
from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Example, Question
from proglora_jax.data.templates import TEMPLATES
from proglora_jax.data.tokens import Encoder, encode_example, encode_prompt, load_tokenizer

VICUNA = TEMPLATES["vicuna_v1"]
ANSWERS = ["A", "2", "Toaster.", "[0.41, 0.28, 0.6, 0.9]", " lead", "trail ", "été", "猫", 'a "b"', "x\ny"]
ANSWERS += ["</s>", "USER: hi", "<image>"]
QUESTIONS = ["What?", "Q\nA. x\nB. y\nAnswer.", " blanks ", "é?", "ASSISTANT: no", "a</s>b"]


@pytest.fixture(scope="module", params=["always", "prepend", "first"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(save_tokenizer(str(tmp_path_factory.mktemp(request.param)), request.param))


@pytest.fixture(scope="module")
def always(tmp_path_factory):
    return load_tokenizer(save_tokenizer(str(tmp_path_factory.mktemp("tok")), "always"))


def example(*turns, image="/x.jpg"):
    return Example("7", "GQA", image, turns)


def spans(segments, code):
    """Lists of positions of each unbroken run of a code."""
    positions = np.flatnonzero(segments == code)
    return [list(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(run)]


def joint_ids(tokenizer, turns, image):
    """The original procedure: render, split at the image, tokenise each chunk from scratch with special tokens on."""
    backend = tokenizer._pretrained.backend_tokenizer
    backend.encode_special_tokens = False
    ids = [tokenizer.bos_id]
    for number, chunk in enumerate(VICUNA.render(turns, image).split("<image>")):
        ids += ([tokenizer.image_token_id] if number else []) + backend.encode(chunk, add_special_tokens=False).ids
    backend.encode_special_tokens = True
    return ids


@pytest.mark.parametrize("image", [True, False])
def test_ids_equal_joint_tokenisation(always, image):
    plain = [a for a in ANSWERS if a not in ("</s>", "<image>")]
    for answer, question, turns in itertools.product(plain, QUESTIONS[:4], (1, 3)):
        record = example(*[(question, answer)] * turns, image="/x.jpg" if image else None)
        encoded = encode_example(record, always, VICUNA, 1, 4096)
        assert encoded.tokens.tolist() == joint_ids(always, record.turns, image)


def test_glued_turns_without_legacy(tmp_path):
    folder = save_tokenizer(str(tmp_path), "first")
    record = example(("Q1", "A1"), ("Q2", "A2"), ("Q3", "3"))
    glued = encode_example(record, load_tokenizer(folder, legacy=False), VICUNA, 1, 4096)
    tokenizer = load_tokenizer(folder)
    legacy = encode_example(record, tokenizer, VICUNA, 1, 4096)
    assert glued.tokens.tolist() == joint_ids(tokenizer, record.turns, True)
    assert glued.tokens.tolist() != legacy.tokens.tolist()
    single = example(("Q1", "A1"))
    assert encode_example(single, tokenizer, VICUNA, 1, 4096).tokens.tolist() == joint_ids(tokenizer, single.turns, True)


def test_two_turns_supervise_both_answers(tokenizer):
    encoded = encode_example(example(("Q1", "A1"), ("Q2", "A2")), tokenizer, VICUNA, 4, 4096)
    runs = spans(encoded.segments, ANSWER)
    assert len(runs) == 2 and encoded.supervised == sum(map(len, runs))
    for run, answer in zip(runs, ("A1", "A2")):
        assert encoded.tokens[run[-1]] == tokenizer.eos_id
        assert tokenizer.decode(encoded.tokens[run]).strip() == answer
    assert encoded.tokens[0] == tokenizer.bos_id and encoded.segments[0] == TEMPLATE
    assert np.count_nonzero(encoded.tokens == tokenizer.bos_id) == 1
    assert not encoded.truncated


def test_image_is_expanded_in_place(tokenizer):
    short = encode_example(example(("Q", "A")), tokenizer, VICUNA, 1, 4096)
    long = encode_example(example(("Q", "A")), tokenizer, VICUNA, 9, 4096)
    (run,) = spans(long.segments, IMAGE)
    assert len(run) == 9 and np.array_equal(np.flatnonzero(long.tokens == tokenizer.image_token_id), run)
    assert np.array_equal(np.delete(long.tokens, run[1:]), short.tokens)
    # As in the original, a lone start-of-text mark stands on both sides of the image.
    mark = tokenizer.encode(" ")[0]
    assert long.tokens[run[0] - 1] == mark and long.tokens[run[-1] + 1] == mark and long.segments[run[-1] + 1] == TEMPLATE


@pytest.mark.parametrize("answer", ANSWERS)
def test_any_answer_is_supervised_exactly(tokenizer, answer):
    encoded = encode_example(example(("What?", answer)), tokenizer, VICUNA, 2, 4096)
    supervised = encoded.tokens[encoded.segments == ANSWER]
    assert supervised[-1] == tokenizer.eos_id and np.count_nonzero(encoded.tokens == tokenizer.eos_id) == 1
    assert np.count_nonzero(encoded.tokens == tokenizer.image_token_id) == 2
    opening = tokenizer.encode("ASSISTANT:")
    assert opening + supervised[:-1].tolist() == tokenizer.encode(f"ASSISTANT: {answer}")


@pytest.mark.parametrize("question", QUESTIONS)
def test_instruction_segment_is_the_human_text(tokenizer, question):
    for image in ("/x.jpg", None):
        record = example((question, "A"), (question, "B"), image=image)
        encoded = encode_example(record, tokenizer, VICUNA, 3, 4096)
        runs = spans(encoded.segments, INSTRUCTION)
        assert len(runs) == 2
        for run in runs:
            assert tokenizer.decode(encoded.tokens[run]).strip() == question.strip()


def test_prompt_is_a_prefix_of_the_training_record(tokenizer):
    for image in ("/x.jpg", None):
        trained = encode_example(example(("Q\nline", "A"), image=image), tokenizer, VICUNA, 3, 4096)
        prompt = encode_prompt(Question("1", "GQA", image, "Q\nline", ""), tokenizer, VICUNA, 3, 4096)
        n = len(prompt.tokens)
        assert np.array_equal(prompt.tokens, trained.tokens[:n]) and np.array_equal(prompt.segments, trained.segments[:n])
        assert trained.segments[n] == ANSWER and prompt.supervised == 0


def test_long_records_keep_their_left_part(always):
    encoded = encode_example(example(("word " * 2000, "A")), always, VICUNA, 16, 512)
    assert encoded.truncated and len(encoded.tokens) == 512 and encoded.supervised == 0 and encoded.has_image
    many = encode_example(example(*[("Q", "A")] * 50), always, VICUNA, 16, 256)
    whole = encode_example(example(*[("Q", "A")] * 50), always, VICUNA, 16, 4096)
    assert many.truncated and 0 < many.supervised < whole.supervised and np.array_equal(many.tokens, whole.tokens[:256])


def test_label_limit_cuts_the_record(always):
    record = example(("Q", "A"), ("Q", "A"))
    whole = encode_example(record, always, VICUNA, 1, 4096)
    cut = encode_example(record, always, VICUNA, 1, 4096, max_labels=3)
    assert cut.truncated and cut.supervised == 3 and np.array_equal(cut.tokens, whole.tokens[: len(cut.tokens)])
    assert not encode_example(record, always, VICUNA, 1, 4096, max_labels=whole.supervised).truncated


def test_long_prompt_keeps_its_role_tag(always):
    whole = encode_prompt(Question("1", "GQA", "/x.jpg", "word " * 500, ""), always, VICUNA, 16, 4096)
    cut = encode_prompt(Question("1", "GQA", "/x.jpg", "word " * 500, ""), always, VICUNA, 16, 400)
    assert cut.truncated and len(cut.tokens) == 400 and np.array_equal(cut.tokens[:380], whole.tokens[:380])
    tail = always.encode("ASSISTANT:")
    assert cut.tokens[-len(tail) :].tolist() == tail == whole.tokens[-len(tail) :].tolist()
    with pytest.raises(UserError, match="GQA question 1: the template and image alone need"):
        encode_prompt(Question("1", "GQA", "/x.jpg", "Q", ""), always, VICUNA, 16, 20)


def test_empty_answers(always):
    record = example(("Q1", " "), ("Q2", "A"))
    dropped = encode_example(record, always, VICUNA, 2, 4096)
    assert dropped.empty_answers == 1
    assert np.array_equal(dropped.tokens, encode_example(example(("Q2", "A")), always, VICUNA, 2, 4096).tokens)
    kept = encode_example(record, always, VICUNA, 2, 4096, empty_answer="eos")
    first, second = spans(kept.segments, ANSWER)
    assert kept.tokens[first].tolist() == [always.eos_id] and len(second) > 1 and kept.empty_answers == 1
    assert encode_example(example(("Q", "")), always, VICUNA, 2, 4096).supervised == 0


def test_bad_settings(always):
    with pytest.raises(UserError, match="config.data.empty_answer=x"):
        Encoder(always, VICUNA, 1, 10, empty_answer="x")
    with pytest.raises(UserError, match="config.data.max_length=576"):
        Encoder(always, VICUNA, 576, 576)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="has no <image> token"):
        load_tokenizer(save_tokenizer(str(tmp_path / "plain"), image=False))
    folder = save_tokenizer(str(tmp_path / "good"))
    size = load_tokenizer(folder).size
    assert load_tokenizer(folder, vocab_size=size).size == size
    with pytest.raises(UserError, match=f"has {size} ids but the model's vocabulary has {size - 1} rows"):
        load_tokenizer(folder, vocab_size=size - 1)
    (tmp_path / "good" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_missing_eos(tmp_path):
    folder = save_tokenizer(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(folder)


def test_words_as_tokens(tmp_path):
    words = ["<unk>", "<s>", "</s>", "<image>", "ASSISTANT", "USER", ":", "yes", "what"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    # Special tokens that are words of the vocabulary must not be reachable from text.
    assert tokenizer.encode("what </s> <image> yes") == [8, 0, 0, 7]
    encoded = encode_example(example(("what <image>", "yes")), tokenizer, TEMPLATES["vicuna_v1_bare"], 2, 64)
    assert encoded.tokens.tolist() == [1, 5, 6, 3, 3, 8, 0, 4, 6, 7, 2]
    assert encoded.segments.tolist() == [1, 1, 1, 3, 3, 2, 2, 1, 1, 4, 4]


def test_prefix_that_changes_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.model = models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2, "ASSISTANT:": 3}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokens of 'ASSISTANT:' change with the answer"):
        encode_example(example(("Q", "A")), load_tokenizer(str(tmp_path)), VICUNA, 1, 64)


@pytest.mark.parametrize("kind", ["llama", "llava_llama"])
@pytest.mark.parametrize("named", [True, False], ids=["class", "no class"])
def test_a_folder_with_tokenizer_model_alone_gives_sentencepieces_ids(tmp_path, kind, named):
    """Vicuna v1.5 as published, and original LLaVA's config.json beside it, a type that transformers does not know."""
    oracle = llama_pieces.save_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": oracle.vocab_size()}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if named or name != "tokenizer_class"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path), 448, add_image_token=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0) and oracle.vocab_size() == 400
    assert (tokenizer.image_token_id, tokenizer.pad_id, tokenizer.size) == (400, 401, 402)
    for text in (*(answer for answer in ANSWERS if answer != " lead"), *QUESTIONS[3:], "\n12 cats", VICUNA.system + " USER: "):
        assert tokenizer.encode(text) == oracle.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_and_fingerprint(always, tmp_path):
    ids = always.encode("Toaster. 0.41") + [always.eos_id, always.size + 5]
    assert always.decode(ids) == "Toaster. 0.41"
    again = load_tokenizer(save_tokenizer(str(tmp_path), "always"))
    assert again.fingerprint == always.fingerprint != load_tokenizer(str(tmp_path), legacy=False).fingerprint
