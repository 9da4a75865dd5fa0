"""The C++ sources as texts that compile by themselves.

    #include "name.h"   the text of that header, once: of a file in `sources`, or a generated one (calls/headers.py)

Sources are plain C++: after `write_headers(FOLDER)`, `g++ -fsyntax-only -I FOLDER file.cpp` parses them unmodified.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path

from fhopt.codegen.cpu.calls.headers import headers

_INCLUDED = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)


@functools.cache
def read_cpp(name: str) -> str:
    """Return the file `name` of the sources, with the text of its headers instead of its `#include` lines."""
    return _text(name, set())


def _text(name: str, known: set[str]) -> str:
    made = headers().get(name)
    text = files("fhopt.codegen.cpu").joinpath("sources", name).read_text(encoding="utf-8") if made is None else made
    return _INCLUDED.sub(lambda line: _included(line[1], known), text.replace("#pragma once\n", ""))


def _included(name: str, known: set[str]) -> str:
    if name in known:
        return ""
    known.add(name)
    return _text(name, known)


def write_headers(folder: Path) -> None:
    """Write the generated headers into a folder, for a compiler or an editor of the sources."""
    for name, text in headers().items():
        (folder / name).write_text(text, encoding="utf-8")
