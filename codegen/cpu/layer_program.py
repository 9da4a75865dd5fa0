"""A decoder layer's decode step beside attention, as a program that one C++ file runs.

    LayerTrace      operations of a call, in order, on values by their numbers   (fhopt/hf/layer_trace.py records it)
    lower(trace)    -> LayerProgram: instructions for sources/layer_program.cpp, in segments between attentions

In eager mode a layer of a small model spends more time between its products than in them: some sixty operations of
torch, each a few microseconds, and a Python call for every module. As a program the same arithmetic costs a twentieth
of that. A program is data: layers whose traces are equal share it, and nothing is compiled for a model.

Everything is computed in float32, and rounded where a product reads it and where the layer returns it; casts between
floating types inside a layer are left out. Views cost nothing: a value is a place in the arena with strides.

Letters: B sequences, S new tokens of each, M = B S rows, K and N widths.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.compiler import CompileError, compiles, load
from fhopt.codegen.cpu import skinny_linear
from fhopt.codegen.cpu.attention import ARGUMENTS
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.codegen.source_files import read_source

NAME = "layer"  # of the library
ATTENTION = "attention"  # name of the operation that ends a segment
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_JOINED = 16  # products of one input that are one parallel loop
log = logging.getLogger(__name__)


class UnsupportedError(Exception):
    """A layer does something that programs do not know. The message says what."""


# --------------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True)
class Ref:
    """A value of a trace, by its number."""

    number: int


@dataclass(frozen=True)
class TracedValue:
    """Shape, strides and type of a value; source: "input", "weight" or "result"."""

    source: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TracedOp:
    """An operation by its name ("aten::mul.Tensor"), with values as `Ref`s in its arguments, also within tuples."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: tuple[Ref, ...]


@dataclass(frozen=True)
class LayerTrace:
    """What a layer computed: values, inputs first, then weights and results as they were met; what it returned.

    Equal traces are of layers that do the same with other weights.
    """

    values: tuple[TracedValue, ...]
    ops: tuple[TracedOp, ...]
    output: Ref


# --------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Stored:
    """A tensor that a segment writes: its index among the externals, dense, of this shape and type."""

    external: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Segment:
    """Instructions up to an attention or to the end, packed for C++, and the tensors that they write."""

    instructions: bytes
    count: int
    stored: tuple[Stored, ...]


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """A lowered trace. Externals are addressed by the numbers of values of the trace, then what segments write.

    arena: floats that a run needs. externals: their count. loaded: numbers of inputs and attention results that are
    read, in the order of the trace.
    """

    segments: tuple[Segment, ...]
    arena: int
    externals: int
    read: frozenset[int]


_INSTRUCTION = struct.Struct("@5q5q5q5q2q5qd4q")
_RUN = struct.Struct("@PqqqPP")
_SIDE = struct.Struct("@PqqPqP3qP3qq")
(
    LOAD, STORE, COPY, FILL, ADD, SUBTRACT, MULTIPLY, DIVIDE, LARGEST, LEAST, NEGATE, ABSOLUTE, SQUARE_ROOT,
    INVERSE_ROOT, INVERSE, EXPONENTIAL, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, MEAN, SUM, LINEAR,
) = range(25)  # fmt: skip


@dataclass(eq=False)
class _Buffer:
    """Floats of the arena: how many, where, and the last instruction that touches them."""

    size: int
    offset: int = -1


@dataclass(frozen=True, eq=False)
class _Value:
    """A value while lowering: a view of a buffer, or of an external tensor. view: on the meta device."""

    view: Tensor
    buffer: _Buffer | None = None
    external: int = -1


@dataclass(eq=False)
class _Instruction:
    code: int
    sizes: tuple[int, ...]
    out: _Value
    a: _Value | None = None
    b: _Value | None = None
    external: int = -1
    type: int = 0
    number: float = 0.0
    bias: int = -1
    scale: int = -1
    weight_row: int = 0
    joined: list[_Instruction] = field(default_factory=list)  # further products of the same input

    @property
    def touched(self) -> list[_Buffer]:
        found = [v.buffer for v in (self.out, self.a, self.b) if v is not None and v.buffer is not None]
        return found + [buffer for other in self.joined for buffer in other.touched]


def lower(trace: LayerTrace) -> LayerProgram:
    """Lower a trace to a program. Raises UnsupportedError."""
    return _Lowering(trace).program()


