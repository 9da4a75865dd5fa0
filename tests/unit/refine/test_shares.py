"""Shares in the three notations that users write."""

from __future__ import annotations

import pytest

from fhopt.refine.shares import parse_share


@pytest.mark.parametrize(
    ("text", "share"),
    [("1/8", 0.125), ("12.5%", 0.125), (" 0.125 ", 0.125), ("1e-2", 0.01), ("3 %", 0.03), ("-2", -2.0), ("9/8", 1.125)],
)
def test_a_share_is_a_fraction_a_percentage_or_a_number(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "%", "1%%", "one", "1/0", "1/2/3", "nan", "inf", "1e999"])
def test_anything_else_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_share(text)
