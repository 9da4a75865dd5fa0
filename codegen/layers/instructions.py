"""Instructions of a layer program, on values in the arena, and their packing for C++.

Letters: M rows, K width of the input of a matmul.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhopt.codegen.layers.trace import UnsupportedError

TYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTRUCTION = struct.Struct("@5q5q5q5q2q5qd4q")
(
    LOAD, STORE, COPY, FILL, ADD, SUBTRACT, MULTIPLY, DIVIDE, LARGEST, LEAST, NEGATE, ABSOLUTE, SQUARE_ROOT,
    INVERSE_ROOT, INVERSE, EXPONENTIAL, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, MEAN, SUM, LINEAR,
) = range(25)  # fmt: skip


@dataclass(eq=False)
class Buffer:
    """A range of floats in the arena: size and offset; -1: not assigned yet."""

    size: int
    offset: int = -1

    @property
    def room(self) -> int:
        """Return its allocated floats: a whole number of CPU cache lines."""
        return -(-max(self.size, 1) // 16) * 16


@dataclass(frozen=True, eq=False)
class Value:
    """A value while lowering: a view of a buffer, or of an external tensor. view: on the meta device."""

    view: Tensor
    buffer: Buffer | None = None
    external: int = -1


@dataclass(eq=False)
class Instruction:
    """An instruction; fields as in sources/layer_program.cpp. joined: further matmuls of the same input."""

    code: int
    sizes: tuple[int, ...]
    out: Value
    a: Value | None = None
    b: Value | None = None
    external: int = -1
    type: int = 0
    number: float = 0.0
    bias: int = -1
    scale: int = -1
    weight_row: int = 0
    joined: list[Instruction] = field(default_factory=list)  # further matmuls of the same input

    @property
    def touched(self) -> list[Buffer]:
        """Return the buffers that it reads or writes."""
        found = [v.buffer for v in (self.out, self.a, self.b) if v is not None and v.buffer is not None]
        return found + [buffer for other in self.joined for buffer in other.touched]


def four(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as four sizes. Raises UnsupportedError for more dimensions that are not 1."""
    sizes = [int(n) for n in shape if n != 1]
    if len(sizes) > 4:
        raise UnsupportedError(f"an array of {len(sizes)} dimensions")
    return (*(1,) * (4 - len(sizes)), *sizes)


def _strides(view: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides for the four sizes of `four(view.shape)`."""
    strides = [int(step) for step, n in zip(view.stride(), view.shape, strict=True) if n != 1]
    return (*(0,) * (len(sizes) - len(strides)), *strides)


def row_layout(view: Tensor) -> tuple[int, int] | None:
    """Return (rows, row stride) of a row-major value [..., K]; None for any other layout."""
    if view.shape[-1] > 1 and view.stride(-1) != 1:
        return None
    leading = [(n, step) for n, step in zip(view.shape[:-1], view.stride()[:-1], strict=True) if n != 1]
    for (_, outer), (n, inner) in itertools.pairwise(leading):
        if outer != n * inner:
            return None
    return math.prod(n for n, _ in leading), leading[-1][1] if leading else view.shape[-1]


# --------------------------------------------------------------------------------------------------- packing


def place(instructions: list[Instruction]) -> int:
    """Assign arena offsets to buffers, reusing freed ranges; return the arena size in floats."""
    last: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for buffer in instruction.touched:
            last[id(buffer)] = number
    free: list[tuple[int, int]] = []  # (offset, size)
    end = 0
    for number, instruction in enumerate(instructions):
        for buffer in instruction.touched:
            if buffer.offset < 0:
                size = buffer.room
                fit = next((f for f in free if f[1] >= size), None)
                if fit is None:
                    buffer.offset, end = end, end + size
                else:
                    free.remove(fit)
                    buffer.offset = fit[0]
                    if fit[1] > size:
                        free.append((fit[0] + size, fit[1] - size))
        done = {id(b): b for b in instruction.touched if last[id(b)] == number}
        free += [(b.offset, b.room) for b in done.values()]
    return end


def _view_numbers(value: Value | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the C++ struct `View` of a value."""
    if value is None or value.buffer is None:
        return (0,) * 5
    return (value.buffer.offset + int(value.view.storage_offset()), *_strides(value.view, sizes))


def packed(instruction: Instruction) -> bytes:
    """Return the C++ structs `Instruction` of an instruction and its joined ones."""
    group = [instruction, *instruction.joined]
    return b"".join(_packed_one(i, len(group)) for i in group)


def _packed_one(i: Instruction, joined: int) -> bytes:
    if i.code == LINEAR:
        assert i.a is not None and i.a.buffer is not None and i.out.buffer is not None
        out = (i.out.buffer.offset + i.out.view.storage_offset(), 0, 0, 0, 0)
        a = (i.a.buffer.offset + i.a.view.storage_offset(), 0, int(i.number), 0, 0)
        numbers = (i.external, i.type, 0, 0, 0, 0, 0, 0.0, i.bias, i.scale, i.weight_row, joined)
        return _INSTRUCTION.pack(i.code, *i.sizes, *out, *a, *(0,) * 5, *numbers)
    there: tuple[int, ...] = (0, 0, 0, 0, 0)
    if i.code in (LOAD, STORE):
        assert i.a is not None
        there = (*_strides(i.a.view, i.sizes), int(i.a.view.storage_offset()))
    views = (_view_numbers(v, i.sizes) for v in (i.out, i.a, i.b))
    flat = [x for view in views for x in view]
    return _INSTRUCTION.pack(i.code, *i.sizes, *flat, i.external, i.type, *there, i.number, -1, -1, 0, 0)
