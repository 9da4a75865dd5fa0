"""Tensor functions as one-segment programs: traced, lowered and run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fhopt.codegen.layers.lowering import lower_trace
from fhopt.codegen.layers.program import LayerProgram, run_segment
from fhopt.codegen.layers.trace import LayerTrace, Ref
from fhopt.hf.layer_trace import _Recorder


class Traced:
    """The trace of a function of inputs and module parameters, and its result."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], module: nn.Module) -> None:
        recorder = _Recorder(module, {(i,): x for i, x in enumerate(inputs)})
        with torch.no_grad(), recorder:
            self.result = function(*inputs)
        if recorder.failure is not None:
            raise recorder.failure
        self.trace = LayerTrace(tuple(recorder.values), tuple(recorder.ops), Ref(recorder.numbers[id(self.result)]))
        self.tensors = recorder.alive

    def run(self, program: LayerProgram | None = None) -> Tensor:
        """Run the program of the trace, or another one, on the same tensors."""
        program = lower_trace(self.trace) if program is None else program
        (segment,) = program.segments
        (stored,) = segment.stored
        externals = (ctypes.c_int64 * program.externals)(*[x.data_ptr() for x in self.tensors])
        output = torch.full(stored.shape, float("nan"), dtype=stored.dtype)
        externals[stored.external] = output.data_ptr()
        run_segment(program, 0, externals, ctypes.addressof(externals), torch.get_num_threads())
        return output


class Products(nn.Module):
    """Two matmuls of one input, and one of their elementwise product, as in a gated MLP."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(48, 200, bias=bias, dtype=dtype), nn.Linear(48, 200, bias=bias, dtype=dtype)
        self.down = nn.Linear(200, 48, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x)) + x
        return down
