"""Weights in GGUF blocks: skinny GEMMs and unpacking, in one C++ file for CPUs.

    y[m][n] = sum_k x[m][k] w[n][k] + bias[n]      x [M,K]   w [N,K]   bias [N]   ->   y [M,N]

A block has 32 or 256 numbers of a row of a weight as codes of 2 to 8 bits, with scales and offsets (the layouts of
ggml, `ggml-common.h`). A decode step is bound by reading weights, so that a weight of 4.5 bits takes a quarter of the
time of one of 16. Codes are multiplied as they are, as bytes; the input is split into two bytes of each number, with a
unit for each 32 numbers: 15 bits of the largest of these, where other engines have 8. So results are those of the
dequantized weight, within less than the rounding of bfloat16.

Eight rows of a weight stand side by side (`arranged`): four bytes of codes of each row are a vector of 32 bytes, whose
sums of products are those of eight rows, so that nothing is added across a vector and scales are read for eight rows
at once. Blocks keep their size; rows behind the last eight stand as in the file.

Other formats (IQ1 to IQ3, Q5_0 and Q5_1 among them) have no kernel.

Letters: M rows, K width of the input, N width of the output.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fhopt.codegen.cpu import skinny_linear
from fhopt.codegen.cpu.calls.formats import EIGHT as EIGHT
from fhopt.codegen.cpu.calls.formats import FIELDS
from fhopt.codegen.cpu.calls.formats import FORMATS as FORMATS
from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.cpu.skinny_linear import BlockedWeight

_PART = 1 << 19  # bytes of a weight that are arranged at once


def blocked_row_bytes(format: int, width: int) -> int:
    """Return the bytes of a row of `width` numbers."""
    numbers, size = FORMATS[format]
    return width // numbers * size


def interleave_rows(rows: NDArray[np.uint8], format: int, width: int) -> BlockedWeight:
    """Return a weight whose rows are those of a file, uint8 [N, bytes of a row], with eight of them side by side."""
    made = np.empty(rows.shape, np.uint8)
    made[_whole(rows) :] = rows[_whole(rows) :]

    def arrange(part: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
        of_rows, of_eights = part
        for begin, end, unit in FIELDS[format]:
            of_eights[..., EIGHT * begin : EIGHT * end] = _turned(of_rows[..., begin:end], EIGHT, unit)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy copies side by side
        list(threads.map(arrange, _parts(rows, made, format)))
    return BlockedWeight(torch.from_numpy(made), format, width)


def as_in_file(blocks: BlockedWeight) -> NDArray[np.uint8]:
    """Return the rows of a weight in file order, uint8 [N, bytes per row]."""
    values = blocks.values.numpy()
    made = np.empty(values.shape, np.uint8)
    made[_whole(made) :] = values[_whole(made) :]
    for of_rows, of_eights in _parts(made, values, blocks.format):
        for begin, end, unit in FIELDS[blocks.format]:
            turned = _turned(of_eights[..., EIGHT * begin : EIGHT * end], (end - begin) // unit, unit)
            of_rows[..., begin:end] = turned.reshape(*of_rows.shape[:3], end - begin)
    return made


def _parts(
    rows: NDArray[np.uint8], eights: NDArray[np.uint8], format: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield views of some of the rows, [G, blocks of a row, 8, bytes], and of their eights, [G, blocks, 8 x bytes]."""
    size = FORMATS[format][1]
    whole, blocks = _whole(rows), rows.shape[1] // size
    step = max(EIGHT, _PART // max(1, rows.shape[1]) // EIGHT * EIGHT)
    for first in range(0, whole, step):
        part = slice(first, min(first + step, whole))
        yield (
            rows[part].reshape(-1, EIGHT, blocks, size).swapaxes(1, 2),
            eights[part].reshape(-1, blocks, EIGHT * size),
        )


def _whole(rows: NDArray[np.uint8]) -> int:
    """Return how many rows stand side by side; those behind them are as in the file."""
    return len(rows) // EIGHT * EIGHT


def _turned(numbers: NDArray[np.uint8], rows: int, unit: int) -> NDArray[np.uint8]:
    """Return matrices of `rows` rows of units of bytes with rows and columns exchanged, [G, blocks, bytes]."""
    matrices = np.ascontiguousarray(numbers).view(f"u{unit}").reshape(*numbers.shape[:2], rows, -1)
    return np.ascontiguousarray(matrices.swapaxes(2, 3)).view(np.uint8).reshape(*numbers.shape[:2], -1)


@functools.cache
def most_rows(format: int, dtype: torch.dtype) -> int:
    """Return for how many rows of an input products with blocks are faster than with their numbers.

    dtype: of the input, one of `TYPES`. Without a compiler: 0.
    """
    loaded = LIBRARY.load()
    return 0 if loaded is None else int(loaded.most_block_rows(format, TYPES[dtype]))


def _checked(which: Tensor, rows: int) -> Tensor:
    """Return row indices as the library takes them. Raises IndexError out of range, TypeError for another dtype."""
    if not which.is_cpu or which.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row indices are {which.dtype} on {which.device}; expected torch.int64 on the CPU.")
    if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < rows:
        raise IndexError(f"rows {int(which.min())} to {int(which.max())} of a weight of {rows} rows.")
    return which.long().contiguous()


def unpack_rows(
    blocks: BlockedWeight, dtype: torch.dtype, first: int = 0, end: int | None = None, which: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Return rows of a weight in a dtype of `TYPES`: [first, end), or those of a list; None where there is no compiler.

    which: int32 or int64 [rows], numbers of rows. memory: of that dtype, [any number], dense, on the CPU; what is
    returned is its beginning, if there is room. Raises IndexError where there is no such row, ValueError for other
    memory.
    """
    rows = len(blocks.values)
    if which is not None:
        which = _checked(which, rows)
    loaded = LIBRARY.load()
    if loaded is None:
        return None
    first, end, _ = slice(first, end).indices(rows)
    count = max(0, end - first) if which is None else len(which)
    if memory is not None and (
        memory.dtype != dtype or memory.dim() != 1 or memory.stride(0) != 1 or not memory.is_cpu
    ):
        about = f"{memory.dtype} {tuple(memory.shape)} on {memory.device}"
        raise ValueError(f"memory for numbers is {about}; expected {dtype}, one dimension, dense, on the CPU.")
    if memory is None or memory.numel() < count * blocks.width:
        memory = torch.empty(count * blocks.width, dtype=dtype)
    numbers = memory[: count * blocks.width].view(count, blocks.width)
    loaded.unpack_blocks(
        blocks.format, blocks.values.data_ptr(), blocks.values.stride(0), rows, blocks.width, first,
        None if which is None else which.data_ptr(), count, numbers.data_ptr(), TYPES[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return numbers


@functools.cache
def register_blocks() -> bool:
    """Make products with blocks known to the library of few rows; False where that cannot be done."""
    few, loaded = skinny_linear.LIBRARY.load(), LIBRARY.load()
    if few is None or loaded is None:
        return False
    few.serve_blocks.argtypes, few.serve_blocks.restype = (ctypes.c_void_p,), None
    few.serve_blocks(ctypes.cast(loaded.block_group, ctypes.c_void_p))
    return True


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.unpack_blocks.argtypes = size, pointer, size, size, size, size, pointer, size, pointer, size, size
    library.unpack_blocks.restype = None
    library.most_block_rows.argtypes, library.most_block_rows.restype = (size, size), size
    return library


LIBRARY = CppLibrary(
    "blocks", "block_linear.cpp", _bind, "Block-quantized weights are dequantized, which uses more memory."
)
