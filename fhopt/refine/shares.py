"""Parsing of shares such as "1/8" or "12.5%"."""

from __future__ import annotations

from fractions import Fraction


def parse_share(text: str) -> float:
    """Parse a share from "1/8", "0.125" or "12.5%". Raises ValueError for anything else; callers check the range."""
    number = text.strip()
    try:
        return float(Fraction(number[:-1]) / 100 if number.endswith("%") else Fraction(number))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a number") from error
