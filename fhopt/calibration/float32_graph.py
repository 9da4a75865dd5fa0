"""Interpreter that runs a captured 16-bit graph in float32, with weights left in 16 bits.

The KL of a plan is the difference of two runs. In 16 bits, each run rounds its activations differently, which hides a
small KL. A float32 copy of the model would double its memory, so each weight is widened when it is used, and weights of
linear layers a few rows at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target, map_aggregate

from fhopt.calibration.segments import changes_inputs
from fhopt.hardware.float_products import HALVES, LINEAR, by_parts
from fhopt.passes.graph.nodes import op_name

_EMBEDDING = (nn.functional.embedding, torch.ops.aten.embedding.default)
_MOVES = {  # ops that return a view or part of a weight; the result is widened at its use
    operator.getitem, "view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "contiguous",
    "split", "chunk", "unbind", "narrow", "flatten", "unflatten", "detach",
}  # fmt: skip
PART = 2**22  # elements of a linear layer's weight that are in float32 at once
_OF_16_BITS = ("autocast", "scaled_mm", "scaled_grouped_mm", "int4pack", "int8pack")  # substrings of function names
LARGE = 2**26  # max elements of a weight that may be in float32 at once
_TO_HALF = ("bfloat16", "half")  # methods
_OPERATORS = ("aten", "prims", "fhopt")  # namespaces of operators that accept any float dtype
_FUNCTIONS = ("torch", "_operator", "builtins", "math", "fhopt")  # packages whose functions accept any float dtype


class Float32Interpreter(fx.Interpreter):
    """Interpreter that does all 16-bit arithmetic of a graph in float32. `is_widened` says which graphs it supports."""

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function on widened arguments."""
        if target in LINEAR:
            return _linear(*args, **kwargs)
        if target in _EMBEDDING:  # gathers a few rows of a large table: widen only these
            return _widened(super().call_function(target, args, kwargs))
        return super().call_function(target, *_given(target, args, kwargs))

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method on widened arguments."""
        if target in _TO_HALF:
            return super().call_method("float", args[:1], {})
        return super().call_method(target, *_given(target, args, kwargs))


def _given(target: Target, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a call: unchanged for view ops, otherwise widened to float32."""
    return (args, kwargs) if target in _MOVES else map_aggregate((args, kwargs), _widened)


def _widened(value: Any) -> Any:
    """Convert a 16-bit tensor or dtype to float32; return any other value unchanged."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    x = _widened(input)
    if weight.dtype not in HALVES or weight.dim() != 2 or not x.numel():
        return nn.functional.linear(x, _widened(weight), _widened(bias))
    return by_parts(x, weight, bias, PART)


def is_widened(graph: fx.Graph, values: Iterable[Any]) -> bool:
    """Return whether a graph computes in 16 bits and every node accepts float32 inputs.

    values: of its placeholders. False for graphs with functions from outside torch, with autocast or with subgraphs;
    for weights that are tensor subclasses or are written to; and if anything but a linear layer or an embedding uses a
    weight of more than `LARGE` elements (such as experts in one tensor), since all of it would be in float32 at once.
    """
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    known = dict(zip(placeholders, values, strict=True))
    halves = {n: v for n, v in known.items() if isinstance(v, Tensor) and v.dtype in HALVES}
    if not halves or any(type(v) not in (Tensor, nn.Parameter) for v in halves.values()):
        return False
    sizes = {node: value.numel() for node, value in halves.items()}  # elements of the weight that a node views
    for node in graph.nodes:
        given = [sizes[n] for n in node.all_input_nodes if n in sizes]
        if not _is_plain(node) or (given and not _may_read(node, max(given))):
            return False
        if given and node.target in _MOVES:
            sizes[node] = max(given)
    return True


def _may_read(node: fx.Node, size: int) -> bool:
    """Return whether a node may take float32 instead of a 16-bit weight with `size` elements."""
    if changes_inputs(node) or _asks_for_dtype(node, "view"):
        return False
    return size <= LARGE or node.op == "output" or node.target in (*_MOVES, *LINEAR, *_EMBEDDING)


def _asks_for_dtype(node: fx.Node, method: str) -> bool:
    return node.target == method and any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values()))


def _is_plain(node: fx.Node) -> bool:
    """Return whether a node calls a function of torch or a Python operator, or calls no function."""
    target: Callable[..., Any] | Any = node.target
    if node.op != "call_function":
        return node.op != "call_module"
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return False
    if any(word in op_name(node) for word in _OF_16_BITS):
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _OPERATORS
    return (getattr(target, "__module__", None) or "torch").split(".")[0] in _FUNCTIONS
