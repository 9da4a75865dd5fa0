"""Public names have one definition, limits are named MAX_ or MIN_, and files and functions stay short."""

from __future__ import annotations

import subprocess
from functools import cache

import pytest

from benchmarks.size import MAX_FILE, TreeSize, working_tree


@cache
def tree() -> TreeSize:
    try:
        return TreeSize(working_tree())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git clone")


def test_a_public_class_is_defined_once_in_the_repository() -> None:
    assert tree().repeated_classes == {}


def test_a_public_function_is_defined_once_in_the_product() -> None:
    assert tree().repeated_functions == {}


def test_limits_are_named_max_or_min() -> None:
    assert tree().old_limits == []


def test_files_and_functions_are_short() -> None:
    assert tree().long_functions == [] and tree().long_files(MAX_FILE) == []
