"""Listing of a plan's generated kernels as highlighted text, by Pygments.

Kernels of one model differ in a few lines. Texts are split outside of comments and strings, equal pieces are
highlighted once, and a listing is a list of pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import CppLexer, PythonLexer

from fhopt.codegen.build import render_kernel
from fhopt.codegen.tiers import spec_has_trellis
from fhopt.errors import FhoptError
from fhopt.hardware.kernel_table import kernels_of
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan

LANGUAGES = {"cpp": "C++, for CPUs", "triton": "Triton, for GPUs"}
_ENDINGS = {"cpp": ".cpp", "triton": ".py"}
_OPTIONS = dict(stripnl=False, ensurenl=False)


@dataclass(frozen=True)
class Listing:
    """One file: its name, its language (a key of LANGUAGES), the sites that run it, and its pieces."""

    file: str
    language: str
    sites: tuple[str, ...]
    lines: int
    pieces: tuple[int, ...]


@dataclass
class Listings:
    """All files. pieces: HTML, joined by an empty line."""

    files: list[Listing] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def html(self, listing: Listing) -> str:
        """Return the highlighted text of one file, for a `pre` element."""
        return "\n\n".join(self.pieces[i] for i in listing.pieces)


def list_kernels(plan: LatentPlan) -> Listings:
    """List the kernels of a plan for CPUs and GPUs, in bfloat16; none if the plan stores no latents."""
    result, known = Listings(), dict[tuple[str, str], int]()
    try:
        kernels = kernels_of(plan, "bfloat16")
    except FhoptError:  # only short sliding windows
        return result
    by_spec: dict[str, tuple[KernelSpec, list[str]]] = {}
    for (spec, *_), sites in kernels.items():
        by_spec.setdefault(spec.name, (spec, []))[1].extend(site.site.name for site in sites)
    for target in ("cpp", "triton"):
        lexer: Lexer = (CppLexer if target == "cpp" else PythonLexer)(**_OPTIONS)
        for name, (spec, names) in by_spec.items():
            if target != "cpp" and spec_has_trellis(spec):  # trellis codes: only CPU kernels support them
                continue
            text = render_kernel(spec, target)
            pieces = tuple(_piece(result, known, target, lexer, piece) for piece in _pieces(text, target))
            lines = text.count("\n")
            result.files.append(Listing(name + _ENDINGS[target], target, tuple(names), lines, pieces))
    return result


def _piece(listings: Listings, known: dict[tuple[str, str], int], target: str, lexer: Lexer, text: str) -> int:
    key = (target, text)
    if key not in known:
        known[key] = len(listings.pieces)
        listings.pieces.append(highlight(text, lexer, HtmlFormatter(nowrap=True)).rstrip("\n"))
    return known[key]


def _pieces(text: str, target: str) -> Iterator[str]:
    """Yield the text split at empty lines, except within a triple-quoted string or a C comment."""
    opened, closed = ("/*", "*/") if target == "cpp" else ('"""', "")
    piece = ""
    for part in re.split(r"\n\n", text):
        piece = f"{piece}\n\n{part}" if piece else part
        is_whole = piece.count(opened) == piece.count(closed) if closed else piece.count(opened) % 2 == 0
        if is_whole:
            yield piece
            piece = ""
    if piece:
        yield piece


def style_sheet(selector: str, style: str) -> str:
    """Return Pygments' colors as CSS below a selector."""
    return str(HtmlFormatter(style=style).get_style_defs(selector))