class _Lowering:
    """The state of lowering one trace: values so far, instructions of the segment."""

    def __init__(self, trace: LayerTrace) -> None:
        self.trace = trace
        self.values: dict[int, _Value] = {}
        self.segments: list[list[_Instruction]] = [[]]
        self.stored: list[list[Stored]] = [[]]
        self.loaded: dict[int, _Value] = {}  # externals in the arena, whole
        self.externals = len(trace.values)
        self.changes = any(op.name.rpartition("::")[2].partition(".")[0].endswith("_") for op in trace.ops)
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
        self._store(self._value(self.trace.output), self.trace.values[self.trace.output.number])
        arena = _place([i for segment in self.segments for i in segment])
        packed = tuple(
            Segment(b"".join(map(_packed, segment)), sum(1 + len(i.joined) for i in segment), tuple(stored))
            for segment, stored in zip(self.segments, self.stored, strict=True)
        )
        return LayerProgram(packed, arena, self.externals, frozenset(self.read))

    # ---- values

    def _external(self, number: int) -> _Value:
        like = self.trace.values[number]
        view = torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device="meta")
        self.values[number] = _Value(view, external=number)
        return self.values[number]

    def _value(self, ref: Any) -> _Value:
        if not isinstance(ref, Ref):
            raise UnsupportedError(f"an operand that is no tensor ({ref!r})")
        return self.values[ref.number]

    def _new(self, shape: Sequence[int]) -> _Value:
        """Return a new dense value in the arena."""
        return _Value(torch.empty(tuple(shape), device="meta"), _Buffer(math.prod(shape)))

    def _emit(self, instruction: _Instruction) -> _Value:
        self.segments[-1].append(instruction)
        return instruction.out

    def _in_arena(self, value: _Value) -> _Value:
        """Return a value whose numbers are floats of the arena; an external is loaded once, all that its view shows."""
        if value.buffer is not None:
            return value
        known = self.loaded.get(value.external)
        own = self.values[value.external].view
        if value.view is own and known is not None:
            return known
        if value.view.dtype not in TYPES:
            raise UnsupportedError(f"numbers of {value.view.dtype}")
        loaded = self._new(value.view.shape)
        self.read.add(value.external)
        self._emit(
            _Instruction(
                LOAD, _four(value.view.shape), loaded, _Value(value.view, external=value.external),
                external=value.external, type=TYPES.index(value.view.dtype),
            )  # fmt: skip
        )
        if value.view is own:
            self.loaded[value.external] = loaded
        return loaded

    def _operand(self, x: Any) -> _Value:
        """Return an operand of arithmetic in the arena; a number is a value of one."""
        if isinstance(x, Ref):
            return self._in_arena(self._value(x))
        if not isinstance(x, (int, float)) or isinstance(x, bool):
            raise UnsupportedError(f"an operand {x!r}")
        one = self._new(())
        return self._emit(_Instruction(FILL, (1, 1, 1, 1), one, number=float(x)))

    def _dense(self, value: _Value) -> _Value:
        """Return the value with its numbers in order, copied where they are not."""
        value = self._in_arena(value)
        if value.view.is_contiguous():
            return value
        return self._emit(_Instruction(COPY, _four(value.view.shape), self._new(value.view.shape), value))

    # ---- operations

    def _lower(self, op: TracedOp) -> None:
        name = op.name.removeprefix("aten::")
        base = name.partition(".")[0]
        if base in _VIEWS:
            return self._view(op, base)
        handler = _HANDLERS.get(base)
        if handler is None and base.endswith("_") and base[:-1] in _IN_PLACE:
            return self._change(op, base[:-1])
        if handler is None:
            raise UnsupportedError(f"the operation {op.name}")
        result = handler(self, op.args, dict(op.kwargs))
        self.values[op.results[0].number] = result
        return None

    def _view(self, op: TracedOp, base: str) -> None:
        """Carry out an operation on shapes and strides alone."""
        value, rest = self._value(op.args[0]), op.args[1:]
        function: Any = getattr(torch.ops.aten, base)
        overload = op.name.partition(".")[2] or "default"
        try:
            views = getattr(function, overload)(value.view, *rest, **dict(op.kwargs))
        except RuntimeError:  # the numbers stand in another order here
            value = self._dense(value)
            views = getattr(function, overload)(value.view, *rest, **dict(op.kwargs))
        for ref, view in zip(op.results, views if isinstance(views, (tuple, list)) else [views], strict=True):
            self.values[ref.number] = _Value(view, value.buffer, value.external)

    def _change(self, op: TracedOp, base: str) -> None:
        """Lower an operation that changes its first operand in place."""
        target = self._value(op.args[0])
        if target.buffer is None or target.view.numel() != math.prod(target.view.shape):
            raise UnsupportedError(f"{op.name} on an input or a weight")
        result = _HANDLERS[base](self, op.args, dict(op.kwargs))
        if tuple(result.view.shape) != tuple(target.view.shape):
            raise UnsupportedError(f"{op.name} of another shape")
        self._emit(_Instruction(COPY, _four(target.view.shape), target, result))
        self.values[op.results[0].number] = target

    def _two(self, code: int, x: Any, y: Any) -> _Value:
        """Emit an operation on two operands, of which one may be a number, with broadcasting."""
        a, b = self._operand(x) if not isinstance(x, _Value) else x, y if isinstance(y, _Value) else self._operand(y)
        shape = torch.broadcast_shapes(a.view.shape, b.view.shape)
        a, b = (_Value(v.view.expand(shape), v.buffer) for v in (a, b))
        if code in (ADD, MULTIPLY) and shape and not a.view.stride(-1):
            a, b = b, a  # what is repeated stands second: loops know it there
        return self._emit(_Instruction(code, _four(shape), self._new(shape), a, b))

    def _one(self, code: int, x: Any) -> _Value:
        a = x if isinstance(x, _Value) else self._operand(x)
        return self._emit(_Instruction(code, _four(a.view.shape), self._new(a.view.shape), a))

    def _reduce(self, code: int, x: Any, dims: Any, keep: bool) -> _Value:
        a = self._operand(x) if not isinstance(x, _Value) else x
        count = a.view.dim()
        given = [dims] if isinstance(dims, int) else list(dims or range(count))
        if {d % count for d in given} != {count - 1}:
            raise UnsupportedError(f"a sum over other dimensions than the last ({dims})")
        out = self._new((*a.view.shape[:-1], 1))
        self._emit(_Instruction(code, _four(a.view.shape), _Value(out.view.expand(a.view.shape), out.buffer), a))
        return out if keep else _Value(out.view.squeeze(-1), out.buffer)

    def _linear(self, x: Any, weight: _Value, bias: Any, scale: Any = None) -> _Value:
        """Emit x [..., K] times weight [N, K], joined with an earlier product of the same input."""
        operand = x if isinstance(x, _Value) else self._value(x)
        a = self._in_arena(operand)
        width, columns = weight.view.shape[1], weight.view.shape[0]
        if weight.external < 0 or weight.view.stride(1) != 1 or weight.view.storage_offset():
            raise UnsupportedError("a product with what is no weight")
        quantized = scale is not None
        if (weight.view.dtype not in TYPES and not quantized) or a.view.shape[-1] != width:
            raise UnsupportedError(f"a product with a weight of {weight.view.dtype}")
        rows = _rows(a.view) or _rows((a := self._dense(a)).view)
        assert rows is not None
        out = self._new((*a.view.shape[:-1], columns))
        dtype = self.trace.values[self.trace.output.number].dtype
        kind = 3 + TYPES.index(dtype) if quantized else TYPES.index(weight.view.dtype)
        product = _Instruction(
            LINEAR, (1, rows[0], width, columns), out, _Value(a.view, a.buffer), external=weight.external,
            type=kind, weight_row=weight.view.stride(0), bias=self._whole(bias, columns, TYPES[kind % 3]),
            scale=self._whole(scale, columns, torch.float32),
        )  # fmt: skip
        product.number = rows[1]  # from one row to the next
        earlier = self._same_input(product)
        if earlier is None:
            return self._emit(product)
        earlier.joined.append(product)
        return out

    def _whole(self, ref: Any, columns: int, dtype: torch.dtype) -> int:
        """Return the external that holds a bias or scales; -1 for none."""
        if ref is None:
            return -1
        value = self._value(ref)
        if value.external < 0 or value.view.dtype != dtype or tuple(value.view.shape) != (columns,):
            raise UnsupportedError("a product with a bias that is no weight")
        if value.view.stride(0) != 1 or value.view.storage_offset():
            raise UnsupportedError("a bias that is not dense")
        return value.external

    def _same_input(self, product: _Instruction) -> _Instruction | None:
        """Return an earlier product of the same input and type in this segment that may do this one too."""
        if self.changes:
            return None
        assert product.a is not None
        for other in self.segments[-1]:
            if other.code != LINEAR or other.type != product.type or len(other.joined) + 1 >= MOST_JOINED:
                continue
            assert other.a is not None
            same = other.a.buffer is product.a.buffer and other.sizes[1:3] == product.sizes[1:3]
            if same and other.a.view.storage_offset() == product.a.view.storage_offset():
                return other if other.number == product.number else None
        return None

    def _cat(self, refs: Any, dim: int) -> _Value:
        pieces = [self._operand(ref) for ref in refs]
        shape = list(pieces[0].view.shape)
        dim %= len(shape)
        shape[dim] = sum(piece.view.shape[dim] for piece in pieces)
        out, at = self._new(shape), 0
        for piece in pieces:
            size = piece.view.shape[dim]
            there = _Value(out.view.narrow(dim, at, size), out.buffer)
            self._emit(_Instruction(COPY, _four(piece.view.shape), there, piece))
            at += size
        return out

    # ---- attention and results

    def _store(self, value: _Value, like: TracedValue) -> int:
        """Emit the instruction that writes a dense tensor of the type of `like`; return its external."""
        if value.buffer is None:
            value = self._in_arena(value)
        if like.dtype not in TYPES or tuple(value.view.shape) != like.shape:
            raise UnsupportedError(f"a result of {like.dtype} {like.shape}")
        external, self.externals = self.externals, self.externals + 1
        dense = torch.empty(like.shape, dtype=like.dtype, device="meta")
        self._emit(
            _Instruction(
                STORE, _four(like.shape), value, _Value(dense), external=external, type=TYPES.index(like.dtype)
            )
        )
        self.stored[-1].append(Stored(external, like.shape, like.dtype))
        return external

    def _attend(self, op: TracedOp) -> None:
        """End a segment: write query, keys and values; what attention returns is read as an input."""
        for ref in op.args:
            self._store(self._value(ref), self.trace.values[ref.number])
        self.segments.append([])
        self.stored.append([])
        self.loaded.clear()
        self._external(op.results[0].number)


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as four sizes. Raises UnsupportedError for more dimensions that are not 1."""
    sizes = [int(n) for n in shape if n != 1]
    if len(sizes) > 4:
        raise UnsupportedError(f"an array of {len(sizes)} dimensions")
    return (*(1,) * (4 - len(sizes)), *sizes)


def _strides(view: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides to the four sizes of `_four(view.shape)`."""
    strides = [step for step, n in zip(view.stride(), view.shape, strict=True) if n != 1]
    return (*(0,) * (len(sizes) - len(strides)), *strides)


