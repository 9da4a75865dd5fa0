"""Lowering layer traces to programs, or naming the obstacle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from traced_functions import Products, Traced

from fhopt.codegen.cpu.calls.caches import Code
from fhopt.codegen.layers.lowering import Lowering, lower_trace
from fhopt.codegen.layers.trace import UnsupportedError


def test_matmuls_of_one_input_are_one_loop() -> None:
    module = Products(torch.float32, True)
    traced = Traced(module, [torch.randn(1, 1, 48)], module)
    lowering = Lowering(traced.trace)
    lowering.program()
    joined = [1 + len(i.joined) for i in lowering.segments[0] if i.code == Code.LINEAR]
    assert joined == [2, 1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.softmax(-1), "_softmax"),
        (lambda x: x.mean(0, keepdim=True) + x, "other dimensions"),
        (lambda x: x.pow(1.7), "a power of 1.7"),
        (lambda x: torch.add(x, x, alpha=2), "with a factor"),
        (lambda x: x.long().to(x.dtype), "from or to integers"),
        (lambda x: x.add_(1), "on an input or a weight"),
        (lambda x: x @ x, "that is not a weight"),
        (lambda x: x + torch.arange(4.0), "arange"),
        (lambda x: x * float(x[0, 0]), "_local_scalar_dense"),
        (lambda x: x.double().mul(2), "a result of torch.float64"),
    ],
)
def test_unsupported_operations_are_named(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        lower_trace(Traced(function, [torch.rand(4, 4)], nn.Module()).trace)
