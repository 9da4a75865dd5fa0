"""Attention on latents, against slow references in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from naive import naive_attention

from fhopt.fitting.allocation import STEP
from fhopt.ops import algebra, latent_attention, packing

pytestmark = pytest.mark.usefixtures("references")
NO_TIERS = algebra.uncoded_options()


def test_unquantized_latent_attention_is_grouped_query_attention() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 3, 9, 5)
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, v, None, None, **NO_TIERS, scale=0.3)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, None, 0.3, 0.0), rtol=1e-5, atol=1e-5)
    logits = q.double() @ k.repeat_interleave(3, 1).double().mT * 0.3
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_fully_masked_query_gives_zero_and_minus_infinity() -> None:
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, k, None, mask, **NO_TIERS, scale=1.0)
    assert bool((out[:, :, 1] == 0).all()) and bool((lse[:, :, 1] == -math.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[:, :, 0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_tokens_the_result_is_zero_and_minus_infinity(dtype: torch.dtype) -> None:
    """For example, a window emptied by a crop."""
    q, nothing = torch.randn(1, 2, 3, 8, dtype=dtype), torch.randn(1, 2, 0, 8, dtype=dtype)
    codes = packing.round_rows(nothing)
    byte = algebra.BitGroups([8], [8], [1.0])
    both: tuple[Any, ...] = (
        ((nothing, None, nothing, None), NO_TIERS),
        ((*codes, *codes), algebra.group_options(byte, byte)),
    )
    for operands, options in both:
        reference: Any = latent_attention.latent_attention_reference
        out, lse = reference(q, *operands, None, **options, scale=1.0)
        assert out.shape == q.shape and not out.any() and bool((lse == -math.inf).all()) and lse.dtype == dtype


@pytest.mark.parametrize("tiers", [[(8, 8), (4, 16), (2, 8)], [(16, 8), (4, 24)], [(6, 8), (5, 16), (3, 8), (1, 8)]])
def test_attention_on_codes_equals_attention_on_dequantized_latents(tiers: list[tuple[int, int]]) -> None:
    bits, widths = [b for b, _ in tiers], [w for _, w in tiers]
    steps = [STEP.get(b, 1.0) for b in bits]
    q = torch.randn(2, 6, 3, sum(widths))
    key, key_scale = torch.ops.fhopt.pack(torch.randn(2, 2, 20, sum(widths)), bits, widths, steps)
    value, value_scale = torch.ops.fhopt.pack(torch.randn(2, 1, 20, sum(widths)) * 7, bits, widths, steps)
    options = dict(key_bits=bits, key_widths=widths, key_steps=steps)
    options |= dict(value_bits=bits, value_widths=widths, value_steps=steps)
    mask = torch.rand(2, 1, 3, 20) > 0.2
    out, _ = torch.ops.fhopt.latent_attention(q, key, key_scale, value, value_scale, mask, **options, scale=0.2)
    k = torch.ops.fhopt.unpack(key, key_scale, bits, widths, steps)
    v = torch.ops.fhopt.unpack(value, value_scale, bits, widths, steps)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.2, 0.0), rtol=1e-4, atol=1e-4)


def test_ops_follow_the_rules_of_torch_library() -> None:
    x = torch.randn(1, 1, 4, 16)
    checks = ("test_schema", "test_faketensor")
    for tiers in (([4, 2], [8, 8], [0.3, 0.9]), ([5, 1], [8, 8], [0.2, 1.6])):
        torch.library.opcheck(torch.ops.fhopt.pack.default, (x, *tiers), test_utils=checks)
        codes, scale = torch.ops.fhopt.pack(x, *tiers)
        torch.library.opcheck(torch.ops.fhopt.unpack.default, (codes, scale, *tiers), test_utils=checks)
    q = torch.randn(1, 2, 1, 16)
    arguments = (q, x, None, x, None, None)
    options = {**NO_TIERS, "scale": 1.0}
    torch.library.opcheck(torch.ops.fhopt.latent_attention.default, arguments, options, test_utils=checks)