def _rows(view: Tensor) -> tuple[int, int] | None:
    """Return (rows, numbers from one to the next) of a value [..., K] that lies row by row; None for another."""
    if view.shape[-1] > 1 and view.stride(-1) != 1:
        return None
    leading = [(n, step) for n, step in zip(view.shape[:-1], view.stride()[:-1], strict=True) if n != 1]
    for (_, outer), (n, inner) in zip(leading, leading[1:], strict=False):
        if outer != n * inner:
            return None
    return math.prod(n for n, _ in leading), leading[-1][1] if leading else view.shape[-1]


# --------------------------------------------------------------------------------------------------- packing


def _place(instructions: list[_Instruction]) -> int:
    """Give buffers their places in the arena, again where they are no longer needed; return its size in floats."""
    last: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for buffer in instruction.touched:
            last[id(buffer)] = number
    free: list[tuple[int, int]] = []  # (offset, size)
    end = 0
    for number, instruction in enumerate(instructions):
        for buffer in instruction.touched:
            if buffer.offset < 0:
                size = -(-max(buffer.size, 1) // 16) * 16
                fit = next((f for f in free if f[1] >= size), None)
                if fit is None:
                    buffer.offset, end = end, end + size
                else:
                    free.remove(fit)
                    buffer.offset = fit[0]
                    if fit[1] > size:
                        free.append((fit[0] + size, fit[1] - size))
        done = {id(b): b for b in instruction.touched if last[id(b)] == number}
        free += [(b.offset, -(-max(b.size, 1) // 16) * 16) for b in done.values()]
    return end


def _view_numbers(value: _Value | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the C++ struct `View` of a value."""
    if value is None or value.buffer is None:
        return (0,) * 5
    return (value.buffer.offset + value.view.storage_offset(), *_strides(value.view, sizes))


def _packed(instruction: _Instruction) -> bytes:
    """Return the C++ structs `Instruction` of an instruction and of those that are joined to it."""
    group = [instruction, *instruction.joined]
    return b"".join(_packed_one(i, len(group)) for i in group)


def _packed_one(i: _Instruction, joined: int) -> bytes:
    if i.code == LINEAR:
        assert i.a is not None and i.a.buffer is not None and i.out.buffer is not None
        out = (i.out.buffer.offset + i.out.view.storage_offset(), 0, 0, 0, 0)
        a = (i.a.buffer.offset + i.a.view.storage_offset(), 0, int(i.number), 0, 0)
        numbers = (i.external, i.type, 0, 0, 0, 0, 0, 0.0, i.bias, i.scale, i.weight_row, joined)
        return _INSTRUCTION.pack(i.code, *i.sizes, *out, *a, *(0,) * 5, *numbers)
    there = (0, 0, 0, 0, 0)
    if i.code in (LOAD, STORE):
        assert i.a is not None
        there = (*_strides(i.a.view, i.sizes), i.a.view.storage_offset())
    views = (_view_numbers(v, i.sizes) for v in (i.out, i.a, i.b))
    flat = [x for view in views for x in view]
    return _INSTRUCTION.pack(i.code, *i.sizes, *flat, i.external, i.type, *there, i.number, -1, -1, 0, 0)


# --------------------------------------------------------------------------------------------------- handlers

Handler = Callable[[_Lowering, tuple[Any, ...], dict[str, Any]], _Value]
_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "select", "slice",
    "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "narrow", "movedim", "unflatten",
}  # fmt: skip
_IN_PLACE = {"add", "sub", "mul", "div", "neg", "silu", "gelu", "relu", "sigmoid", "tanh"}


def _binary(code: int) -> Handler:
    def handle(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or len(args) != 2:
            raise UnsupportedError("a sum with a factor, or a quotient that is rounded")
        return low._two(code, *args)

    return handle


def _unary(code: int) -> Handler:
    def handle(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        if len(args) != 1 or kwargs:
            raise UnsupportedError("a function with options")
        return low._one(code, args[0])

    return handle


def _gelu(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    return low._one(GELU_TANH if kwargs.get("approximate", "none") == "tanh" else GELU, args[0])


def _pow(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    x, power = low._operand(args[0]), args[1]
    if power == 2:
        return low._two(MULTIPLY, x, x)
    if power == 3:
        return low._two(MULTIPLY, low._two(MULTIPLY, x, x), x)
    if power in (0.5, -0.5):
        return low._one(SQUARE_ROOT if power > 0 else INVERSE_ROOT, x)
    raise UnsupportedError(f"a power of {power}")


def _reduction(code: int) -> Handler:
    def handle(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        dims = args[1] if len(args) > 1 else None
        return low._reduce(code, args[0], dims, bool(args[2]) if len(args) > 2 else False)

    return handle


def _same(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    """Lower what copies or casts: nothing, or a copy where the layer changes values in place."""
    value = low._value(args[0])
    if not value.view.is_floating_point() or not kwargs.get("dtype", torch.float32).is_floating_point:
        raise UnsupportedError("a cast from or to whole numbers")
    value = low._in_arena(value)
    if low.changes:
        return low._emit(_Instruction(COPY, _four(value.view.shape), low._new(value.view.shape), value))
    return value


def _dropped(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    if args[2]:
        raise UnsupportedError("dropout in training")
    return low._value(args[0])


def _clamp(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    given = (*args[1:], None, None)[:2]
    least, most = kwargs.get("min", given[0]), kwargs.get("max", given[1])
    value = low._operand(args[0])
    for code, bound in ((LARGEST, least), (LEAST, most)):
        if bound is not None:
            value = low._two(code, value, bound)
    return value


def _layer_norm(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    x, shape, weight, bias, epsilon = args
    if len(shape) != 1:
        raise UnsupportedError("a norm over several dimensions")
    value = low._operand(x)
    centred = low._two(SUBTRACT, value, low._reduce(MEAN, value, -1, True))
    return _normed(low, centred, weight, bias, epsilon)


def _rms_norm(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    x, shape, weight, epsilon = args
    if len(shape) != 1:
        raise UnsupportedError("a norm over several dimensions")
    dtype = low._value(x).view.dtype
    return _normed(low, low._operand(x), weight, None, torch.finfo(dtype).eps if epsilon is None else epsilon)


def _normed(low: _Lowering, value: _Value, weight: Any, bias: Any, epsilon: float) -> _Value:
    square = low._reduce(MEAN, low._two(MULTIPLY, value, value), -1, True)
    value = low._two(MULTIPLY, value, low._one(INVERSE_ROOT, low._two(ADD, square, float(epsilon))))
    value = value if weight is None else low._two(MULTIPLY, value, weight)
    return value if bias is None else low._two(ADD, value, bias)


def _matrix_product(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    return low._linear(args[0], _transposed(low._value(args[1])), None)


def _matrix_product_and_bias(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise UnsupportedError("a product with factors")
    return low._linear(args[1], _transposed(low._value(args[2])), args[0])


def _transposed(value: _Value) -> _Value:
    return _Value(value.view.t(), value.buffer, value.external)


def _linear_layer(low: _Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
    x, weight, bias, scale = (*args, None, None)[:4]
    return low._linear(x, low._value(weight), bias, scale)


_HANDLERS: dict[str, Handler] = {
    "add": _binary(ADD), "sub": _binary(SUBTRACT), "mul": _binary(MULTIPLY), "div": _binary(DIVIDE),
    "maximum": _binary(LARGEST), "minimum": _binary(LEAST), "clamp": _clamp, "clamp_min": _clamp,
    "rsub": lambda low, args, kwargs: _binary(SUBTRACT)(low, (args[1], args[0]), kwargs),
    "neg": _unary(NEGATE), "abs": _unary(ABSOLUTE), "sqrt": _unary(SQUARE_ROOT), "rsqrt": _unary(INVERSE_ROOT),
    "reciprocal": _unary(INVERSE), "exp": _unary(EXPONENTIAL), "tanh": _unary(TANH), "sigmoid": _unary(SIGMOID),
    "silu": _unary(SILU), "relu": _unary(RELU), "gelu": _gelu, "pow": _pow,
    "mean": _reduction(MEAN), "sum": _reduction(SUM),
    "clone": _same, "contiguous": _same, "_to_copy": _same, "native_dropout": _dropped,
    "cat": lambda low, args, kwargs: low._cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)),
    "native_layer_norm": _layer_norm, "_fused_rms_norm": _rms_norm,
    "mm": _matrix_product, "addmm": _matrix_product_and_bias, "linear": _linear_layer,
    "fhopt::skinny_linear": _linear_layer,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- running


def render() -> str:
    """Render the C++ file; it is always the same."""
    return read_source("fhopt.codegen.cpu", "layer_program.cpp").substitute(page_quantum=PAGE_QUANTUM)


@functools.cache
def _functions() -> tuple[Any, Any, int] | None:
    """Return (`run_layer`, `run_decode_step`, address of `skinny_group`); None where they cannot be compiled."""
    try:
        library = load(NAME, render())
        group = ctypes.cast(load(skinny_linear.NAME, skinny_linear.render()).skinny_group, ctypes.c_void_p).value
    except CompileError as error:
        log.info("%s Layers run operation by operation.", error)
        return None
    assert group is not None
    for function, kind in ((library.run_layer, ctypes.c_char_p), (library.run_decode_step, ctypes.c_void_p)):
        function.argtypes, function.restype = (kind,), None
    return library.run_layer, library.run_decode_step, group


def is_built() -> bool:
    """Build the libraries, and return whether they are there."""
    return _functions() is not None


def compiles_layers() -> bool:
    """Return whether `is_built` runs a compiler, which takes seconds; once on a machine it does."""
    return compiles(NAME, render()) or compiles(skinny_linear.NAME, skinny_linear.render())


def run_segment(program: LayerProgram, number: int, externals: Any, address: int, threads: int) -> None:
    """Run one segment. externals: array of addresses, at `address`; every tensor behind it must be alive."""
    functions = _functions()
    assert functions is not None
    functions[0](_run(program, number, address, threads))


def _run(program: LayerProgram, number: int, address: int, threads: int) -> bytes:
    """Return the C++ struct `Run` of a segment."""
    functions, segment = _functions(), program.segments[number]
    assert functions is not None
    return _RUN.pack(_address(segment), segment.count, program.arena, threads, address, functions[2])


@dataclass(frozen=True, eq=False)
class CacheSide:
    """Keys or values of a cache: what a decode step reads beside packed latents, and where its token goes.

    tokens [B,G,1,D]: where the program writes the new ones. opened [B,G,N,D]: what is kept exactly, and a place behind;
    both dense. codes uint8 [B,G,M,D] and scale float16 [B,G,M]: of a window in 8 bits, of which `at` places are taken.
    decode [G,D,R], mean float32 [B,G,1,D] or None: as of `fhopt.attention.cache_view.SideRows`.
    """

    tokens: Tensor
    opened: Tensor
    codes: Tensor
    scale: Tensor
    at: int
    decode: Tensor
    mean: Tensor | None

    def packed(self) -> bytes:
        """Return the C++ struct `Append`."""
        return _SIDE.pack(
            self.tokens.data_ptr(), self.tokens.shape[1], self.tokens.shape[3], self.opened.data_ptr(),
            self.opened.shape[2], self.codes.data_ptr(), *self.codes.stride()[:3], self.scale.data_ptr(),
            *self.scale.stride(), self.at,
        )  # fmt: skip


class DecodeStep:
    """A layer's decode step as one call: the program of the layer, and attention on one cache, bound to addresses.

    Every tensor behind them must live, and stay where it is, as long as the step is run. The step counts the tokens of
    the window on its own. query, keys and values of the program go to `query` and the sides' `tokens`.
    """

    def __init__(
        self, program: LayerProgram, address: int, threads: int, query: Tensor, attended: Tensor,
        sides: tuple[CacheSide, CacheSide], parts: Sequence[tuple[LibraryKernel, bytes] | None], scale: float,
    ) -> None:  # fmt: skip
        functions = _functions()
        assert functions is not None
        self._function = functions[1]
        keys, values = sides
        self._bases = [_basis(side.decode) for side in sides]
        means = [_mean(side.mean, query.shape[1]) for side in sides]
        sizes = (*query.shape[:3], query.shape[3], values.tokens.shape[3])
        self._kept = (program, query, attended, *sides)
        packed = b"".join([
            _run(program, 0, address, threads), _run(program, 1, address, threads),
            struct.pack("@qPP", TYPES.index(query.dtype), query.data_ptr(), attended.data_ptr()),
            struct.pack("@5qd4q", *sizes, scale, 0, 0, 0, 0), *map(_part, parts),
            *[packed for _, packed in self._bases], *means, struct.pack("@P", 0), keys.packed(), values.packed(),
        ])  # fmt: skip
        self._struct = ctypes.create_string_buffer(packed, len(packed))
        self._address = ctypes.addressof(self._struct)

    def __call__(self) -> None:
        """Run the step."""
        self._function(self._address)


_NO_PART = bytes(8 + struct.calcsize(ARGUMENTS))


def _part(part: tuple[LibraryKernel, bytes] | None) -> bytes:
    """Return the C++ struct `CachePart` of a kernel and its arguments."""
    return _NO_PART if part is None else struct.pack("@P", part[0].address) + part[1]


def _basis(decode: Tensor) -> tuple[Tensor, bytes]:
    """Return the tensor behind a `CacheBasis`, and that struct."""
    dense = decode.contiguous() if decode.dtype in TYPES[:2] else decode.float()
    return dense, struct.pack("@P4q", dense.data_ptr(), dense.dtype == torch.bfloat16, *dense.shape)


def _mean(mean: Tensor | None, heads: int) -> bytes:
    """Return the C++ struct `CacheMean`."""
    if mean is None:
        return bytes(40)
    return struct.pack("@P4q", mean.data_ptr(), *mean.stride()[:2], heads // mean.shape[1], mean.shape[3])


@functools.cache
def _address(segment: Segment) -> int:
    address = ctypes.cast(ctypes.c_char_p(segment.instructions), ctypes.c_void_p).value
    assert address is not None
    return address
