"""Kernel sources: files in the language of the kernel, in the folders `sources`, from which generated files are made.

A file has `$name` where text varies. What `#include "name.h"` names is put in its place, so that a generated file needs
no other; lines that switch clang-format off and on are left out.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from string import Template

_INCLUDED = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)
_FORMATTER = re.compile(r"^ *// clang-format (?:off|on)\n", re.MULTILINE)


@functools.cache
def read_source(package: str, name: str) -> Template:
    """Read the file `name` of the sources of `package` ("fhopt.codegen.cpu"), with the files that it includes."""
    return Template(_text(package, name))


def _text(package: str, name: str) -> str:
    text = files(package).joinpath("sources", name).read_text(encoding="utf-8")
    return _INCLUDED.sub(lambda line: _text(package, line[1]), _FORMATTER.sub("", text))
