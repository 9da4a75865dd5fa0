"""Instructions of a decode program, on values in the arena, and their packing for C++.

Letters: M rows, K width of the input of a matmul.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fhopt.codegen.cpu.calls.caches import Code, PackedInstruction, View
from fhopt.codegen.programs.errors import UnsupportedError


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
    """An instruction; fields as in `PackedInstruction`.

    source: name of the fx node that it computes. joined: further matmuls of the same input.
    """

    code: Code
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
    source: str = ""
    joined: list[Instruction] = field(default_factory=list)

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


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor of a shape."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


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


def _view(value: Value | None, sizes: tuple[int, ...]) -> View:
    """Return the offset of a value in the arena, and its strides."""
    if value is None or value.buffer is None:
        return _NOWHERE
    return View(value.buffer.offset + int(value.view.storage_offset()), _strides(value.view, sizes))


_NOWHERE, _NO_STRIDES = View(0, (0, 0, 0, 0)), (0, 0, 0, 0)


def packed(instruction: Instruction) -> list[PackedInstruction]:
    """Return the C++ structs of an instruction and its joined ones."""
    group = [instruction, *instruction.joined]
    return [_product(i, len(group)) if i.code == Code.LINEAR else _packed_one(i) for i in group]


def _product(i: Instruction, joined: int) -> PackedInstruction:
    assert i.a is not None and i.a.buffer is not None and i.out.buffer is not None
    return PackedInstruction(
        code=i.code, sizes=i.sizes, out=View(i.out.buffer.offset + int(i.out.view.storage_offset()), _NO_STRIDES),
        a=View(i.a.buffer.offset + int(i.a.view.storage_offset()), (0, int(i.number), 0, 0)), b=_NOWHERE,
        external=i.external, type=i.type, strides=_NO_STRIDES, offset=0, number=0.0, bias=i.bias, scale=i.scale,
        weight_row=i.weight_row, joined=joined,
    )  # fmt: skip


def _packed_one(i: Instruction) -> PackedInstruction:
    strides: tuple[int, ...] = _NO_STRIDES
    offset = 0
    if i.code in (Code.LOAD, Code.STORE):
        assert i.a is not None
        strides, offset = _strides(i.a.view, i.sizes), int(i.a.view.storage_offset())
    out, a, b = (_view(v, i.sizes) for v in (i.out, i.a, i.b))
    return PackedInstruction(
        code=i.code, sizes=i.sizes, out=out, a=a, b=b, external=i.external, type=i.type, strides=strides,
        offset=offset, number=i.number, bias=-1, scale=-1, weight_row=0, joined=0,
    )  # fmt: skip
