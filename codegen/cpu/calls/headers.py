"""The C++ headers that are made of the structs, enumerations and tables that Python and C++ share.

Sources include them by name; none is a file (fhopt/codegen/cpu/source_text.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from fhopt.codegen.cpu.calls import blocks, caches, formats, kernels
from fhopt.codegen.cpu.calls.layouts import declaration
from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.ops import trellis
from fhopt.ops.cache_operands import CPP_OPERANDS


@functools.cache
def headers() -> dict[str, str]:
    """Return the headers in C++ by name."""
    return {
        "number_types.h": _header([], declaration(kernels.Type)),
        "trellis_tables.h": _header([], *_trellis_tables()),
        "kernel_call.h": _header(
            ["number_types.h"], _constant("PAGE_QUANTUM", PAGE_QUANTUM),
            *map(declaration, (kernels.MaskKind, kernels.Tier, kernels.Rows, kernels.Extent, kernels.Attention)),
        ),
        "pack_call.h": _header(["kernel_call.h"], declaration(kernels.Pack)),
        "prefill_call.h": _header(["kernel_call.h"], declaration(kernels.OpenAttention)),
        "page_call.h": _header(
            ["kernel_call.h"], _constant("MAX_PAGE_TOKENS", kernels.MAX_PAGE_TOKENS),
            _constant("MAX_SKETCH_WORDS", kernels.MAX_SKETCH_WORDS),
            *map(declaration, (kernels.Sketches, kernels.Choice, kernels.PagedCall)),
        ),
        "skinny_call.h": _header(
            [], _constant("SIGNED_BYTES", kernels.SIGNED_BYTES), _constant("FORMATS", kernels.FORMATS),
            declaration(kernels.Skinny),
        ),
        "format_tables.h": _header([], *_format_tables()),
        "lm_head_call.h": _header(
            ["number_types.h"], _constant("HEAD_BLOCK", kernels.HEAD_BLOCK), declaration(kernels.HeadSearch)
        ),
        "cache_call.h": _header(["kernel_call.h"], *map(declaration, caches.OF_CACHES)),
        "block_call.h": _header(
            ["cache_call.h", "pack_call.h"], *map(declaration, blocks.OF_BLOCKS),
        ),
        "attend_operands.h": f"#pragma once\n#define ATTEND_OPERANDS {CPP_OPERANDS}\n",
        "program_call.h": _header(["cache_call.h", "skinny_call.h"], *map(declaration, caches.OF_PROGRAMS)),
    }  # fmt: skip


def _header(includes: Sequence[str], *parts: str) -> str:
    named, body = "".join(f'#include "{name}"\n' for name in includes), "\n".join(parts)
    return f"#pragma once\n#include <cstdint>\n{named}\nnamespace {{\n\n{body}\n}}  // namespace\n"


def _constant(name: str, value: int) -> str:
    return f"constexpr int {name} = {value};\n"


def _trellis_tables() -> list[str]:
    tables = (("LEVELS", trellis.LEVELS), ("OFFSETS", trellis.OFFSETS), ("ORDER", trellis.ORDER))
    return [
        f"alignas(16) constexpr uint8_t {name}[{len(table)}] = {{{', '.join(map(str, table))}}};\n"
        for name, table in tables
    ]


def _format_tables() -> list[str]:
    sizes = [(format, *size) for format, size in formats.FORMATS.items()]
    fields = [(format, *field) for format, of_format in formats.FIELDS.items() for field in of_format]
    kinds = map(declaration, (formats.Format, formats.FormatSize, formats.FormatField))
    return [
        _constant("EIGHT", formats.EIGHT),
        *kinds,
        _rows("FormatSize", "SIZES", sizes),
        _rows("FormatField", "FIELDS", fields),
    ]


def _rows(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> str:
    """Declare a table of structs of a format and numbers."""
    body = "".join(f"    {{Format({row[0]:d}), {', '.join(map(str, row[1:]))}}},\n" for row in rows)
    return f"constexpr {kind} {name}[] = {{\n{body}}};\n"
