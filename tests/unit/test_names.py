"""Public names have one definition."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.size import TreeSize, working_tree


@cache
def tree() -> TreeSize:
    try:
        return TreeSize(working_tree())
    except OSError:
        pytest.skip("this is no git clone")


def test_a_public_class_is_defined_once_in_the_repository() -> None:
    assert tree().repeated_classes == {}


def test_a_public_function_is_defined_once_in_the_product() -> None:
    assert tree().repeated_functions == {}
