"""Text to calibrate and test on: built-in texts that are on every machine, or files of the user's.

Built-in: `topics` (the language reference in `pydoc_data.topics`), `source` (code of the standard library), `license`
(the text of the licence of the interpreter). The first half of a text is for calibration, the second for tests.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError

_SOURCE_MODULES = (
    "argparse",
    "tarfile",
    "zipfile",
    "difflib",
    "ast",
    "subprocess",
    "typing",
    "turtle",
    "doctest",
    "pickle",
)


def read_text(name: str) -> str:
    """The text called `name`: a built-in one, a text file, or a folder of text files. Raises FhoptError."""
    built_in = {"topics": _topics, "source": _source, "license": _license}
    if name in built_in:
        return built_in[name]()
    path = Path(name).expanduser()
    files = (
        sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".rst", ".py")) if path.is_dir() else [path]
    )
    try:
        text = "\n".join(p.read_text(errors="replace") for p in files)
    except OSError as error:
        raise FhoptError(
            f"cannot read {error.filename}: {error.strerror}. Expected a text file, a folder of them, or one of "
            f"{', '.join(built_in)}."
        ) from error
    if not text.strip():
        raise FhoptError(f"{name} holds no text; expected a text file, or a folder with .txt, .md, .rst or .py files.")
    return text


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[k] for k in sorted(topics))


def _source() -> str:
    import importlib

    return "\n".join(inspect.getsource(importlib.import_module(m)) for m in _SOURCE_MODULES)


def _license() -> str:
    import builtins

    printer: Any = getattr(builtins, "license", None)
    if printer is None:
        raise FhoptError("this interpreter was started without the site module; the text `license` is not available.")
    printer._Printer__setup()
    return "\n".join(printer._Printer__lines)


def halves(text: str) -> tuple[str, str]:
    """(calibration, test): the text cut at the line nearest to its middle."""
    middle = text.find("\n", len(text) // 2)
    return (text, "") if middle < 0 else (text[:middle], text[middle:])


def sequences(tokenizer: Any, text: str, *, count: int, length: int, what: str) -> Tensor:
    """Token ids [count, length] from the start of `text`. Raises FhoptError when it is too short."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < count * length:
        raise FhoptError(
            f"{what} has {len(ids)} tokens; expected at least {count * length} ({count} sequences of {length}). "
            "Give a longer text, or fewer or shorter sequences."
        )
    return torch.as_tensor(ids[: count * length]).reshape(count, length)


def digest(ids: Tensor) -> str:
    """Hash of token ids, for a plan's provenance."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
