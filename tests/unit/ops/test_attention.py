"""Canonical attention against a loop over heads in float64."""

from __future__ import annotations

import pytest
import torch
from naive import naive_attention


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_equals_a_loop_over_heads(heads: tuple[int, int], cap: float) -> None:
    h, g = heads
    q, k, v = torch.randn(2, h, 5, 8), torch.randn(2, g, 7, 8), torch.randn(2, g, 7, 6)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    out = torch.ops.fhopt.attention(q, k, v, mask, scale=0.4, softcap=cap)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.4, cap), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        torch.ops.fhopt.attention(q, k, k, scale=1.0)
