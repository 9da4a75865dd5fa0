"""The texts that come with fhopt."""

from __future__ import annotations

import pytest

from fhopt.texts import tokens


@pytest.mark.parametrize("name", ["topics", "source", "license"])
def test_built_in_texts_are_long_and_fall_into_halves(name: str) -> None:
    text = tokens.read_text(name)
    first, second = tokens.halves(text)
    assert len(text) > 10_000 and first + second == text and abs(len(first) - len(second)) < len(text) / 10
