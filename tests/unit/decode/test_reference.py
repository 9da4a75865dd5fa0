"""The check of a lowered segment on captured values."""

from __future__ import annotations

import pytest
import torch

from fhopt.decode.reference import is_close


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-4), (torch.bfloat16, 0.02), (torch.float16, 5e-3)])
def test_rounding_is_close(dtype: torch.dtype, error: float) -> None:
    x = torch.tensor([1.0, -100.0, 3.0])
    assert is_close((x + 100 * error).to(dtype), x.to(dtype))
    assert not is_close((x + 1000 * error).to(dtype), x.to(dtype))


def test_infinities_and_nan_must_be_in_the_same_places() -> None:
    x = torch.tensor([1.0, float("-inf"), float("nan"), float("inf")])
    assert is_close(x, x.clone())
    assert not is_close(x.nan_to_num(), x) and not is_close(x, x.nan_to_num()) and not is_close(-x, x)


def test_empty_values_are_close() -> None:
    assert is_close(torch.empty(0), torch.empty(0))
