"""A stand-in for LLaMA's tokenizer: the same ids and pieces for the words of the golden tables, bytes for everything else.

A piece's id is the one that LLaMA's vocabulary has, as the published golden ids say; merges build each piece from its characters, so
where pieces begin and end follows from the same rules (byte pairs, a mark for a blank, a mark put in front of a text).
"""

from __future__ import annotations

import io
import json
import pathlib

import sentencepiece

# The golden prompt's pieces, the role tags, answers and the digits of a box; "▁" is the mark for a blank.
PIECES = {
    319: "▁A", 13563: "▁chat", 1546: "▁between", 263: "▁a", 12758: "▁curious", 1404: "▁user", 322: "▁and", 385: "▁an",
    23116: "▁artificial", 21082: "▁intelligence", 20255: "▁assistant", 29889: ".", 450: "▁The", 4076: "▁gives", 8444: "▁helpful",
    29892: ",", 13173: "▁detailed", 1248: "▁pol", 568: "ite", 6089: "▁answers", 304: "▁to", 278: "▁the", 29915: "'", 29879: "s",
    5155: "▁questions", 3148: "▁US", 1001: "ER", 29901: ":", 29871: "▁", 1799: "SS", 9047: "IST", 13566: "ANT", 11889: "USER",
    518: "▁[", 29962: "]", 29900: "0", 29896: "1", 29906: "2", 29946: "4", 29947: "8",
}  # fmt: skip
SIZE = 32000


def save(folder: pathlib.Path, *, legacy: bool) -> str:
    """Writes the tokenizer as a folder of transformers.

    Args:
        folder: where to.
        legacy: puts the mark in front of every text between special tokens too, as LLaMA's tokenizer did up to transformers 4.32; else
            in front of the whole text only.
    """
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: index for index, piece in PIECES.items()}
    merges: dict[tuple[str, str], None] = {}
    free = (index for index in range(259, SIZE) if index not in PIECES)
    # Short pieces first: of two pieces that overlap, the one with the earlier merges wins, as by LLaMA's scores.
    for piece in sorted(PIECES.values(), key=lambda piece: (piece == "USER", len(piece))):
        for end in range(1, len(piece)):
            for part in (piece[:end], piece[end], piece[: end + 1]):
                if part not in vocabulary:
                    vocabulary[part] = next(free)
            merges[piece[:end], piece[end]] = None
    merges["US", "ER"] = None  # only where no mark stands before it: with one, "▁US" is there first
    vocabulary |= {f"<filler {index}>": index for index in free}
    specials = [dict(id=index, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                for index, token in enumerate(("<unk>", "<s>", "</s>"))]
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" if legacy else "first", "split": False}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
             {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary, "merges": [list(m) for m in merges]}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None,
               "pre_tokenizer": mark, "post_processor": None, "decoder": {"type": "Sequence", "decoders": steps}, "model": model}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return str(folder)


def save_model(folder: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Writes tokenizer.model of a small vocabulary, made as LLaMA's was, with the settings beside it that Vicuna v1.5 is published with."""
    text = ["".join(PIECES.values()).replace("▁", " "), "What is the object in the image? Answer the question in one word or phrase."]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, character_coverage=1.0, hard_vocab_limit=False,
        minloglevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
               for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}
    fields = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False, "pad_token": None,
              "model_max_length": 4096, "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | special), encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
