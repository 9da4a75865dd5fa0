"""The built-in texts."""

from __future__ import annotations

import pytest

from fhopt.texts import tokens


@pytest.mark.parametrize("name", ["topics", "source", "license", "mixture"])
def test_built_in_texts_are_long_and_have_two_halves(name: str) -> None:
    text = tokens.read_text(name)
    first, second = tokens.halves(text)
    assert len(text) > 10_000 and first + second == text and abs(len(first) - len(second)) < len(text) / 10


def test_each_half_of_the_mixture_has_every_kind() -> None:
    """Prose, contracts, languages and their scripts, dialogue, code, tables, JSON, sums and logs, always the same."""
    text = tokens.read_text("mixture")
    assert text == tokens.read_text("mixture")
    signs = {"id,date,name": 3, '{"name": ': 10, " x ": 10, "ERROR": 5, "Assistant: ": 2, "\n\n": 30}
    for half in tokens.halves(text):
        assert {sign: half.count(sign) >= least for sign, least in signs.items()} == dict.fromkeys(signs, True)
        scripts = [any(low <= letter <= high for letter in half) for low, high in ("äö", "éê", "぀ヿ")]
        assert sum(scripts) >= 2
    assert all(any(low <= letter <= high for letter in text) for low, high in ("ая", "一鿿", "가힣", "اي"))
