"""Render the C++ kernel of a `KernelSpec`: latent attention for CPUs, one readable C++17 file without dependencies.

What varies with the spec stands in the first page of the file: widths, one unpacking line per bit group, softcap. All
that follows (sources/attention.cpp) is the same text in every file, specialised by these constants. The file is
compiled by GCC or Clang for whatever vector unit the host has and called through one struct (`ARGUMENTS`). Products of
floats are written in vector extensions; products of bytes, for AVX-512 VNNI, in intrinsics
(sources/integer_products.h).

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

from string import Template

from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.codegen.source_files import read_source
from fhopt.codegen.tiers import PLANES, Tiers, check, is_scaled, legend
from fhopt.plan.kernel_spec import KernelSpec

# The C++ struct `Arguments` as a format of the module `struct`: 8 bytes a field, in the order of the struct.
ARGUMENTS = "@8q4q4q4q4q4q5q7q2q2d"
_STORED = {"float32": "Float32", "bfloat16": "BFloat16", "float16": "Float16"}
_UNCODED = {"float32": ("copy_float32", 4), "bfloat16": ("copy_bfloat16", 2), "float16": ("copy_float16", 2)}


def render(spec: KernelSpec) -> str:
    """Render the C++ file of `spec`; the same spec gives the same text. Raises FhoptError for odd bit groups."""
    check(spec)
    return read_source("fhopt.codegen.cpu", "attention.cpp").substitute(
        name=spec.name,
        planes="\n// ".join(PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        capped="cap(x) = softcap tanh(x / softcap)" if spec.softcap else "cap(x) = x (no softcap)",
        key_side=_side("Keys", spec.key_tiers, spec.key_width, spec.dtype),
        value_side=_side("Values", spec.value_tiers, spec.value_width, spec.dtype),
        softcap=str(spec.softcap).lower(),
        page_quantum=PAGE_QUANTUM,
    )


def _side(name: str, tiers: Tiers, width: int, dtype: str) -> str:
    """Render the struct that says how wide a row of one side is and how it becomes floats."""
    copy, size = _UNCODED[dtype]
    scaled = is_scaled(tiers)
    table = tiers or ((8 * size, width, 1.0),)
    fields = (
        (f"int WIDTH = {width};", "R, channels of a row"),
        ("int PAD = padded(WIDTH);", "floats of an unpacked row: whole vectors"),
        (f"int BYTES = {sum(b * w for b, w, _ in table) // 8};", "of a stored row"),
        (f"int ELEMENT = {1 if tiers else size};", "bytes of what strides count"),
        (f"bool SCALED = {str(scaled).lower()};", "a token has a scale"),
        (f"bool IN_PLACE = {'false' if tiers else 'WIDTH % LANES == 0'};", "rows can be read as they are"),
        ("Tier TIERS[] = {", "bits, width, step"),
    )
    return _SIDE.substitute(
        name=name,
        fields="\n".join(f"    static constexpr {field:<32}  // {comment}" for field, comment in fields),
        tiers="\n".join(f"        {{{b}, {w}, {step!r}f}}," for b, w, step in table),
        scale="scale" if scaled and any(bits == 16 for bits, _, _ in tiers) else "/*scale*/",
        stored="Float32" if tiers else _STORED[dtype],
        lines="\n".join(_copy_lines(tiers, scaled) or [f"        {copy}<{width}>(row, z);"]),
    )


def _copy_lines(tiers: Tiers, scaled: bool) -> list[str]:
    """Render the lines that turn each bit group of a row into floats."""
    lines, byte, channel = [], 0, 0
    for bits, width, _ in tiers:
        if bits < 16:
            lines.append(f"        copy_codes<{bits}, {width}>(row + {byte}, z + {channel});")
        else:
            factor = ", 1 / scale" if scaled else ""
            lines.append(f"        copy_float16<{width}>(row + {byte}, z + {channel}{factor});")
        byte, channel = byte + bits * width // 8, channel + width
    return lines


_SIDE = Template("""\
struct $name {
    typedef $stored Stored;  // numbers of a row that is read as it is
$fields
$tiers
    };

    static void unpack(const uint8_t* row, float $scale, float* z) {
$lines
    }
}""")
