"""BERT's tokenizer: texts to the ids of word pieces between [CLS] and [SEP], through the tokenizer's own files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from proglora_jax.data.errors import UserError

FILES = ("tokenizer.json", "vocab.txt")


def load_word_pieces(folder: str, vocab_size: int, max_length: int) -> Callable[[Sequence[str]], list[list[int]]]:
    """Loads the tokenizer of a Hugging Face BERT folder; never looks on the network.

    Args:
        folder: holds tokenizer.json or vocab.txt.
        vocab_size: rows of the model's embedding table.
        max_length: longest text in tokens, [CLS] and [SEP] included; longer ones lose their end.

    Returns:
        A function from texts to their ids.

    Raises:
        UserError: "<folder>: holds no tokenizer.json or vocab.txt ...", "<folder>: the tokenizer cannot be loaded (<why>) ...", "<folder>:
            the tokenizer has no [CLS] and [SEP] ...", "<folder>: the tokenizer has <n> ids but the model's vocabulary has <m> rows ..."
    """
    from transformers import AutoTokenizer  # half a second to import, and only needed here

    if not any(os.path.exists(os.path.join(folder, name)) for name in FILES):
        raise UserError(f"{folder}: holds no {' or '.join(FILES)}; copy the tokenizer's files into it")
    try:
        pretrained = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again") from error
    if pretrained.cls_token_id is None or pretrained.sep_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no [CLS] and [SEP], so it is no BERT's; copy the tokenizer that belongs to the model")
    if len(pretrained) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(pretrained)} ids but the model's vocabulary has {vocab_size} rows; use the tokenizer that "
            "belongs to the model")

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return pretrained(list(texts), truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]

    return encode
