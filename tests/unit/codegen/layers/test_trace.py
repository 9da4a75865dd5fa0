"""Traces are equal if layers run the same operations."""

from __future__ import annotations

import torch
from traced_functions import Products, Traced


def test_traces_do_not_depend_on_the_weights() -> None:
    first, second = Products(torch.float32, True), Products(torch.float32, True)
    one = Traced(first, [torch.randn(1, 1, 48)], first).trace
    other = Traced(second, [torch.randn(1, 1, 48)], second).trace
    assert one == other and hash(one) == hash(other)
    assert one != Traced(first, [torch.randn(2, 1, 48)], first).trace


def test_traces_depend_on_constants_dtypes_and_order() -> None:
    x, module = torch.randn(4), torch.nn.Module()
    traces = [
        Traced(function, [x], module).trace
        for function in (lambda x: x * 2, lambda x: x * 3, lambda x: x + 2, lambda x: (x * 2).half())
    ]
    assert len(set(traces)) == len(traces)
