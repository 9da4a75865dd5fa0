"""The headers that are made are those that C++ sources include."""

from __future__ import annotations

import re
from pathlib import Path

from fhopt.codegen.cpu.calls.headers import headers

SOURCES = Path(__file__).parents[5] / "codegen" / "cpu" / "sources"


def test_every_header_is_included_and_none_is_also_a_file() -> None:
    files = {path.name: path.read_text() for path in SOURCES.iterdir()}
    included = {
        name for text in (*files.values(), *headers().values()) for name in re.findall(r'#include "(.+)"', text)
    }
    assert headers().keys() <= included <= headers().keys() | files.keys()
    assert not headers().keys() & files.keys()
