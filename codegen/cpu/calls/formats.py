"""The GGUF block formats whose matmuls have a kernel, and the fields of a block."""

from __future__ import annotations

import ctypes
from enum import IntEnum

from fhopt.codegen.cpu.calls.layouts import layout


class Format(IntEnum):
    """Formats, as ggml numbers them."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23


FORMATS: dict[int, tuple[int, int]] = {  # numbers and bytes of a block
    Format.Q4_0: (32, 18), Format.Q4_1: (32, 20), Format.Q8_0: (32, 34), Format.Q2_K: (256, 84),
    Format.Q3_K: (256, 110), Format.Q4_K: (256, 144), Format.Q5_K: (256, 176), Format.Q6_K: (256, 210),
    Format.IQ4_NL: (32, 18), Format.IQ4_XS: (256, 136),
}  # fmt: skip
FIELDS: dict[int, tuple[tuple[int, int, int], ...]] = {  # from which byte to which, and how many stay together
    Format.Q4_0: ((0, 2, 2), (2, 18, 4)), Format.Q4_1: ((0, 4, 2), (4, 20, 4)), Format.Q8_0: ((0, 2, 2), (2, 34, 4)),
    Format.Q2_K: ((0, 16, 1), (16, 80, 4), (80, 84, 2)), Format.Q3_K: ((0, 96, 4), (96, 108, 1), (108, 110, 2)),
    Format.Q4_K: ((0, 4, 2), (4, 16, 1), (16, 144, 4)), Format.Q5_K: ((0, 4, 2), (4, 16, 1), (16, 176, 4)),
    Format.Q6_K: ((0, 192, 4), (192, 208, 1), (208, 210, 2)), Format.IQ4_NL: ((0, 2, 2), (2, 18, 4)),
    Format.IQ4_XS: ((0, 4, 2), (4, 8, 1), (8, 136, 4)),
}  # fmt: skip


EIGHT = 8  # rows of a weight that stand side by side


@layout
class FormatSize(ctypes.Structure):
    """Numbers and bytes of a block of a format."""

    format: Format
    numbers: int
    bytes: int


@layout
class FormatField(ctypes.Structure):
    """Bytes [begin, end) of a block of a format; `unit` of them stay together."""

    format: Format
    begin: int
    end: int
    unit: int
