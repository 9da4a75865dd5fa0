"""The check of a lowered segment on captured values."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from fhopt.decode.reference import is_close, sum_terms


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


def test_a_small_sum_of_large_terms_has_their_rounding_errors() -> None:
    y, terms = torch.tensor([40.0, 0.5], dtype=torch.bfloat16), torch.tensor([624.0, 0.5])
    shifted = torch.tensor([42.5, 0.5], dtype=torch.bfloat16)
    assert not is_close(shifted, y) and is_close(shifted, y, terms)
    assert not is_close(torch.tensor([40.0, 3.0], dtype=torch.bfloat16), y, terms), "other elements keep their bound"


def test_terms_are_those_of_the_sum_that_makes_the_value() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    total = graph.call_function(torch.ops.aten.add.Tensor, (a, b))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (total, 2.0))
    a.meta["val"], b.meta["val"] = torch.tensor([[624.0, 1.0]]), torch.tensor([-584.0, 2.0])
    total.meta["val"] = a.meta["val"] + b.meta["val"]
    scaled.meta["val"] = total.meta["val"] * 2
    assert sum_terms(total).tolist() == [[624.0, 3.0]]
    assert sum_terms(scaled).tolist() == [[80.0, 6.0]]
