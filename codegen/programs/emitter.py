"""Emission of the instructions of a segment of a decode program.

Views are free: a value is an offset in the arena with strides.

Letters: M rows, K width of the input of a matmul, N width of its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fhopt.codegen.cpu.calls.caches import Code
from fhopt.codegen.cpu.calls.kernels import FORMATS, SIGNED_BYTES, TYPES
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.instructions import (
    Buffer,
    Instruction,
    Value,
    contiguous_strides,
    four,
    row_layout,
)

MAX_JOINED = 16  # max matmuls of one input in one parallel loop


class Emitter:
    """The values of a segment so far, and its instructions.

    inputs: values from outside the segment, dense; their index is the number of their external. changes: whether nodes
    change values in place. weights: those of `inputs` that are parameters or buffers, with strides of their own.
    """

    def __init__(self, inputs: Sequence[Node], weights: Sequence[Node], changes: bool) -> None:
        self.inputs, self.weights, self.changes = tuple(inputs), frozenset(weights), changes
        self.values: dict[Node, Value] = {}
        self.parts: dict[Node, list[Value]] = {}  # of nodes with several results
        self.instructions: list[Instruction] = []
        self.loaded: dict[int, Value] = {}  # whole externals loaded into the arena
        self.changed: set[Buffer | None] = set()  # in place
        self.externals = len(self.inputs)
        self.node: Node | None = None  # the one being lowered
        for number, node in enumerate(self.inputs):
            like = node.meta["val"]
            strides = like.stride() if node in self.weights else contiguous_strides(like.shape)
            view = torch.empty_strided(like.shape, strides, dtype=like.dtype, device="meta")
            self.values[node] = Value(view, external=number)

    # ---- values

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the result of the node that is being lowered."""
        assert self.node is not None
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def value(self, ref: Any) -> Value:
        """Return the value of a node. Raises UnsupportedError."""
        if not isinstance(ref, Node):
            raise UnsupportedError(f"an operand that is not a tensor ({ref!r})")
        return self.values[ref]

    def new(self, shape: Sequence[int]) -> Value:
        """Return a new dense value in the arena."""
        return Value(torch.empty(tuple(shape), device="meta"), Buffer(math.prod(shape)))

    def emit(self, instruction: Instruction) -> Value:
        """Append an instruction; return its result."""
        self._note_source(instruction)
        self.instructions.append(instruction)
        return instruction.out

    def _note_source(self, instruction: Instruction) -> None:
        assert self.node is not None
        instruction.source = self.node.name

    def in_arena(self, value: Value) -> Value:
        """Return a value as floats in the arena; an external is loaded once, only the elements of its view."""
        if value.buffer is not None:
            return value
        known = self.loaded.get(value.external)
        own = self.values[self.inputs[value.external]].view
        if value.view is own and known is not None:
            return known
        if value.view.dtype not in TYPES:
            raise UnsupportedError(f"elements of {value.view.dtype}")
        loaded = self.new(value.view.shape)
        sizes, kind = four(value.view.shape), TYPES[value.view.dtype]
        self.emit(Instruction(Code.LOAD, sizes, loaded, Value(value.view), external=value.external, type=kind))
        if value.view is own:
            self.loaded[value.external] = loaded
        return loaded

    def operand(self, x: Any) -> Value:
        """Return an arithmetic operand in the arena; a number becomes a one-element value."""
        if isinstance(x, Value):
            return self.in_arena(x)
        if isinstance(x, Node):
            return self.in_arena(self.value(x))
        if not isinstance(x, (int, float)) or isinstance(x, bool):
            raise UnsupportedError(f"an operand {x!r}")
        one = self.new(())
        return self.emit(Instruction(Code.FILL, (1, 1, 1, 1), one, number=float(x)))

    def dense(self, value: Value) -> Value:
        """Return the value with its elements in order, copied if they are not."""
        value = self.in_arena(value)
        if value.view.is_contiguous():
            return value
        return self.emit(Instruction(Code.COPY, four(value.view.shape), self.new(value.view.shape), value))

    # ---- operations

    def two(self, code: Code, x: Any, y: Any) -> Value:
        """Emit a broadcasting operation on two operands, of which one may be a number."""
        a, b = self.operand(x), self.operand(y)
        shape = torch.broadcast_shapes(a.view.shape, b.view.shape)
        a, b = (Value(v.view.expand(shape), v.buffer) for v in (a, b))
        if code in (Code.ADD, Code.MULTIPLY) and shape and not a.view.stride(-1):
            a, b = b, a  # the C++ loops expect the broadcast operand second
        return self.emit(Instruction(code, four(shape), self.new(shape), a, b))

    def one(self, code: Code, x: Any) -> Value:
        """Emit a function of one operand."""
        a = self.operand(x)
        return self.emit(Instruction(code, four(a.view.shape), self.new(a.view.shape), a))

    def reduce(self, code: Code, x: Any, dims: Any, keep: bool) -> Value:
        """Emit a sum or mean over the last dimension."""
        a = self.operand(x)
        count = a.view.dim()
        given = [dims] if isinstance(dims, int) else list(dims or range(count))
        if not count or {d % count for d in given} != {count - 1}:
            raise UnsupportedError(f"a sum over other dimensions than the last ({dims})")
        out = self.new((*a.view.shape[:-1], 1))
        self.emit(Instruction(code, four(a.view.shape), Value(out.view.expand(a.view.shape), out.buffer), a))
        return out if keep else Value(out.view.squeeze(-1), out.buffer)

    def linear(self, x: Any, weight: Value, bias: Any = None, scale: Any = None, format: int = 0) -> Value:
        """Emit x [..., K] times weight [N, K], joined with an earlier matmul of the same input.

        format: GGUF block format of the weight [N, bytes per row]; 0: not in blocks.
        """
        a = self.operand(x)
        columns, width = weight.view.shape[0], a.view.shape[-1] if format else weight.view.shape[1]
        if weight.external < 0 or weight.view.stride(1) != 1 or weight.view.storage_offset():
            raise UnsupportedError("a matmul with a tensor that is not a weight, or with one that is stored transposed")
        quantized = scale is not None or format > 0
        if (weight.view.dtype not in TYPES and not quantized) or a.view.shape[-1] != width:
            raise UnsupportedError(f"a matmul with a weight of {weight.view.dtype}")
        rows = row_layout(a.view) or row_layout((a := self.dense(a)).view)
        assert rows is not None
        out = self.new((*a.view.shape[:-1], columns))
        dtype = self.dtype if quantized else weight.view.dtype
        code = TYPES[dtype] + (FORMATS * format if format else SIGNED_BYTES if quantized else 0)
        product = Instruction(
            Code.LINEAR, (1, rows[0], width, columns), out, Value(a.view, a.buffer), external=weight.external,
            type=code, weight_row=weight.view.stride(0), bias=self._whole(bias, columns, dtype),
            scale=self._whole(scale, columns, torch.float32),
        )  # fmt: skip
        product.number = rows[1]  # stride between rows
        earlier = self._same_input(product)
        if earlier is None:
            return self.emit(product)
        self._note_source(product)
        earlier.joined.append(product)
        return out

    def _whole(self, ref: Any, columns: int, dtype: torch.dtype) -> int:
        """Return the external that holds a bias or scales; -1 without one."""
        if ref is None:
            return -1
        value = self.value(ref)
        if value.external < 0 or value.view.dtype != dtype or tuple(value.view.shape) != (columns,):
            raise UnsupportedError("a matmul with a bias that is not a weight")
        if value.view.stride(0) != 1 or value.view.storage_offset():
            raise UnsupportedError("a bias that is not contiguous")
        return value.external

    def _same_input(self, product: Instruction) -> Instruction | None:
        """Return an earlier matmul of the same input and type in this segment that this one can join."""
        assert product.a is not None
        if product.a.buffer in self.changed:
            return None
        for other in self.instructions:
            if other.code != Code.LINEAR or other.type != product.type or len(other.joined) + 1 >= MAX_JOINED:
                continue
            assert other.a is not None
            same = other.a.buffer is product.a.buffer and other.sizes[1:3] == product.sizes[1:3]
            if same and other.a.view.storage_offset() == product.a.view.storage_offset():
                return other if other.number == product.number else None
        return None

    def stack(self, refs: Any, dim: int) -> Value:
        """Emit copies of operands along a new dimension."""
        pieces = [self.operand(ref) for ref in refs]
        return self._joined([Value(piece.view.unsqueeze(dim), piece.buffer) for piece in pieces], dim)

    def cat(self, refs: Any, dim: int) -> Value:
        """Emit copies of operands concatenated along a dimension."""
        return self._joined([self.operand(ref) for ref in refs], dim)

    def _joined(self, pieces: list[Value], dim: int) -> Value:
        shape = list(pieces[0].view.shape)
        dim %= len(shape)
        shape[dim] = sum(piece.view.shape[dim] for piece in pieces)
        out, at = self.new(shape), 0
        for piece in pieces:
            size = piece.view.shape[dim]
            there = Value(out.view.narrow(dim, at, size), out.buffer)
            self.emit(Instruction(Code.COPY, four(piece.view.shape), there, piece))
            at += size
        return out
