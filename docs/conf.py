"""Configure Sphinx for `make docs`, where warnings are errors and no network is used."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import fhopt

# A warning of torchao, which transformers imports where it is installed, is no warning of the documentation.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

project, author, release = "fhopt", "the fhopt authors", fhopt.__version__
copyright = "Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
default_role = "code"  # docstrings write `name`, not ``name``
html_theme = "furo"
html_title = "fhopt"
html_static_path = ["_static"]
html_css_files = ["fhopt.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options: dict[str, list[str]] = {"top_of_page_buttons": []}
smartquotes = False
suppress_warnings = ["ref.python"]  # annotations name classes without their module, and several modules have a `Report`
templates_path: list[str] = []
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_mock_imports = ["vllm"]  # of fhopt.serving, which is read where vLLM is not installed
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88

_MARKUP = re.compile(r"(\*|\||(?<=\w)_(?=\W|$))")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Convert a docstring to reStructuredText: indented parts become literal blocks, markup characters are escaped."""
    out: list[str] = []
    for block in _blocks(lines):
        if block[0].startswith("    "):
            out += ["::", "", *block, ""]
        else:
            out += [_escaped(line) for line in block] + [""]
    return out


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield runs of lines between blank ones, split where indentation by four begins or ends."""
    block: list[str] = []
    for line in [*lines, ""]:
        is_code, was_code = line.startswith("    "), bool(block) and block[0].startswith("    ")
        if block and (not line.strip() or is_code != was_code):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _escaped(line: str) -> str:
    """Escape markup characters outside of backticks, and end a literal that a letter follows, as in `Plan`s."""
    text = ""
    for part in re.split(r"(`[^`]*`)", line):
        if part.startswith("`"):
            text += part
        else:
            separator = "\\ " if text.endswith("`") and part[:1].isalnum() else ""
            text += separator + _MARKUP.sub(r"\\\1", part)
    return text


def _on_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if not name.startswith("click"):
        lines[:] = as_restructured_text(lines)


def setup(app: Any) -> None:
    """Connect the conversion of docstrings; called by Sphinx."""
    app.connect("autodoc-process-docstring", _on_docstring)
