"""The cache length in a capture: sums stay lengths, comparisons become guards, other arithmetic is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.length import CacheLength, LengthGuard


@pytest.fixture
def length() -> CacheLength:
    return CacheLength.of(70, [])


def test_sums_are_lengths(length: CacheLength) -> None:
    for made, added in ((length + 1, 1), (1 + length, 1), (length - 3, -3), (length + 1 - 5, -4)):
        assert isinstance(made, CacheLength) and made.added == added and int(made) == 70 + added


def test_a_difference_of_lengths_is_a_number(length: CacheLength) -> None:
    assert type((length + 5) - (length - 2)) is int and (length + 5) - (length - 2) == 7
    assert (length + 1 > length) and not length.guards


def test_comparisons_with_numbers_are_guards(length: CacheLength) -> None:
    assert max(0, length - 20) == 50 and length.guards[0] == LengthGuard("__gt__", -20, 0, True)
    guards = [
        LengthGuard("__ge__", -20, 0, True),
        LengthGuard("__lt__", 1, 72, True),
        LengthGuard("__ne__", 0, 70, False),
    ]
    for guard in guards:
        assert guard.holds(70) and not guard.holds({"__ge__": 19, "__lt__": 71, "__ne__": 71}[guard.comparison])
    assert bool(length) and length.guards[-1] == LengthGuard("__ne__", 0, 0, True)


@pytest.mark.parametrize(
    "compute",
    [lambda n: n * 2, lambda n: n // 8, lambda n: n % 8, lambda n: n + n, lambda n: 100 - n, lambda n: n < 0.5],
)
def test_other_arithmetic_is_refused(length: CacheLength, compute: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedError, match="computes with the cache length"):
        compute(length)
