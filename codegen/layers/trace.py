"""Traces of decoder layers: the operations of a call, in order, on numbered values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ATTENTION = "attention"  # name of the operation that ends a segment


class UnsupportedError(Exception):
    """A layer uses an operation that layer programs do not support. The message names it."""


@dataclass(frozen=True)
class Ref:
    """A value of a trace, by its number."""

    number: int


@dataclass(frozen=True)
class TracedValue:
    """Shape, strides and type of a value; source: "input", "weight" or "result"."""

    source: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TracedOp:
    """An operation by its name ("aten::mul.Tensor"), with values as `Ref`s in its arguments, also within tuples."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: tuple[Ref, ...]


@dataclass(frozen=True)
class LayerTrace:
    """The computation of a layer: values (inputs, then weights and results in order of use), operations, output.

    Equal traces belong to layers that differ only in their weights.
    """

    values: tuple[TracedValue, ...]
    ops: tuple[TracedOp, ...]
    output: Ref

    @property
    def attention(self) -> TracedOp:
        """Return the operation that attends to the cache. Expects a trace that has one."""
        return next(op for op in self.ops if op.name == ATTENTION)
