"""Kinds of JSON values: what a description read from a file must be, checked before anything is made of it.

    record({"bits": whole(1, 16), "step": number(0)})(value, "sites.0.key.0")

A kind is called with a value and the place where it stands, and raises ValueError with one sentence that names both. Of
numbers only those of the right type pass: no truth value, no 8.0 for 8, no NaN and no infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Kind = Callable[[Any, str], None]
LONGEST_TEXT = 1 << 16  # characters of one string
LARGEST = 1 << 31  # no size, count or seed reaches it
DEEPEST = 16  # lists and objects within each other
SHOWN = 40  # characters of a wrong value in a message


def whole(least: int = 0, most: int = LARGEST - 1) -> Kind:
    """Return the kind of integers between two numbers, both included."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(value, where, f"a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf, is_finite: bool = True) -> Kind:
    """Return the kind of numbers between two others; without `is_finite` NaN and infinities pass, too."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not _is_double(value):
            raise _wrong(value, where, "a number")
        if is_finite and not (math.isfinite(value) and least <= value <= most):
            raise _wrong(value, where, f"a finite number from {least:g} to {most:g}")

    return check


def _is_double(value: float) -> bool:
    try:
        float(value)
    except OverflowError:  # an integer of 400 digits
        return False
    return True


def text(value: Any, where: str) -> None:
    """Check a string."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise _wrong(value, where, f"a string of at most {LONGEST_TEXT} characters")


def truth(value: Any, where: str) -> None:
    """Check a truth value."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")


def one_of(*values: Any) -> Kind:
    """Return the kind of a few values."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in values):
            raise _wrong(value, where, " or ".join(map(repr, values)))

    return check


def maybe(kind: Kind) -> Kind:
    """Return a kind of which null may stand in place."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def several(kind: Kind) -> Kind:
    """Return the kind of lists of any length."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise _wrong(value, where, "a list")
        for i, item in enumerate(value):
            kind(item, f"{where}.{i}")

    return check


def row(*kinds: Kind) -> Kind:
    """Return the kind of lists of a fixed length, an item of each kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _wrong(value, where, f"a list of {len(kinds)}")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            kind(item, f"{where}.{i}")

    return check


def mapping(kind: Kind) -> Kind:
    """Return the kind of objects with any names, and values of one kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, where, "an object")
        for name, item in value.items():
            text(name, where)
            kind(item, _at(where, name))

    return check


def record(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, rest: Kind | None = None) -> Kind:
    """Return the kind of objects with these names. rest: what others may stand beside them; None: none."""
    optional = optional or {}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, where, "an object")
        for name in needed:
            if name not in value:
                raise ValueError(f"{_at(where, name)} is missing")
        for name, item in value.items():
            kind = needed.get(name) or optional.get(name) or rest
            if kind is None:
                raise ValueError(f"{_at(where, name)} is not a field of it")
            kind(item, _at(where, name))

    return check


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Check a JSON value of any kind that is not too deep; numbers need not be finite."""
    if depth > DEEPEST:
        raise ValueError(f"{where} has more than {DEEPEST} values within each other")
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            plain(item, _at(where, str(name)), depth + 1)
    elif isinstance(value, str):
        text(value, where)
    elif type(value) in (int, float):
        number(is_finite=False)(value, where)


def _at(where: str, name: str) -> str:
    shown = " ".join(name[:SHOWN].split())
    return f"{where}.{shown}" if where else shown


def _wrong(value: Any, where: str, expected: str) -> ValueError:
    try:
        found = repr(value)[: SHOWN + 1]
    except ValueError:  # an integer with more digits than Python prints
        found = "a number of thousands of digits"
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return ValueError(f"{where or 'the file'} is {found}, expected {expected}")
