"""A character-level tokenizer."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def characters(start: str | None = None) -> Any:
    """Make a character-level tokenizer; `start` is put before every text."""
    vocabulary = {w: i for i, w in enumerate(["[UNK]", *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if start:
        tokenizer.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[(start, vocabulary[start])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
