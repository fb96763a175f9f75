"""From text to token ids: the tokenizer's wrapper and the piecewise encoding that labels tokens by construction.

A conversation is never rendered and tokenised as a whole. Each piece (text before the image, text after it, `ASSISTANT: `
plus the answer) is tokenised by itself, so which tokens are supervised is known without counting. Segments inside a
human piece follow from the tokenizer's character offsets: a token belongs to INSTRUCTION if it covers at least one
character of the message with its outer white space removed; all others of the piece are TEMPLATE.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proglora_jax.data.batch import ANSWER, IMAGE, INSTRUCTION, TEMPLATE
from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import IMAGE_PLACEHOLDER, Example, Question
from proglora_jax.data.templates import Template

EMPTY_ANSWER_POLICIES = ("drop", "eos")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded record.

    Attributes:
        tokens: i32[n], the image expanded to P copies of the image token id.
        segments: i8[n], codes of data/batch.py.
        truncated: whether the record was cut (the left part is kept).
        empty_answers: number of turns whose answer was empty.
    """

    tokens: np.ndarray
    segments: np.ndarray
    truncated: bool = False
    empty_answers: int = 0

    @property
    def supervised(self) -> int:
        """Number of supervised tokens; 0 means that the record teaches nothing and must be left out."""
        return int(np.count_nonzero(self.segments == ANSWER))

    @property
    def has_image(self) -> bool:
        """Whether any image position is left."""
        return bool(np.any(self.segments == IMAGE))


