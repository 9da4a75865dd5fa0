"""The C++ kernels of latent attention for CPUs: one readable file without dependencies, compiled once on a machine.

    library()       the file: `new_kernel` makes the table of a `KernelSpec`, `latent_attention` computes by a table
    render(spec)    the same file, with the table of one spec behind it, for who reads or embeds it

What varies with the spec (bit groups, widths, softcap) is data, so that a plan needs no compiler. The file is compiled
by GCC or Clang for whatever vector unit the host has and called through one struct (`ARGUMENTS`). Products of floats
are written in vector extensions; products of quantized values in intrinsics, as bytes for AVX-512 VNNI
(sources/byte_tiles.h), as words of 16 bits for AVX2 (sources/word_tiles.h).

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import functools
import struct
from string import Template
from typing import Any

from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.codegen.source_files import read_source
from fhopt.codegen.tiers import PLANES, TABLES, UNCODED_DTYPES, Tiers, check
from fhopt.plan.kernel_spec import KernelSpec

# The C++ struct `Arguments` as a format of the module `struct`: 8 bytes a field, in the order of the struct.
ARGUMENTS = "@8q4q4q4q4q4q5q7q2q2dPqPq2qP"
NAME = "attention"  # of the library


@functools.cache
def library() -> str:
    """Render the C++ file that serves every spec; it is always the same."""
    text = read_source("fhopt.codegen.cpu", "attention.cpp")
    return text.substitute(planes="\n// ".join(PLANES), page_quantum=PAGE_QUANTUM, **TABLES)


def render(spec: KernelSpec) -> str:
    """Render the C++ file with the table of `spec`. The same spec gives the same text. Raises FhoptError."""
    return library() + table(spec)


def table_name(spec: KernelSpec) -> str:
    """Return the name of the C++ function that makes the table of `spec`."""
    return f"table_{spec.name.rpartition('_')[2]}"


def table(spec: KernelSpec) -> str:
    """Render the C++ function that makes the table of `spec`, once. Raises FhoptError for odd bit groups."""
    check(spec)
    return _TABLE.substitute(
        name=table_name(spec),
        keys=_rows(spec.key_tiers),
        values=_rows(spec.value_tiers),
        numbers=", ".join(map(str, ("keys", *_sizes(spec.key_tiers, spec.key_width), "values",
                                    *_sizes(spec.value_tiers, spec.value_width), *_kinds(spec)))),
    )  # fmt: skip


def new_kernel(function: Any, spec: KernelSpec) -> int:
    """Call `new_kernel` of the compiled library for `spec`; return the address of the table. Raises FhoptError."""
    check(spec)
    sides = (spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)
    numbers = [x for tiers, width in sides for x in (_packed(tiers), *_sizes(tiers, width))]
    return int(function(*numbers, *_kinds(spec)))


def _sizes(tiers: Tiers, width: int) -> tuple[int, int]:
    return len(tiers), width


def _kinds(spec: KernelSpec) -> tuple[int, int]:
    """Return what `Stored` says of the type of uncoded latents, and whether logits are capped."""
    return UNCODED_DTYPES.index(spec.dtype), int(spec.softcap)


def _packed(tiers: Tiers) -> bytes:
    """Return the C++ structs `Tier`."""
    return b"".join(struct.pack("@2qd", *tier) for tier in tiers)


def _rows(tiers: Tiers) -> str:
    return "".join(f"\n        {{{bits}, {width}, {step!r}}}," for bits, width, step in tiers or ((0, 0, 0.0),))


_TABLE = Template("""
extern "C" const void* $name() {
    static const Tier keys[] = {  // bits, width, step; none where rows are not quantized$keys
    };
    static const Tier values[] = {$values
    };
    static const void* const kernel = new_kernel($numbers);
    return kernel;
}
""")
