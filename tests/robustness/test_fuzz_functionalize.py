"""Random programs of views, writes and reads."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from functionalized import functionalized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fhopt.passes.graph.nodes import fake
from fhopt.passes.graph.program import Program

VIEWS = ("reshape", "transpose", "slice", "chunk", "select", "flatten", "unsqueeze", "to", "contiguous", "detach")
WAYS = ("method", "operator", "setitem", "mask", "copy", "function", "inplace", "fill")


class Writer:
    """Draws a program of views, writes and reads, in which every call is valid."""

    def __init__(self, data: st.DataObject, values: list[Tensor]) -> None:
        self.data, self.graph, self.mode = data, fx.Graph(), FakeTensorMode()
        self.nodes: list[fx.Node] = []
        for position, value in enumerate(values):
            self.nodes.append(self.graph.placeholder(f"input_{position}"))
            self.nodes[-1].meta["example_value"] = self.mode.from_tensor(value)

    def pick(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))

    def call(self, target: Any, *args: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args)
        known = fx.node.map_arg(args, fake)
        with self.mode:
            value = getattr(known[0], target)(*known[1:]) if op == "call_method" else target(*known)
        node.meta["example_value"] = value
        return node

    def view(self, x: fx.Node) -> fx.Node:
        shape, size = fake(x).shape, fake(x).numel()
        dim = self.pick(range(len(shape)))
        choice = self.pick(VIEWS)
        match choice:
            case "reshape":
                return self.call(
                    "reshape", x, self.pick([(size,), (1, -1), (-1, 1), (2, -1) if size % 2 == 0 else (-1,)])
                )
            case "transpose":
                return self.call("transpose", x, dim, self.pick(range(len(shape))))
            case "slice":
                part = self.pick(
                    [slice(0, max(1, shape[dim] // 2)), slice(shape[dim] // 2, None), slice(None, None, 2)]
                )
                return self.call(operator.getitem, x, (*[slice(None)] * dim, part))
            case "chunk":
                pieces = self.call(torch.chunk, x, 2, dim)
                return self.call(operator.getitem, pieces, self.pick(range(len(fake(pieces)))))
            case "select":
                return self.call("select", x, dim, 0) if len(shape) > 1 else self.call("unsqueeze", x, 0)
            case "unsqueeze":
                return self.call("unsqueeze", x, dim)
            case "to":
                return self.call("to", x, torch.float64)
        return self.call(choice, x)

    def write(self, x: fx.Node) -> fx.Node:
        number = self.call("mean", self.pick(self.nodes))
        match self.pick(WAYS):
            case "method":
                return self.call(self.pick(["add_", "mul_", "sub_"]), x, number)
            case "operator":
                return self.call(self.pick([operator.iadd, operator.imul, operator.isub]), x, number)
            case "setitem":
                self.call(operator.setitem, x, self.pick([0, slice(1, None), Ellipsis]), self.pick([number, 0.5]))
                return x
            case "mask":
                return self.call("masked_fill_", x, self.call(operator.gt, x, 0.1), -0.5)
            case "copy":
                return self.call("copy_", x, self.call(self.pick(["sin", "clone"]), x))
            case "function":
                return self.call(torch.relu_, x)
            case "inplace":
                return self.call(F.leaky_relu, x, 0.1, True)
        return self.call("fill_", x, 0.75)

    def program(self, values: list[Tensor]) -> Program:
        for _ in range(self.pick(range(3, 14))):
            x = self.pick(self.nodes)
            make = self.pick([self.view, self.view, self.write, self.write, lambda x: self.call("cos", x)])
            self.nodes.append(make(x))
        self.graph.output(tuple(self.pick(self.nodes) for _ in range(3)))
        module = fx.GraphModule(nn.Module(), self.graph)
        return Program(module, {f"input_{position}": value for position, value in enumerate(values)})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_program_of_views_writes_and_reads_gives_the_same_results(data: st.DataObject) -> None:
    torch.manual_seed(0)
    values = [torch.randn(4, 4).double(), torch.randn(6).double(), torch.randn(4, 6).double()[:, :3]]
    program = Writer(data, values).program(values)
    assert functionalized(program, atol=1e-10).left == ()  # a mean over other strides sums in another order
