"""Kernel sources: files in the language of the kernel, in the folders `sources`, from which generated files are made.

    $name                   a placeholder
    $name on its own line   whole lines including line ends, or nothing
    #include "name.h"       the text of that file, so that a generated file needs no other
    //: words               a comment on the source; dropped, as are lines that switch clang-format off and on

In C++ a placeholder for a definition has a semicolon, without which clang-format would join two of them.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from string import Template

_LINES = re.compile(r"^\$(\w+)\n", re.MULTILINE)
_INCLUDED = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)
_LEFT_OUT = re.compile(r"^ *//(?: clang-format (?:off|on)|:.*)\n", re.MULTILINE)


@functools.cache
def read_source(package: str, name: str) -> Template:
    """Load the file `name` of the sources of `package` ("fhopt.codegen.cpu"), with its included files."""
    return Template(_LINES.sub(r"${\1}", _text(package, name)))


def _text(package: str, name: str) -> str:
    text = files(package).joinpath("sources", name).read_text(encoding="utf-8")
    return _INCLUDED.sub(lambda line: _text(package, line[1]), _LEFT_OUT.sub("", text))
