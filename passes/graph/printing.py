"""Printing of graphs, for dumps, golden texts and comparisons in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.nodes import fake, op_name


def print_graph(graph: fx.Graph) -> str:
    """Print a graph, one line per node: `%name: dtype[shape] = op(args)`. Used for dumps, goldens and comparisons."""
    return "\n".join(map(print_node, graph.nodes)) + "\n"


def print_node(node: fx.Node) -> str:
    """Print one node as `print_graph` does."""
    value = fake(node)
    kind = f": {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else ""
    arguments = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
    if node.op == "placeholder":
        return f"%{node.name}{kind} = input()"
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    prefix = "." if node.op == "call_method" else ""
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else op_name(node) or node.op
    return f"%{node.name}{kind} = {prefix}{name}({', '.join(arguments)})"


def _show(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        return "[" + ", ".join(_show(a) for a in argument) + "]"
    return repr(argument)
