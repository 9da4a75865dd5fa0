"""Sources of rendered kernels: Python files in the folders `sources`, from which generated files are made.

    $name                   a placeholder
    $name on its own line   whole lines including line ends, or nothing

Kernels in C++ are not rendered; see fhopt/codegen/cpu/source_text.py.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from string import Template

_LINES = re.compile(r"^\$(\w+)\n", re.MULTILINE)


@functools.cache
def read_package_source(package: str, name: str) -> Template:
    """Load the file `name` of the sources of `package` ("fhopt.codegen.gpu")."""
    text = files(package).joinpath("sources", name).read_text(encoding="utf-8")
    return Template(_LINES.sub(r"${\1}", text))
