"""Program values have places in the arena, and strides of up to four dimensions."""

from __future__ import annotations

import itertools

import pytest
import torch
from lowered_functions import CapturedFunction
from needs import needs_compiler
from torch import Tensor

from fhopt.codegen.cpu.calls.caches import Code
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.instructions import (
    Buffer,
    Instruction,
    Value,
    contiguous_strides,
    four,
    place,
    row_layout,
)


def test_sizes_have_four_dimensions_without_ones() -> None:
    assert four((3, 1, 5)) == (1, 1, 3, 5) and four(()) == (1, 1, 1, 1)
    assert four((2, 1, 3, 4, 1, 5)) == (2, 3, 4, 5)
    with pytest.raises(UnsupportedError, match="5 dimensions"):
        four((2, 2, 2, 2, 2))


def test_contiguous_rows_are_recognized() -> None:
    x = torch.empty(2, 3, 8)
    assert row_layout(x) == (6, 8) and row_layout(x[..., :5]) == (6, 8) and row_layout(x[:, 0]) == (2, 24)
    assert row_layout(x.transpose(0, 1)) is None
    assert row_layout(x.transpose(1, 2)) is None and row_layout(x[0, 0]) == (1, 8)


def test_buffers_that_live_at_once_do_not_overlap() -> None:
    def value(size: int) -> Value:
        return Value(torch.empty(size), Buffer(size))

    values = [value(n) for n in (10, 100, 30, 7, 64, 20)]
    steps = [Instruction(Code.COPY, (1,) * 4, out, a) for a, out in itertools.pairwise(values)]
    size = place(steps)
    for step in steps:
        assert step.a is not None and step.a.buffer is not None and step.out.buffer is not None
        a, out = step.a.buffer, step.out.buffer
        assert a.offset + a.size <= out.offset or out.offset + out.size <= a.offset
        assert max(a.offset + a.size, out.offset + out.size) <= size
    assert size < sum(n + 16 for n in (10, 100, 30, 7, 64, 20))


@needs_compiler
def test_arena_memory_is_reused() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(50):
            x = x * 1.01 + 0.01
        return x

    captured = CapturedFunction(chain, [torch.randn(1000)])
    program = captured.lowered()
    assert program.arena < 4 * 1024
    torch.testing.assert_close(captured.run(program), captured.results[0])


def test_strides_of_dense_tensors() -> None:
    for shape in ((), (3,), (2, 1, 5), (4, 3, 2, 1)):
        assert contiguous_strides(shape) == torch.empty(shape).stride()
