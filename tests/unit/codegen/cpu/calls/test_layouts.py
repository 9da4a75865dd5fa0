"""Structs that Python and C++ share: their fields, their declaration, their bytes."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Annotated, Any

from fhopt.codegen.cpu.calls.layouts import declaration, layout, packer


class Colour(IntEnum):
    """Colours."""

    RED, BLUE = 3, 5


@layout
class Inner(ctypes.Structure):
    """A number and an address."""

    number: float
    data: Annotated[int, "const float*"]


@layout
class Outer(ctypes.Structure):
    """All that a field may be.

    sizes: of something.
    """

    colour: Colour
    sizes: Annotated[Any, (int, 3)]
    run: Annotated[int, "void (*)(const Inner*)"]
    both: Annotated[Any, (Inner, 2)]
    tables: Annotated[Any, (Annotated[int, "const Inner*"], 2)]


def test_a_struct_is_declared_field_by_field() -> None:
    assert declaration(Outer) == (
        "// All that a field may be. sizes: of something.\n"
        "struct Outer {\n"
        "    Colour colour;\n"
        "    int64_t sizes[3];\n"
        "    void (*run)(const Inner*);\n"
        "    Inner both[2];\n"
        "    const Inner* tables[2];\n"
        "};\n"
        "static_assert(sizeof(Outer) == 88);\n"
    )
    assert declaration(Colour) == "// Colours.\nenum Colour : int64_t {\n    RED = 3, BLUE = 5\n};\n"


def test_packed_fields_are_the_bytes_of_the_struct() -> None:
    made = Outer(
        colour=Colour.BLUE, sizes=(1, 2, 3), run=7, both=(Inner(number=0.5, data=8), Inner(number=-1.0, data=9)),
        tables=(10, 11),
    )  # fmt: skip
    assert packer(Outer)(Colour.BLUE, 1, 2, 3, 7, 0.5, 8, -1.0, 9, 10, 11) == bytes(made)