class Tokenizer:
    """A Hugging Face tokenizer reduced to what encoding and generation need.

    Text is always plain text here: a literal `</s>` or `<image>` in a record never becomes the special token.

    Attributes:
        name: folder it came from, for messages.
        bos_id, eos_id, pad_id, unk_id: special ids; bos_id and unk_id are -1 where the tokenizer has none.
        image_token_id: id of `<image>`.
        size: largest id plus one.
        legacy: True starts every later turn like a fresh text (what CoIN trained with); False glues it to `</s>`.
    """

    def __init__(self, pretrained, name: str, legacy: bool = True):
        self.name, self.legacy, self._pretrained = name, legacy, pretrained
        self._backend = getattr(pretrained, "backend_tokenizer", None)
        if self._backend is None:
            raise UserError(f"{name}: not a fast tokenizer (no tokenizer.json); save it once with transformers' AutoTokenizer")
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = _id(pretrained.eos_token_id)
        self.bos_id, self.unk_id = _id(pretrained.bos_token_id), _id(pretrained.unk_token_id)
        # Vicuna has no padding token and pads with UNK.
        self.pad_id = next((i for i in (_id(pretrained.pad_token_id), self.unk_id, self.eos_id) if i >= 0), 0)
        self.image_token_id = _id(self._backend.token_to_id(IMAGE_PLACEHOLDER))
        self.size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.eos_id < 0:
            raise UserError(f"{name}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
        if self.image_token_id < 0:
            raise UserError(f"{name}: the tokenizer has no {IMAGE_PLACEHOLDER} token; add it as a special token and save the folder")
        self._special = {self.bos_id, self.eos_id, self.image_token_id, self.pad_id} - {self.unk_id}
        self._backend.encode_special_tokens = True

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that no text ever gets, growing."""
        return tuple(sorted(self._special - {-1}))

    def save(self, folder: str) -> None:
        """Writes the tokenizer's files into a folder, with the tokens that were added to it."""
        self._backend.encode_special_tokens = False
        self._pretrained.save_pretrained(folder)
        self._backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        return self.encode_batch([text])[0][0]

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids and character offsets of each text; the tokenizer works on several texts at once."""
        return [self._plain(item.ids, item.offsets) for item in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens and ids beyond the vocabulary left out; white space is not stripped."""
        known = [int(i) for i in ids if 0 <= int(i) < self.size]
        return self._pretrained.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text gets."""
        settings = json.dumps([self._backend.to_str(), self.legacy, self.bos_id, self.eos_id, self.pad_id])
        return hashlib.sha256(settings.encode()).hexdigest()

    @functools.lru_cache(maxsize=16)  # noqa: B019 one tokenizer lives as long as the run
    def glued_start(self, text: str) -> tuple[list[int], list[int]]:
        """(ids of `text` alone, ids of `text` right after EOS); they differ for tokenizers that mark the start of a text."""
        eos = self._backend.id_to_token(self.eos_id)
        alone = self.encode(text)
        self._backend.encode_special_tokens = False
        glued = self._backend.encode(eos + text, add_special_tokens=False).ids
        self._backend.encode_special_tokens = True
        return alone, list(glued[1:]) if glued[:1] == [self.eos_id] else alone

    def _plain(self, ids, offsets):
        """Vocabularies of whole words may hold special tokens as words: they become UNK (or nothing where there is none)."""
        if self._special.isdisjoint(ids):
            return ids, offsets
        kept = [(self.unk_id if i in self._special else i, o) for i, o in zip(ids, offsets) if i not in self._special or self.unk_id >= 0]
        return [i for i, _ in kept], [o for _, o in kept]


def load_tokenizer(folder: str, vocab_size: int = 0, legacy: bool = True, add_image_token: bool = False) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder; never looks on the network.

    Args:
        folder: holds tokenizer.json or tokenizer.model.
        vocab_size: rows of the model's embedding table, or 0 not to check.
        legacy: see `Tokenizer`.
        add_image_token: give a language model's tokenizer, which has no <image>, the next two ids for <image> and <pad>, as
            transformers' conversion of LLaVA does.

    Raises:
        UserError: "<folder>: no such folder", "... holds no tokenizer.json or tokenizer.model", "... cannot be loaded (...)",
            "... has no <image> token ...", "... has 32002 ids but the model's vocabulary has 32000 rows; ..."
    """
    # Without torch, which is not needed here, transformers would begin every run with advice to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # half a second to import, and only needed here

    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; set the tokenizer's folder to a Hugging Face model folder")
    if not any(os.path.exists(os.path.join(folder, file)) for file in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: holds no tokenizer.json or tokenizer.model; copy the tokenizer's files into it")
    try:
        options = {} if legacy else {"legacy": False}
        pretrained = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again") from error
    if add_image_token and IMAGE_PLACEHOLDER not in pretrained.get_vocab():
        pretrained.add_tokens([IMAGE_PLACEHOLDER, "<pad>"], special_tokens=True)
        pretrained.pad_token = "<pad>"
    tokenizer = Tokenizer(pretrained, folder, legacy)
    if vocab_size and tokenizer.size > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} ids but the model's vocabulary has {vocab_size} rows; "
            "use the tokenizer that belongs to the model, or grow the embedding table"
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Encoder:
    """Everything that decides how records become tokens.

    Attributes:
        tokenizer: the tokenizer.
        template: conversation template.
        image_tokens: image positions P per image.
        max_length: longest record in positions, image included.
        max_labels: most supervised tokens per record; 0 for no limit.
        empty_answer: "drop" leaves a turn with an empty answer out, "eos" supervises its EOS only.
    """

    tokenizer: Tokenizer
    template: Template
    image_tokens: int
    max_length: int
    max_labels: int = 0
    empty_answer: str = "drop"

    def __post_init__(self):
        if self.empty_answer not in EMPTY_ANSWER_POLICIES:
            raise UserError(f"config.data.empty_answer={self.empty_answer}: choose one of {', '.join(EMPTY_ANSWER_POLICIES)}")
        if self.max_length <= self.image_tokens:
            raise UserError(f"config.data.max_length={self.max_length}: must be above the {self.image_tokens} positions of one image")

    def encode_examples(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encodes training records, see `encode_example`."""
        answered = [self._answered(example) for example in examples]
        encoded = self._assemble([self._pieces(turns, example.image is not None) for example, turns in zip(examples, answered)])
        results = []
        for example, turns, (tokens, segments) in zip(examples, answered, encoded):
            keep = self._kept(segments)
            empty = sum(not gpt.strip() for _, gpt in example.turns)
            results.append(Encoded(tokens[:keep], segments[:keep], keep < len(tokens), empty))
        return results

    def encode_questions(self, questions: Sequence[Question]) -> list[Encoded]:
        """Encodes prompts, see `encode_prompt`."""
        pieces = [self._pieces([(q.text, "")], q.image is not None, is_open=True) for q in questions]
        return [self._cut_prompt(question, *arrays) for question, arrays in zip(questions, self._assemble(pieces))]

    def _answered(self, example: Example) -> list[tuple[str, str]]:
        if self.empty_answer == "eos":
            return [(human, gpt if gpt.strip() else "") for human, gpt in example.turns]
        return [(human, gpt) for human, gpt in example.turns if gpt.strip()]

    def _pieces(self, turns, image: bool, is_open: bool = False) -> list[_Piece]:
        pieces = []
        for number, (message, answer) in enumerate(turns):
            before, message, after = self.template.user_text(message, number == 0, image and number == 0)
            if image and number == 0:
                opening, before = before.split(IMAGE_PLACEHOLDER, 1)
                pieces += [_Piece("text", opening), _Piece("image")]
            start = len(before) + len(message) - len(message.lstrip())
            stop = len(before) + len(message.rstrip())
            kind = "text" if number == 0 else "later"
            pieces.append(_Piece(kind, before + message + after, start, stop))
            if not is_open:
                pieces.append(_Piece("answer", f"{self.template.assistant} {answer}" if answer else self.template.assistant))
        return pieces

    def _assemble(self, records: Sequence[Sequence[_Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens i32[n] and segments i8[n] of every record, from its pieces."""
        texts = [piece.text for pieces in records for piece in pieces if piece.kind != "image"]
        encodings = iter(self.tokenizer.encode_batch([self.template.assistant, *texts]))
        opening = next(encodings)[0]
        results = []
        for pieces in records:
            tokens = [self.tokenizer.bos_id] if self.tokenizer.bos_id >= 0 else []
            segments = [TEMPLATE] * len(tokens)
            for piece in pieces:
                if piece.kind == "image":
                    ids, codes = [self.tokenizer.image_token_id] * self.image_tokens, [IMAGE] * self.image_tokens
                elif piece.kind == "answer":
                    ids = self._answer_ids(piece.text, next(encodings)[0], opening)
                    codes = [ANSWER] * len(ids)
                else:
                    ids, codes = self._human_ids(piece, *next(encodings))
                tokens += ids
                segments += codes
            results.append((np.asarray(tokens, np.int32), np.asarray(segments, np.int8)))
        return results

    def _answer_ids(self, text: str, ids: list[int], opening: list[int]) -> list[int]:
        if ids[: len(opening)] != opening:
            raise UserError(
                f"{self.tokenizer.name}: the tokens of '{self.template.assistant}' change with the answer that follows "
                f"({text[:60]!r}), so answers cannot be labelled; use a tokenizer that splits words at spaces"
            )
        return [*ids[len(opening) :], self.tokenizer.eos_id]

    def _human_ids(self, piece: _Piece, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        codes = [INSTRUCTION if start < piece.stop and stop > piece.start else TEMPLATE for start, stop in offsets]
        if piece.kind == "later" and not self.tokenizer.legacy:
            alone, glued = self.tokenizer.glued_start(self.template.user.rstrip())
            if ids[: len(alone)] == alone:
                return glued + ids[len(alone) :], [TEMPLATE] * len(glued) + codes[len(alone) :]
        return ids, codes

    def _kept(self, segments: np.ndarray) -> int:
        """How many positions of a training record stay."""
        keep = min(len(segments), self.max_length)
        answers = np.flatnonzero(segments[:keep] == ANSWER)
        return int(answers[self.max_labels]) if self.max_labels and len(answers) > self.max_labels else keep

    def _cut_prompt(self, question: Question, tokens: np.ndarray, segments: np.ndarray) -> Encoded:
        """Cuts the end of a long question, but keeps the role tag after it: without it the model would not answer."""
        excess = len(tokens) - self.max_length
        if excess <= 0:
            return Encoded(tokens, segments)
        message = np.flatnonzero(segments == INSTRUCTION)
        if excess > len(message):
            raise UserError(
                f"{question.task} question {question.id}: the template and image alone need {len(tokens) - len(message)} positions but "
                f"config.data.max_length={self.max_length}; raise it or use the template vicuna_v1_bare"
            )
        stop = int(message[-1]) + 1
        keep = np.r_[0 : stop - excess, stop : len(tokens)]
        return Encoded(tokens[keep], segments[keep], truncated=True)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text that is tokenised by itself: kind text, later (opens a later turn), answer, or image (no text).

    start and stop bound the message's characters inside the text.
    """

    kind: str
    text: str = ""
    start: int = 0
    stop: int = 0


def encode_example(
    example: Example, tokenizer: Tokenizer, template: Template, image_tokens: int, max_length: int,
    max_labels: int = 0, empty_answer: str = "drop",
) -> Encoded:
    """Encodes one training record.

    ids = [BOS]; per turn the human piece (split at the image, which becomes P image tokens), then the tokens of
    `ASSISTANT: answer` after those of `ASSISTANT:`, then EOS. Only those answer tokens and EOS are supervised.

    Args:
        example: the record.
        tokenizer, template, image_tokens, max_length, max_labels, empty_answer: see `Encoder`.

    Returns:
        Encoded; check `supervised == 0` before use.

    Raises:
        UserError: "<tokenizer>: the tokens of 'ASSISTANT:' change with the answer that follows ..."
    """
    return Encoder(tokenizer, template, image_tokens, max_length, max_labels, empty_answer).encode_examples([example])[0]


def encode_prompt(question: Question, tokenizer: Tokenizer, template: Template, image_tokens: int, max_length: int) -> Encoded:
    """Encodes one prompt, ending with the open `ASSISTANT:`; a question that is too long loses its end, not that tag.

    Raises:
        UserError: where even the template does not fit max_length.
    """
    return Encoder(tokenizer, template, image_tokens, max_length).encode_questions([question])[0]


def _id(value: int | None) -> int:
    return -1 if value is None else int(value)
