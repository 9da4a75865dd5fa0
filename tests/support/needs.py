"""Marks of tests that need a C++ compiler or Triton, and parameters of which some are slow."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from fhopt.codegen.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: every `every`th runs in `make test`; the others are slow, for `make test-slow`.

    values: of one parameter, or tuples of several parameters.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow if i % every else ())
        for i, value in enumerate(values)
    ]


def covering(strength: int, **axes: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test by a product of axes; a covering array of it runs in `make test`, the rest is slow.

    strength: 2: every pair of values of two axes runs; 1: every value does. axes: values, or values by id, by the names
    of parameters. Greedy (Bryce and Colbourn 2007): each row covers the most new sets, with the least used values.
    """
    names = tuple(axes)
    values = [
        dict(axis) if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()
    ]
    rows = list(itertools.product(*values))

    def sets(row: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), strength))

    missing, chosen, used = set().union(*map(sets, rows)), set(), Counter[Any]()
    while missing:
        row = max(rows, key=lambda row: (len(sets(row) & missing), -sum(used[value] for value in enumerate(row))))
        chosen.add(row)
        missing -= sets(row)
        used.update(enumerate(row))
    parameters = [
        pytest.param(
            *(axis[key] for axis, key in zip(values, row, strict=True)),
            id="-".join(row), marks=() if row in chosen else pytest.mark.slow,
        ) for row in rows
    ]  # fmt: skip
    return pytest.mark.parametrize(names, parameters)
