"""Resolution of casts to another tensor's dtype, which is known from tracing, and of casts inside a softmax.

    before                                              after
    s = s.type_as(q)                                    s = s.to(float16)
    s = s.to(q)                                         s = s.to(float16); s.to(device, float16) from another device
    p = softmax(s, dtype=float32), s float64            p = softmax(s.to(float32), dtype=float32)

The other tensor contributes only its dtype and device. Otherwise it would seem to flow into the scores. A softmax casts
first, and numbers beyond the range of its dtype become infinite: the lowest float64, a mask value, becomes -inf.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fhopt.passes.graph.nodes import LOG_SOFTMAX, SOFTMAX, argument, call_method, fake, op_name, overflow_limit
from fhopt.passes.graph.program import Program

CASTS = frozenset({"type_as", "to"})


def resolve_casts(program: Program) -> None:
    """Give every cast, in place, a node and a dtype of its own; see the module docstring. Exact; it cannot fail."""
    for node in program.graph.nodes:
        if op_name(node) in SOFTMAX | LOG_SOFTMAX and overflow_limit(node) < math.inf:
            source = argument(node, 0, "input", "self")
            with program.graph.inserting_before(node):
                node.replace_input_with(source, call_method(program, "to", source, fake(node).dtype))
            continue
        other = argument(node, 1, "other", "tensor") if op_name(node) in CASTS else None
        if isinstance(other, fx.Node) and _is_plain(node, other):
            tensor, source = argument(node, 0, "input", "self"), fake(other)
            is_moved = fake(tensor).device != source.device
            node.op, node.target = "call_method", "to"
            node.args = (tensor, source.device, source.dtype) if is_moved else (tensor, source.dtype)
            node.kwargs = {}


def _is_plain(node: fx.Node, other: fx.Node) -> bool:
    """Return whether a cast has two tensors and no options such as `copy` or a memory format."""
    tensor: Any = argument(node, 0, "input", "self")
    tensors = [fake(n) for n in (tensor, other) if isinstance(n, fx.Node)]
    return len(tensors) == 2 and len(node.args) + len(node.kwargs) == 2 and all(isinstance(t, Tensor) for t in tensors)
