"""Check of a lowered segment against the captured call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.fx import Node

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.program import SegmentCall, run_segment
from fhopt.codegen.programs.schedule import NativeSegment

SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative to the largest absolute value


def check_segment(segment: NativeSegment) -> None:
    """Run a segment on the captured values. Raises UnsupportedError if its results differ from the captured ones."""
    program = segment.program
    externals = (ctypes.c_int64 * program.externals)()
    dense = [_value(node).contiguous() for node in segment.inputs]
    for index, (node, tensor) in enumerate(zip(segment.inputs, dense, strict=True)):
        weight = node.meta.get("weight")
        externals[index] = tensor.data_ptr() if weight is None else weight.address
    made = [torch.empty(stored.shape, dtype=stored.dtype) for stored in program.stored]
    for stored, tensor in zip(program.stored, made, strict=True):
        externals[stored.external] = tensor.data_ptr()
    run_segment(SegmentCall(program, externals), torch.get_num_threads())
    for node, tensor in zip(segment.outputs, made, strict=True):
        if not is_close(tensor, _value(node), sum_terms(node)):
            raise UnsupportedError(f"a program gives other results ({node.name})")


def _value(node: Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def sum_terms(node: Node) -> Tensor:
    """Return the largest absolute value, per element, of a captured value and of the terms that it is the sum of.

    Large terms with opposite signs leave a small sum with their rounding errors: residual streams have such channels.
    """
    largest = _value(node).float().abs()
    for term in node.all_input_nodes if node.target in SUMS else ():
        largest = largest.maximum(sum_terms(term))
    return largest


def is_close(x: Tensor, y: Tensor, terms: Tensor | None = None) -> bool:
    """Return whether results are equal up to rounding; infinities and NaN must be in the same places.

    Errors are relative to the largest absolute value, and per element to `terms`, of the same shape, if larger.
    """
    tolerance = TOLERANCE[y.dtype]
    x, y = x.float(), y.float()
    finite = y.isfinite()
    same = (x == y) | (x.isnan() & y.isnan())
    if not bool(same[~finite].all()):
        return False
    difference, largest = (x - y)[finite].abs(), y[finite].abs()
    if not difference.numel():
        return True
    bound = largest.max() if terms is None else terms[finite].nan_to_num().clamp(min=largest.max())
    return bool((difference <= tolerance * bound + 1e-6).all())
