"""Resolution of casts to another tensor's dtype, which is known from tracing.

    before                                              after
    s = s.type_as(q)                                    s = s.to(float16)
    s = s.to(q)                                         s = s.to(float16); s.to(device, float16) from another device

The other tensor contributes only its dtype and device. Otherwise it would seem to flow into the scores.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fhopt.passes.graph.nodes import argument, fake, op_name
from fhopt.passes.graph.program import Program

CASTS = frozenset({"type_as", "to"})


def resolve_casts(program: Program) -> None:
    """Replace, in place, every cast to another tensor's dtype by a cast to that dtype. Exact; it cannot fail."""
    for node in program.graph.nodes:
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
