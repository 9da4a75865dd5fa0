"""The rules that `make fuzz-mutations` weakens exist under their names."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest

from benchmarks.zoo.fuzz_mutations import RULES


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_in_its_module(name: str) -> None:
    rule = RULES[name]
    found = reduce(getattr, rule.attribute.split("."), importlib.import_module(rule.module))
    assert callable(rule.weakened(found)) or isinstance(found, property)
