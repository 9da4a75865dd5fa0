"""Kinds of JSON values: accepted values, and messages for others."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fhopt.plan import json_kinds as kinds

PERSON = kinds.record({"name": kinds.text}, {"age": kinds.whole(0, 150)})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kinds.whole(1, 8), 8),
        (kinds.number(0, 1), 1),
        (kinds.number(is_finite=False), math.nan),
        (kinds.one_of(8, 16), 16),
        (kinds.maybe(kinds.text), None),
        (kinds.several(kinds.truth), [True, False]),
        (kinds.row(kinds.text, kinds.whole()), ["a", 1]),
        (kinds.mapping(kinds.number()), {"a": 0.5}),
        (PERSON, {"name": "a", "age": 3}),
        (kinds.record({}, rest=kinds.check_plain), {"a": [1, {"b": None}]}),
        (kinds.zero_or(kinds.number(1)), 0),
        (kinds.text, "\U0001f600\n"),
        (kinds.check_line, "model.layers.0"),
    ],
)
def test_values_of_a_kind_pass(kind: kinds.Kind, value: Any) -> None:
    kind(value, "x")


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (kinds.whole(1, 8), 9, "x is 9; expected a whole number from 1 to 8"),
        (kinds.whole(1, 8), 8.0, r"x is 8\.0; expected a whole number"),
        (kinds.whole(), True, "x is True; expected a whole number"),
        (kinds.number(), math.nan, "x is nan; expected a finite number"),
        (kinds.number(0, 1), math.inf, "x is inf; expected a finite number from 0 to 1"),
        (kinds.number(), 10**400, "expected a number"),
        (kinds.number(is_finite=False), "1", "x is '1'; expected a number"),
        (kinds.one_of(8, 16), 16.0, "expected 8 or 16"),
        (kinds.text, "a" * 70_000, "expected a string of at most"),
        (kinds.truth, 1, "expected true or false"),
        (kinds.several(kinds.text), ["a", 1], r"x\.1 is 1; expected a string"),
        (kinds.several(kinds.text), "a", "expected a list"),
        (kinds.row(kinds.text), [], "expected a list of 1"),
        (kinds.mapping(kinds.text), {"a": 1}, r"x\.a is 1"),
        (kinds.mapping(kinds.text), [], "expected an object"),
        (PERSON, {"age": 3}, r"x\.name is missing"),
        (PERSON, {"name": "a", "size": 3}, r"x\.size is not a known field"),
        (PERSON, None, "x is None; expected an object"),
        (kinds.check_plain, {"a": "b" * 70_000}, r"x\.a is 'b"),
        (kinds.check_plain, {"\ud800": 1}, r"x is '\\ud800'; expected a string"),
        (kinds.zero_or(kinds.number(1)), False, "x is False; expected a number"),
        (kinds.zero_or(kinds.number(1)), 0.5, "x is 0.5; expected a finite number from 1"),
        (kinds.text, "\udc80", r"x is '\\udc80'; expected a string"),
        (kinds.check_line, "a\nb", r"x is 'a\\nb'; expected at most 500 printable characters"),
        (PERSON, {"name": "a", "\ud800": 3}, r"x\.\\ud800 is not a known field; expected one of name, age"),
    ],
)
def test_other_values_are_refused_with_their_place(kind: kinds.Kind, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kind(value, "x")


def test_an_integer_too_long_for_python_to_print_is_refused() -> None:
    with pytest.raises(ValueError, match="a number with thousands of digits"):
        kinds.whole()(10**5000, "x")


def test_values_nested_too_deeply_are_refused() -> None:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 16 levels deep"):
        kinds.check_plain(deep, "x")
