"""Kinds of JSON values: what a description read from a file must be, checked before anything is made of it.

    record({"bits": whole(1, 16), "step": number(0)})(value, "sites.0.key.0")

A kind is called with a value and the place where it stands, and raises WrongField with one sentence that names both.
Only numbers of the right type pass: no truth value, no 8.0 for 8, no NaN and no infinity. Strings can be printed: half
of a surrogate pair, which JSON can spell, is refused.
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
LONGEST_LINE = 500  # characters of a name, which messages repeat


class WrongField(ValueError):
    """A field of a file has a wrong value: `<field> <problem>; expected <X>`."""


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


def zero_or(kind: Kind) -> Kind:
    """Return the kind of numbers of a kind, and of 0."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or value != 0:
            kind(value, where)

    return check


def text(value: Any, where: str) -> None:
    """Check a string of Unicode characters."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or _is_halved(value):
        raise _wrong(value, where, f"a string of at most {LONGEST_TEXT} characters")


def _is_halved(value: str) -> bool:
    """Return whether a string has half of a surrogate pair, which no file or terminal takes."""
    return any("\ud800" <= c <= "\udfff" for c in value)


def line(value: Any, where: str) -> None:
    """Check a name: a short string without control characters, so that a message can repeat it."""
    if not isinstance(value, str) or len(value) > LONGEST_LINE or not value.isprintable():
        raise _wrong(value, where, f"at most {LONGEST_LINE} printable characters")


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
                raise WrongField(f"{_at(where, name)} is missing; expected a value")
        for name, item in value.items():
            kind = needed.get(name) or optional.get(name) or rest
            if kind is None:
                raise WrongField(f"{_at(where, name)} is not a field of it; expected {_few([*needed, *optional])}")
            text(name, where)
            kind(item, _at(where, name))

    return check


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Check a JSON value of any kind that is not too deep; numbers need not be finite."""
    if depth > DEEPEST:
        raise WrongField(f"{where[:SHOWN]}... has more than {DEEPEST} values within each other; expected fewer")
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            text(str(name), where)
            plain(item, _at(where, str(name)), depth + 1)
    elif isinstance(value, str):
        text(value, where)
    elif type(value) in (int, float):
        number(is_finite=False)(value, where)


def _at(where: str, name: str) -> str:
    shown = repr(name[:SHOWN])[1:-1]  # control characters are escaped
    return f"{where}.{shown}" if where else shown


def _few(names: list[str]) -> str:
    return "no field" if not names else f"one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _wrong(value: Any, where: str, expected: str) -> WrongField:
    try:
        found = repr(value)[: SHOWN + 1]
    except ValueError:  # an integer with more digits than Python prints
        found = "a number of thousands of digits"
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return WrongField(f"{where or 'the file'} is {found}; expected {expected}")
