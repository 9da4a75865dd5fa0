"""The kernel on torch operations."""

from __future__ import annotations

import pytest
from attention_cases import FOUR, KernelCase, assert_same, expected, inputs

from fhopt.codegen.build import build_torch

pytestmark = pytest.mark.usefixtures("nothing_built")


def test_torch_kernels_merge_tiles_of_tokens() -> None:
    case = KernelCase(FOUR, FOUR, 2, 1, 1, 1, 4500)
    x = inputs(case)
    assert_same(build_torch(case.spec())(*x, None, **case.options()), expected(case, x, None))
