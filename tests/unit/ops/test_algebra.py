"""Merging parts of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhopt.ops import algebra

pytestmark = pytest.mark.usefixtures("references")
NO_TIERS = algebra.uncoded_options()


def test_parts_merge_to_the_whole_and_an_empty_part_changes_nothing() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)

    def part(a: int, b: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.ops.fhopt.latent_attention(q, k[:, :, a:b], None, v[:, :, a:b], None, mask, **NO_TIERS, scale=0.5)
        return rows[0], rows[1]

    whole, _ = part(0, 10)
    torch.testing.assert_close(algebra.merge([part(0, 4), part(4, 10)]), whole, rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(algebra.merge([part(0, 10), part(0, 4, nothing)]), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_loops", [False, True])
def test_16_bit_operands_are_multiplied_in_float32_without_native_gemm(
    by_loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algebra, "multiplies_by_loops", lambda dtype: by_loops and dtype != torch.float64)
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert algebra.product_dtype(torch.bfloat16, cpu) == (torch.float32 if by_loops else torch.bfloat16)
    assert algebra.product_dtype(torch.bfloat16, other) == torch.bfloat16
    assert algebra.product_dtype(torch.float64, cpu) == torch.float64
