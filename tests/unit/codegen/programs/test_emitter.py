"""Instructions that are emitted for a segment: loads, joined matmuls, copies."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fhopt.codegen.cpu.calls.caches import Code
from fhopt.codegen.programs.program import SegmentProgram


def codes(program: SegmentProgram) -> Counter[Code]:
    return Counter(Code(i.code) for i in program.instructions)


def joined(program: SegmentProgram) -> list[int]:
    """Return how many matmuls each parallel loop has."""
    counts = [i.joined for i in program.instructions if i.code == Code.LINEAR]
    firsts = itertools.accumulate(counts, lambda left, count: left - 1 if left > 1 else count)
    return [
        n for n, (left, before) in zip(counts, itertools.pairwise([1, *firsts]), strict=True) if left == 1 or before
    ]


def matmuls(count: int) -> Callable[..., Tensor]:
    return lambda x, *weights: torch.cat([F.linear(x + 0, weight) for weight in weights[:count]])
