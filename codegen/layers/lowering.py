"""Lowering of a layer's trace to a layer program.

Everything is computed in float32, and rounded where a matmul uses it and where the layer returns it; casts between
floating types inside a layer are dropped.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from fhopt.codegen.cpu.calls.caches import Code, PackedInstruction
from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.layers import operations
from fhopt.codegen.layers.emitter import Emitter
from fhopt.codegen.layers.instructions import Instruction, Value, four, packed, place
from fhopt.codegen.layers.program import LayerProgram, ProgramSegment, Stored
from fhopt.codegen.layers.trace import ATTENTION, LayerTrace, TracedOp, TracedValue, UnsupportedError


def lower_trace(trace: LayerTrace) -> LayerProgram:
    """Lower a trace to a program. Raises UnsupportedError."""
    return Lowering(trace).program()


class Lowering(Emitter):
    """The lowering of one trace: its operations, and attention between segments."""

    def __init__(self, trace: LayerTrace) -> None:
        changes = any(base_name(op)[:-1] in operations.IN_PLACE and base_name(op).endswith("_") for op in trace.ops)
        super().__init__(trace, changes)

    def program(self) -> LayerProgram:
        """Lower all operations, then assign buffers to the arena."""
        for op in self.trace.ops:
            if op.name == ATTENTION:
                self._attend(op)
            else:
                self._lower(op)
        self._store(self.value(self.trace.output), self.trace.values[self.trace.output.number])
        arena = place([i for segment in self.segments for i in segment])
        segments = tuple(
            ProgramSegment(_array([one for i in segment for one in packed(i)]), tuple(stored))
            for segment, stored in zip(self.segments, self.stored, strict=True)
        )
        return LayerProgram(segments, arena, self.externals, frozenset(self.read))

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
        """Apply an operation that changes only shape and strides."""
        value, rest = self.value(op.args[0]), op.args[1:]
        if value.external >= 0 and self.trace.values[value.external].source != "weight":
            value = self.in_arena(value)
        function: Any = getattr(torch.ops.aten, base.removesuffix("_"))
        overload = op.name.partition(".")[2] or "default"
        try:
            views = getattr(function, overload)(value.view, *rest, **dict(op.kwargs))
        except RuntimeError:  # the elements have another order here
            value = self.dense(value)
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
        """End a segment: store query, keys and values; the result of attention is an input of the next segment."""
        for ref in op.args:
            self._store(self.value(ref), self.trace.values[ref.number])
        self.segments.append([])
        self.stored.append([])
        self.loaded.clear()
        self.new_external(op.results[0].number)


def _array(instructions: list[PackedInstruction]) -> ctypes.Array[PackedInstruction]:
    return (PackedInstruction * len(instructions))(*instructions)


def base_name(op: TracedOp) -> str:
    """Return the name of an aten operation without its overload; for another library, the whole name."""
    return op.name.removeprefix("aten::").partition(".")[0]
