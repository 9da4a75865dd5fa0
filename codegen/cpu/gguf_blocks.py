"""Weights in the blocks of GGUF files: products of few rows, and unpacking, in one C++ file for CPUs.

    y[m][n] = sum_k x[m][k] w[n][k] + bias[n]      x [M,K]   w [N,K]   bias [N]   ->   y [M,N]

A block has 32 or 256 numbers of a row of a weight as codes of 2 to 8 bits, with scales and offsets (the layouts of
ggml, `ggml-common.h`). A decode step is bound by reading weights, so that a weight of 4.5 bits takes a quarter of the
time of one of 16. Codes are multiplied as they are, as bytes; the input is split into two bytes of each number, with a
unit for each 32 numbers: 15 bits of the largest of these, where other engines have 8. So results are those of the
dequantized weight, within less than the rounding of bfloat16.

Other formats (IQ1 to IQ3, Q5_0 and Q5_1 among them) have no kernel.

Letters: M rows, K width of the input, N width of the output.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from fhopt.codegen.compiler import CompileError, compiles, load
from fhopt.codegen.cpu import skinny_linear
from fhopt.codegen.cpu.skinny_linear import DTYPES, Blocks
from fhopt.codegen.source_files import read_source

NAME = "blocks"  # of the library
FORMATS = {  # as ggml numbers them: numbers and bytes of a block
    2: (32, 18), 3: (32, 20), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176),
    14: (256, 210), 20: (32, 18), 23: (256, 136),
}  # fmt: skip
log = logging.getLogger(__name__)


def row_bytes(format: int, width: int) -> int:
    """Return the bytes of a row of `width` numbers."""
    numbers, size = FORMATS[format]
    return width // numbers * size


def render() -> str:
    """Render the C++ file; it is always the same."""
    return read_source("fhopt.codegen.cpu", "block_linear.cpp").substitute()


def needs_compiling() -> bool:
    """Return whether making the library runs a compiler."""
    return compiles(NAME, render())


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None where it cannot be compiled."""
    try:
        loaded = load(NAME, render())
    except CompileError as error:
        log.info("%s Weights in blocks are dequantized.", error)
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.unpack_blocks.argtypes = size, pointer, size, size, size, pointer, size, size
    loaded.unpack_blocks.restype = None
    return loaded


def unpack(blocks: Blocks, dtype: torch.dtype, first: int = 0, end: int | None = None) -> Tensor | None:
    """Return rows [first, end) of a weight in a dtype of DTYPES; None where there is no compiler."""
    loaded = library()
    if loaded is None:
        return None
    part = blocks.values[first:end]
    numbers = torch.empty((part.shape[0], blocks.width), dtype=dtype)
    loaded.unpack_blocks(
        blocks.format, part.data_ptr(), part.stride(0), part.shape[0], blocks.width, numbers.data_ptr(),
        DTYPES.index(dtype), torch.get_num_threads(),
    )  # fmt: skip
    return numbers


@functools.cache
def serve() -> bool:
    """Make products with blocks known to the library of few rows; False where that cannot be done."""
    try:
        few = load(skinny_linear.NAME, skinny_linear.render())
    except CompileError:
        return False
    loaded = library()
    if loaded is None:
        return False
    few.serve_blocks.argtypes, few.serve_blocks.restype = (ctypes.c_void_p,), None
    few.serve_blocks(ctypes.cast(loaded.block_group, ctypes.c_void_p))
    return True
