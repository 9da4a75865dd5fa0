"""Lower a trace of a layer to a program.

Everything is computed in float32, and rounded where a product reads it and where the layer returns it; casts between
floating types inside a layer are left out. Views cost nothing: a value is a place in the arena with strides.

Letters: M rows, K width of the input of a product, N width of its output.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from fhopt.codegen.cpu.calls.caches import Code, PackedInstruction
from fhopt.codegen.cpu.calls.kernels import FORMATS, SIGNED_BYTES, TYPES
from fhopt.codegen.layers import operations
from fhopt.codegen.layers.instructions import Buffer, Instruction, Value, four, packed, place, row_layout
from fhopt.codegen.layers.program import LayerProgram, Segment, Stored
from fhopt.codegen.layers.trace import ATTENTION, LayerTrace, Ref, TracedOp, TracedValue, UnsupportedError

MOST_JOINED = 16  # products of one input that are one parallel loop


def lower(trace: LayerTrace) -> LayerProgram:
    """Lower a trace to a program. Raises UnsupportedError."""
    return Lowering(trace).program()


class Lowering:
    """The state of lowering one trace: values so far, instructions of the segment."""

    def __init__(self, trace: LayerTrace) -> None:
        self.trace = trace
        self.values: dict[int, Value] = {}
        self.segments: list[list[Instruction]] = [[]]
        self.stored: list[list[Stored]] = [[]]
        self.loaded: dict[int, Value] = {}  # externals in the arena, whole
        self.externals = len(trace.values)
        self.changes = any(
            base_name(op)[:-1] in operations.IN_PLACE and base_name(op).endswith("_") for op in trace.ops
        )
        self.read: set[int] = set()
        for number, value in enumerate(trace.values):
            if value.source != "result":
                self._external(number)

    def program(self) -> LayerProgram:
        """Lower all operations, then give buffers their places."""
        for op in self.trace.ops:
            if op.name == ATTENTION:
                self._attend(op)
            else:
                self._lower(op)
        self._store(self.value(self.trace.output), self.trace.values[self.trace.output.number])
        arena = place([i for segment in self.segments for i in segment])
        segments = tuple(
            Segment(_array([one for i in segment for one in packed(i)]), tuple(stored))
            for segment, stored in zip(self.segments, self.stored, strict=True)
        )
        return LayerProgram(segments, arena, self.externals, frozenset(self.read))

    # ---- values

    def _external(self, number: int) -> Value:
        like = self.trace.values[number]
        view = torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device="meta")
        self.values[number] = Value(view, external=number)
        return self.values[number]

    def value(self, ref: Any) -> Value:
        """Return a value of the trace. Raises UnsupportedError."""
        if not isinstance(ref, Ref):
            raise UnsupportedError(f"an operand that is no tensor ({ref!r})")
        return self.values[ref.number]

    def new(self, shape: Sequence[int]) -> Value:
        """Return a new dense value in the arena."""
        return Value(torch.empty(tuple(shape), device="meta"), Buffer(math.prod(shape)))

    def emit(self, instruction: Instruction) -> Value:
        """Append an instruction; return its result."""
        self.segments[-1].append(instruction)
        return instruction.out

    def in_arena(self, value: Value) -> Value:
        """Return a value whose numbers are floats of the arena; an external is loaded once, all that its view shows."""
        if value.buffer is not None:
            return value
        known = self.loaded.get(value.external)
        own = self.values[value.external].view
        if value.view is own and known is not None:
            return known
        if value.view.dtype not in TYPES:
            raise UnsupportedError(f"numbers of {value.view.dtype}")
        loaded = self.new(value.view.shape)
        self.read.add(value.external)
        sizes, kind = four(value.view.shape), TYPES[value.view.dtype]
        self.emit(Instruction(Code.LOAD, sizes, loaded, Value(value.view), external=value.external, type=kind))
        if value.view is own:
            self.loaded[value.external] = loaded
        return loaded

    def operand(self, x: Any) -> Value:
        """Return an operand of arithmetic in the arena; a number is a value of one."""
        if isinstance(x, Value):
            return self.in_arena(x)
        if isinstance(x, Ref):
            return self.in_arena(self.value(x))
        if not isinstance(x, (int, float)) or isinstance(x, bool):
            raise UnsupportedError(f"an operand {x!r}")
        one = self.new(())
        return self.emit(Instruction(Code.FILL, (1, 1, 1, 1), one, number=float(x)))

    def _dense(self, value: Value) -> Value:
        """Return the value with its numbers in order, copied where they are not."""
        value = self.in_arena(value)
        if value.view.is_contiguous():
            return value
        return self.emit(Instruction(Code.COPY, four(value.view.shape), self.new(value.view.shape), value))

    # ---- operations

    def _lower(self, op: TracedOp) -> None:
        base = base_name(op)
        if base in operations.VIEWS:
            return self._view(op, base)
        handler = operations.HANDLERS.get(base)
        if handler is None and base.endswith("_") and base[:-1] in operations.IN_PLACE:
            return self._change(op, base[:-1])
        if handler is None:
            raise UnsupportedError(f"the operation {op.name}")
        result = handler(self, op.args, dict(op.kwargs))
        self.values[op.results[0].number] = result
        return None

    def _view(self, op: TracedOp, base: str) -> None:
        """Carry out an operation on shapes and strides alone."""
        value, rest = self.value(op.args[0]), op.args[1:]
        if value.external >= 0 and self.trace.values[value.external].source != "weight":
            value = self.in_arena(value)
        function: Any = getattr(torch.ops.aten, base.removesuffix("_"))
        overload = op.name.partition(".")[2] or "default"
        try:
            views = getattr(function, overload)(value.view, *rest, **dict(op.kwargs))
        except RuntimeError:  # the numbers stand in another order here
            value = self._dense(value)
            views = getattr(function, overload)(value.view, *rest, **dict(op.kwargs))
        for ref, view in zip(op.results, views if isinstance(views, (tuple, list)) else [views], strict=True):
            self.values[ref.number] = Value(view, value.buffer, value.external)

    def _change(self, op: TracedOp, base: str) -> None:
        """Lower an operation that changes its first operand in place."""
        target = self.value(op.args[0])
        if target.buffer is None:
            raise UnsupportedError(f"{op.name} on an input or a weight")
        result = operations.HANDLERS[base](self, op.args, dict(op.kwargs))
        if tuple(result.view.shape) != tuple(target.view.shape):
            raise UnsupportedError(f"{op.name} of another shape")
        self.emit(Instruction(Code.COPY, four(target.view.shape), target, result))
        self.values[op.results[0].number] = target

    def two(self, code: Code, x: Any, y: Any) -> Value:
        """Emit an operation on two operands, of which one may be a number, with broadcasting."""
        a, b = self.operand(x), self.operand(y)
        shape = torch.broadcast_shapes(a.view.shape, b.view.shape)
        a, b = (Value(v.view.expand(shape), v.buffer) for v in (a, b))
        if code in (Code.ADD, Code.MULTIPLY) and shape and not a.view.stride(-1):
            a, b = b, a  # what is repeated stands second: loops know it there
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
        if {d % count for d in given} != {count - 1}:
            raise UnsupportedError(f"a sum over other dimensions than the last ({dims})")
        out = self.new((*a.view.shape[:-1], 1))
        self.emit(Instruction(code, four(a.view.shape), Value(out.view.expand(a.view.shape), out.buffer), a))
        return out if keep else Value(out.view.squeeze(-1), out.buffer)

    def linear(self, x: Any, weight: Value, bias: Any = None, scale: Any = None, format: int = 0) -> Value:
        """Emit x [..., K] times weight [N, K], joined with an earlier product of the same input.

        format: of the blocks of a GGUF file that the weight stands in, [N, bytes of a row]; 0: in none.
        """
        a = self.operand(x)
        columns, width = weight.view.shape[0], a.view.shape[-1] if format else weight.view.shape[1]
        if weight.external < 0 or weight.view.stride(1) != 1 or weight.view.storage_offset():
            raise UnsupportedError("a product with what is no weight")
        quantized = scale is not None or format > 0
        if (weight.view.dtype not in TYPES and not quantized) or a.view.shape[-1] != width:
            raise UnsupportedError(f"a product with a weight of {weight.view.dtype}")
        rows = row_layout(a.view) or row_layout((a := self._dense(a)).view)
        assert rows is not None
        out = self.new((*a.view.shape[:-1], columns))
        dtype = self.trace.values[self.trace.output.number].dtype
        dtype = dtype if quantized else weight.view.dtype
        code = TYPES[dtype] + (FORMATS * format if format else SIGNED_BYTES if quantized else 0)
        product = Instruction(
            Code.LINEAR, (1, rows[0], width, columns), out, Value(a.view, a.buffer), external=weight.external,
            type=code, weight_row=weight.view.stride(0), bias=self._whole(bias, columns, dtype),
            scale=self._whole(scale, columns, torch.float32),
        )  # fmt: skip
        product.number = rows[1]  # from one row to the next
        earlier = self._same_input(product)
        if earlier is None:
            return self.emit(product)
        earlier.joined.append(product)
        return out

    def _whole(self, ref: Any, columns: int, dtype: torch.dtype) -> int:
        """Return the external that holds a bias or scales; -1 for none."""
        if ref is None:
            return -1
        value = self.value(ref)
        if value.external < 0 or value.view.dtype != dtype or tuple(value.view.shape) != (columns,):
            raise UnsupportedError("a product with a bias that is no weight")
        if value.view.stride(0) != 1 or value.view.storage_offset():
            raise UnsupportedError("a bias that is not dense")
        return value.external

    def _same_input(self, product: Instruction) -> Instruction | None:
        """Return an earlier product of the same input and type in this segment that may do this one too."""
        if self.changes:
            return None
        assert product.a is not None
        for other in self.segments[-1]:
            if other.code != Code.LINEAR or other.type != product.type or len(other.joined) + 1 >= MOST_JOINED:
                continue
            assert other.a is not None
            same = other.a.buffer is product.a.buffer and other.sizes[1:3] == product.sizes[1:3]
            if same and other.a.view.storage_offset() == product.a.view.storage_offset():
                return other if other.number == product.number else None
        return None

    def stack(self, refs: Any, dim: int) -> Value:
        """Emit copies of operands side by side, along a new dimension."""
        pieces = [self.operand(ref) for ref in refs]
        return self._joined([Value(piece.view.unsqueeze(dim), piece.buffer) for piece in pieces], dim)

    def cat(self, refs: Any, dim: int) -> Value:
        """Emit copies of operands, one behind the other along a dimension."""
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

    # ---- attention and results

    def _store(self, value: Value, like: TracedValue) -> int:
        """Emit the instruction that writes a dense tensor of the type of `like`; return its external."""
        value = self.in_arena(value)
        if like.dtype not in TYPES or tuple(value.view.shape) != like.shape:
            raise UnsupportedError(f"a result of {like.dtype} {like.shape}")
        external, self.externals = self.externals, self.externals + 1
        dense = torch.empty(like.shape, dtype=like.dtype, device="meta")
        self.emit(
            Instruction(Code.STORE, four(like.shape), value, Value(dense), external=external, type=TYPES[like.dtype])
        )
        self.stored[-1].append(Stored(external, like.shape, like.dtype))
        return external

    def _attend(self, op: TracedOp) -> None:
        """End a segment: write query, keys and values; what attention returns is read as an input."""
        for ref in op.args:
            self._store(self.value(ref), self.trace.values[ref.number])
        self.segments.append([])
        self.stored.append([])
        self.loaded.clear()
        self._external(op.results[0].number)


def _array(instructions: list[PackedInstruction]) -> ctypes.Array[PackedInstruction]:
    return (PackedInstruction * len(instructions))(*instructions)


def base_name(op: TracedOp) -> str:
    """Return the name of an operation of aten without its overload; of another library, the whole name."""
    return op.name.removeprefix("aten::").partition(".")[0]
