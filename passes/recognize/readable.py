"""Unsupported inputs of recognition: function transforms, empty tensors, unsupported tensor types, with reasons.

Attention is recognized by running parts of a graph on random float64 values. This does not cover complex, quantized,
sparse or nested tensors, tensors without elements, or nodes that only run within the state of a function transform.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import FLOATS, fake, op_name
from fhopt.passes.graph.program import Program
from fhopt.passes.graph.transforms import scope_of

_NAMED = re.compile(r"soft(max|min)|attention|attn")


def check_readable(node: fx.Node) -> None:
    """Raise Miss if the attention around a softmax, or an attention call, is not supported."""
    scope = scope_of(node)
    if scope is not None:
        raise Miss(f"it runs inside {scope.name}; expected attention outside of function transforms", node)
    for tensor in (node, *node.all_input_nodes):
        _check_tensor(tensor)


def check_operands(*nodes: fx.Node) -> None:
    """Raise Miss for the first of the tensors that is unsupported or not floating-point."""
    for node in nodes:
        value = fake(node)
        _check_tensor(node)
        if isinstance(value, Tensor) and value.dtype not in FLOATS:
            dtype = str(value.dtype).removeprefix("torch.")
            raise Miss(f"{node.name} has the dtype {dtype}; expected real floating-point numbers", node)


def _check_tensor(node: fx.Node) -> None:
    """Raise Miss for anything but a dense tensor with elements; numbers and sizes pass."""
    value = fake(node)
    if not isinstance(value, Tensor):
        return
    if value.is_nested:
        raise Miss(f"{node.name} is a nested tensor; expected a dense one", node)
    if value.layout != torch.strided:
        raise Miss(f"{node.name} has the layout {value.layout}; expected a dense tensor", node)
    if any(isinstance(size, int) and size == 0 for size in value.shape):
        raise Miss(f"{node.name} has the shape {list(value.shape)}, so no elements; expected some", node)


def left_out(program: Program, read: Collection[fx.Node]) -> list[Miss]:
    """Return the reasons why calls named like attention, or nested tensors, are skipped; `read`: recognized nodes.

    Dynamo omits scaled_dot_product_attention of jagged tensors from its graphs, so that only its operands are visible.
    """
    results = [
        Miss(f"calls of {op_name(n)} are not supported; expected softmax or scaled_dot_product_attention", n)
        for n in program.graph.nodes
        if n.op.startswith("call_") and n not in read and _NAMED.search(op_name(n)) and not _is_ours(n)
    ]
    values = ((n, fake(n)) for n in program.graph.nodes if n.op != "placeholder")
    nested = [n for n, value in values if isinstance(value, Tensor) and value.is_nested]
    return results + [
        Miss("attention on nested tensors is not rewritten; expected dense, padded tensors", node)
        for node in nested[:1]
    ]


def _is_ours(node: fx.Node) -> bool:
    target = node.target
    return str(getattr(target, "namespace", getattr(target, "__module__", ""))).startswith("fhopt")
