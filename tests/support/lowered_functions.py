"""Tensor functions as fx graphs of aten nodes, lowered to segments and run."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from fhopt.codegen.programs.lowering import inputs_of, lower_segment, segment_key
from fhopt.codegen.programs.program import SegmentCall, SegmentProgram, run_segment
from fhopt.codegen.programs.schedule import NativeSegment, StepSchedule


class CapturedFunction:
    """The graph of a function of inputs and weights. results: what the function returned.

    Nodes have meta["val"], placeholders of weights also meta["weight"], as in a captured decode step.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> None:
        tensors = [*inputs, *weights]
        with torch.no_grad():
            captured = make_fx(function)(*[_copied(x) for x in tensors])
            self.graph, self._tensors = captured.graph, tensors
            made = _Recorder(captured).run(*[_copied(x) for x in tensors])
        self.results: list[Tensor] = list(made) if isinstance(made, (tuple, list)) else [made]
        self.placeholders = self.graph.find_nodes(op="placeholder")
        for node, tensor in zip(self.placeholders, tensors, strict=True):
            node.meta["val"] = tensor
        for node in self.placeholders[len(inputs) :]:
            node.meta["weight"] = True
        for node in self.graph.find_nodes(op="call_function", target=operator.getitem):
            if not node.users:  # such as the mean of a layer norm
                self.graph.erase_node(node)

    @property
    def segment(self) -> tuple[list[Node], list[Node], list[Node]]:
        """Nodes, inputs and outputs of the whole graph as one segment."""
        nodes = [node for node in self.graph.nodes if node.op == "call_function"]
        (output,) = self.graph.find_nodes(op="output")
        return nodes, inputs_of(nodes), output.all_input_nodes

    @property
    def key(self) -> Any:
        """The key of the whole graph as one segment."""
        return segment_key(*self.segment)

    def lowered(self) -> SegmentProgram:
        """Lower the whole graph to one segment."""
        return lower_segment(*self.segment)

    def run(self, program: SegmentProgram | None = None) -> Tensor:
        """Run the graph as one segment, or another program for it; return the only result."""
        (result,) = run_lowered(self.lowered() if program is None else program, self._values(), self.segment[1])
        return result

    def run_schedule(self, schedule: StepSchedule) -> list[Tensor]:
        """Run the items of a schedule of the graph; return what the function returns."""
        values = self._values()
        for item in schedule.items:
            if isinstance(item, NativeSegment):
                values |= zip(item.outputs, run_lowered(item.program, values, item.inputs), strict=True)
            else:
                args, kwargs = map_arg((item.node.args, item.node.kwargs), values.__getitem__)
                target: Any = item.node.target
                values[item.node] = target(*args, **kwargs)
        (output,) = self.graph.find_nodes(op="output")
        return [values[node] for node in output.all_input_nodes]

    def _values(self) -> dict[Node, Any]:
        return dict(zip(self.placeholders, map(_copied, self._tensors), strict=True))


class _Recorder(Interpreter):
    """Runs a graph and notes the value of each node."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)

    def run_node(self, n: Node) -> Any:
        made = n.meta["val"] = super().run_node(n)
        return made


def run_lowered(program: SegmentProgram, values: dict[Node, Any], inputs: Sequence[Node]) -> list[Tensor]:
    """Run a segment; inputs that are not weights are made contiguous. Return the tensors that it writes."""
    tensors = [values[node] if "weight" in node.meta else values[node].contiguous() for node in inputs]
    made = [torch.full(stored.shape, float("nan"), dtype=stored.dtype) for stored in program.stored]
    externals = (ctypes.c_int64 * program.externals)(*[x.data_ptr() for x in (*tensors, *made)])
    assert [stored.external for stored in program.stored] == list(range(len(tensors), program.externals))
    run_segment(SegmentCall(program, externals), torch.get_num_threads())
    return made


def _copied(x: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def expect_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare a result in `dtype` with one that was computed in float64."""
    assert tuple(found.shape) == tuple(exact.shape) and found.dtype == dtype
    error, size = (found.double() - exact).abs().max(), exact.abs().max()
    assert float(error) <= (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * float(size) + 1e-7


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    """Two matmuls of one input, and one of their elementwise product, as in a gated MLP. biases: none or three."""
    first, second, third = biases or (None, None, None)
    return F.linear(F.silu(F.linear(x, gate, first)) * F.linear(x, up, second), down, third) + x


def mlp_weights(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    """Return random weights of a `gated_mlp` of 48 channels."""
    shapes = [(200, 48), (200, 48), (48, 200), *([(200,), (200,), (48,)] if bias else [])]
    return [torch.randn(shape).div(shape[-1] ** 0.5).to(dtype) for shape in shapes]
