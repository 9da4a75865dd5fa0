"""Runs a captured graph of 16-bit numbers in float32: its weights as they are, and all that is made of them wider.

What a plan loses is the difference of two runs. In 16 bits each rounds its activations in its own way, and of a small
loss nothing is to be seen under that. A copy of the model in float32 would take twice its memory; here a weight is
widened where it is used, those of linear layers some rows at a time.
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
_MOVES = {  # what gives another view of a weight, or a part of it: that is widened where it is used
    operator.getitem, "view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "contiguous",
    "split", "chunk", "unbind", "narrow", "flatten", "unflatten", "detach",
}  # fmt: skip
PART = 2**22  # numbers of a linear layer's weight that are float32 at once
_OF_16_BITS = ("autocast", "scaled_mm", "scaled_grouped_mm", "int4pack", "int8pack")  # in names of functions
LARGE = 2**26  # numbers of a weight that may be there in float32 at once
_TO_HALF = ("bfloat16", "half")  # methods
_OPERATORS = ("aten", "prims", "fhopt")  # namespaces of operators whose arguments may be of any float
_FUNCTIONS = ("torch", "_operator", "builtins", "math", "fhopt")  # packages of functions that are such


class Float32Interpreter(fx.Interpreter):
    """Runs a graph with all arithmetic on 16-bit numbers in float32. See `is_widened` for those that it may run."""

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function on widened arguments."""
        if target in LINEAR:
            return _linear(*args, **kwargs)
        if target in _EMBEDDING:  # a few rows of a large table
            return _widened(super().call_function(target, args, kwargs))
        return super().call_function(target, *_given(target, args, kwargs))

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method on widened arguments."""
        if target in _TO_HALF:
            return super().call_method("float", args[:1], {})
        return super().call_method(target, *_given(target, args, kwargs))


def _given(target: Target, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a call: of a view as they are, of all else in float32."""
    return (args, kwargs) if target in _MOVES else map_aggregate((args, kwargs), _widened)


def _widened(value: Any) -> Any:
    """Return a tensor, or a dtype, of 16 bits in float32, and any other value as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    x = _widened(input)
    if weight.dtype not in HALVES or weight.dim() != 2 or not x.numel():
        return nn.functional.linear(x, _widened(weight), _widened(bias))
    return by_parts(x, weight, bias, PART)


def is_widened(graph: fx.Graph, values: Iterable[Any]) -> bool:
    """Return whether a graph computes in 16 bits, and all its parts are such that float32 may be given to them.

    values: of its placeholders. Not so with functions that are not torch's, with autocast and with graphs inside, with
    weights that are more than their numbers or are written to, and where what is no linear layer reads a weight of
    more than `LARGE` numbers (experts that are one tensor): all of that would be there in float32.
    """
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    known = dict(zip(placeholders, values, strict=True))
    halves = {n: v for n, v in known.items() if isinstance(v, Tensor) and v.dtype in HALVES}
    if not halves or any(type(v) not in (Tensor, nn.Parameter) for v in halves.values()):
        return False
    sizes = {node: value.numel() for node, value in halves.items()}  # of the weight whose part or view a node is
    for node in graph.nodes:
        given = [sizes[n] for n in node.all_input_nodes if n in sizes]
        if not _is_plain(node) or (given and not _may_read(node, max(given))):
            return False
        if given and node.target in _MOVES:
            sizes[node] = max(given)
    return True


def _may_read(node: fx.Node, size: int) -> bool:
    """Return whether a node may be given float32 in place of a weight of so many 16-bit numbers."""
    if changes_inputs(node) or _asks_for_dtype(node, "view"):
        return False
    return size <= LARGE or node.op == "output" or node.target in (*_MOVES, *LINEAR, *_EMBEDDING)


def _asks_for_dtype(node: fx.Node, method: str) -> bool:
    return node.target == method and any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values()))


def _is_plain(node: fx.Node) -> bool:
    """Return whether a node is one of torch's functions or of Python's operators, or no call of a function."""
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
