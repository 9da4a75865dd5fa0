"""The C++ kernels of latent attention for CPUs: one readable file without dependencies, compiled once on a machine.

    LIBRARY                   the file: `new_kernel` makes the table of a `KernelSpec`, `latent_attention` uses it
    render_attention(spec)    the same file, after a command that compiles it and followed by the table of one spec

What varies with the spec (bit groups, widths, softcap) is data, so that a plan needs no compiler. The file is compiled
by GCC or Clang for whatever vector unit the host has and called through one struct (`Attention`). Products of floats
are written in vector extensions; products of quantized values in intrinsics, as bytes for AVX-512 VNNI
(sources/byte_keys.h), as words of 16 bits for AVX2 (sources/word_keys.h).

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import ctypes
from string import Template
from typing import Any

from fhopt.codegen.compiler import FLAGS, flags_for_products
from fhopt.codegen.cpu.calls.kernels import Tier, Type
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.tiers import Tiers, check_spec
from fhopt.plan.kernel_spec import KernelSpec

LIBRARY = CppLibrary("attention", "attention.cpp", lambda library: library, local_flags=flags_for_products)


def render_attention(spec: KernelSpec) -> str:
    """Render the C++ file with the table of `spec`. The same spec gives the same text. Raises FhoptError."""
    return f"// c++ {' '.join(FLAGS)} -march=native -fopenmp\n{LIBRARY.text()}{render_table(spec)}"


def table_name(spec: KernelSpec) -> str:
    """Return the name of the C++ function that makes the table of `spec`."""
    return f"table_{spec.name.rpartition('_')[2]}"


def render_table(spec: KernelSpec) -> str:
    """Render the C++ function that makes the table of `spec`, once. Raises FhoptError for odd bit groups."""
    check_spec(spec)
    return _TABLE.substitute(
        name=table_name(spec),
        keys=_rows(spec.key_tiers),
        values=_rows(spec.value_tiers),
        numbers=", ".join(map(str, ("keys", *_sizes(spec.key_tiers, spec.key_width), "values",
                                    *_sizes(spec.value_tiers, spec.value_width), *_kinds(spec)))),
    )  # fmt: skip


def new_kernel(function: Any, spec: KernelSpec) -> int:
    """Call `new_kernel` of the compiled library for `spec`; return the address of the table. Raises FhoptError."""
    check_spec(spec)
    sides = (spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)
    numbers = [x for tiers, width in sides for x in (_packed(tiers), *_sizes(tiers, width))]
    return int(function(*numbers, *_kinds(spec)))


def _sizes(tiers: Tiers, width: int) -> tuple[int, int]:
    return len(tiers), width


def _kinds(spec: KernelSpec) -> tuple[int, int]:
    """Return the `Type` of uncoded latents, and whether logits are capped."""
    return Type[spec.dtype.upper()], int(spec.softcap)


def _packed(tiers: Tiers) -> ctypes.Array[Tier]:
    return (Tier * len(tiers))(*[Tier(*tier) for tier in tiers])


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
