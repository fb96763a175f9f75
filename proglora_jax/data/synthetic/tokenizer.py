"""The base model's tokenizer: one piece a word, two-decimal numbers as pieces, and single characters for everything else in ASCII."""

from __future__ import annotations

import functools
import json
import os
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from proglora_jax.data.synthetic import generic, layout
from proglora_jax.data.synthetic.words import named_rng
from proglora_jax.data.templates import INSTRUCTIONS

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
_SPACE = "\u2581"


@functools.lru_cache(maxsize=None)
def vocabulary() -> tuple[str, ...]:
    """All pieces in the order of their ids: specials, characters, roles, numbers, then the words of benchmark and mixture.

    The words are collected from drawn samples (seeded, so the list never changes) and from every instruction set.
    """
    texts = [text for tasks in INSTRUCTIONS.values() for choices in tasks.values() for text in choices]
    for name, task in layout.TASKS.items():
        for i in range(400):
            item = task.draw(named_rng(0, "vocabulary", name, i), 2 if task.train_turns > 1 else 1)
            texts.extend(text for turn in item.turns for text in turn)
    for i in range(6000):
        rng = named_rng(0, "vocabulary", "generic", i)
        texts.extend(text for turn in generic.draw_turns(rng, generic.draw_scene(rng) if i % 3 else None, 3) for text in turn)
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    characters = [chr(code) for code in range(33, 127)]
    numbers = [_SPACE + str(v) for v in range(11)] + [f"{_SPACE}{v / 100:.2f}" for v in range(101)]
    roles = [_SPACE, "\n", _SPACE + "\n", _SPACE + "[", _SPACE + "USER:", _SPACE + "ASSISTANT:", "'s"]
    return *SPECIALS, *characters, *roles, *numbers, *(_SPACE + word for word in words)


def build_tokenizer() -> Tokenizer:
    """A unigram tokenizer over `vocabulary()` whose decoding undoes its encoding exactly.

    A space follows every newline and every `[` before the text is cut, so that a word or number is the same piece there as
    after a space; decoding takes it out again. Words score far above characters, so a known word is never spelled out.
    """
    pieces = vocabulary()
    scored = [(p, -100.0 if p in SPECIALS else -10.0 if len(p) == 1 else -2.0) for p in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=UNK, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace("\n", "\n "), normalizers.Replace("[", "[ "), normalizers.Replace(" ", _SPACE), normalizers.Prepend(_SPACE),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Replace("\n ", "\n"), decoders.Replace("[ ", "["),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def save_tokenizer(folder: str, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers' AutoTokenizer reads them."""
    os.makedirs(folder, exist_ok=True)
    build_tokenizer().save(os.path.join(folder, "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "padding_side": "right",
        "clean_up_tokenization_spaces": False, "extra_special_tokens": {"image_token": "<image>"},
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
