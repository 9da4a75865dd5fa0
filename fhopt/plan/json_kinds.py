"""Kinds of JSON values: validation of a description from a file before it is used.

    record({"bits": whole(1, 16), "step": number(0)})(value, "sites.0.key.0")

A kind is called with a value and its location, and raises WrongField with one sentence that names both. Numbers must
have the right type: no booleans, no 8.0 for 8, no NaN and no infinity. Strings must be encodable: unpaired surrogates,
which JSON can encode, are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Kind = Callable[[Any, str], None]
LONGEST_TEXT = 1 << 16  # characters of one string
LARGEST = 1 << 31  # above every size, count and seed
DEEPEST = 16  # nesting of lists and objects
SHOWN = 40  # characters of a wrong value in a message
LONGEST_LINE = 500  # characters of a name, which messages quote


class WrongField(ValueError):
    """Error for a wrong value of a file's field: `<field> <problem>; expected <X>`."""


def whole(least: int = 0, most: int = LARGEST - 1) -> Kind:
    """Return the kind of integers in an inclusive range."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(value, where, f"a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf, is_finite: bool = True) -> Kind:
    """Return the kind of numbers in an inclusive range; without `is_finite`, NaN and infinities pass, too."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not _is_double(value):
            raise _wrong(value, where, "a number")
        if is_finite and not (math.isfinite(value) and least <= value <= most):
            raise _wrong(value, where, f"a finite number from {least:g} to {most:g}")

    return check


def _is_double(value: float) -> bool:
    try:
        float(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
    return True


def zero_or(kind: Kind) -> Kind:
    """Return the kind of numbers of `kind` or 0."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or value != 0:
            kind(value, where)

    return check


def text(value: Any, where: str) -> None:
    """Check a string without unpaired surrogates."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or _is_halved(value):
        raise _wrong(value, where, f"a string of at most {LONGEST_TEXT} characters")


def _is_halved(value: str) -> bool:
    """Return whether a string has an unpaired surrogate, which no file or terminal accepts."""
    return any("\ud800" <= c <= "\udfff" for c in value)


def check_line(value: Any, where: str) -> None:
    """Check a name: a short printable string, so that a message can quote it."""
    if not isinstance(value, str) or len(value) > LONGEST_LINE or not value.isprintable():
        raise _wrong(value, where, f"at most {LONGEST_LINE} printable characters")


def truth(value: Any, where: str) -> None:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")


def one_of(*values: Any) -> Kind:
    """Return the kind of the listed values."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in values):
            raise _wrong(value, where, " or ".join(map(repr, values)))

    return check


def maybe(kind: Kind) -> Kind:
    """Return the kind of values of `kind` or null."""

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
    """Return the kind of lists of fixed length, with one kind per item."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _wrong(value, where, f"a list of {len(kinds)}")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            kind(item, f"{where}.{i}")

    return check


def mapping(kind: Kind) -> Kind:
    """Return the kind of objects with arbitrary names and values of one kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, where, "an object")
        for name, item in value.items():
            text(name, where)
            kind(item, _at(where, name))

    return check


def record(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, rest: Kind | None = None) -> Kind:
    """Return the kind of objects with these names. rest: the kind of other entries; None: none are allowed."""
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
                raise WrongField(f"{_at(where, name)} is not a known field; expected {_few([*needed, *optional])}")
            text(name, where)
            kind(item, _at(where, name))

    return check


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Check any JSON value of limited depth; numbers need not be finite."""
    if depth > DEEPEST:
        raise WrongField(f"{where[:SHOWN]}... is nested more than {DEEPEST} levels deep; expected fewer")
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            text(str(name), where)
            check_plain(item, _at(where, str(name)), depth + 1)
    elif isinstance(value, str):
        text(value, where)
    elif type(value) in (int, float):
        number(is_finite=False)(value, where)


def _at(where: str, name: str) -> str:
    shown = repr(name[:SHOWN])[1:-1]  # escapes control characters
    return f"{where}.{shown}" if where else shown


def _few(names: list[str]) -> str:
    return "no field" if not names else f"one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _wrong(value: Any, where: str, expected: str) -> WrongField:
    try:
        found = repr(value)[: SHOWN + 1]
    except ValueError:  # an integer with more digits than Python prints
        found = "a number with thousands of digits"
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return WrongField(f"{where or 'the file'} is {found}; expected {expected}")
