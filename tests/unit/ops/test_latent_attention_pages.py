"""A list of pages acts as a mask of their tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hand_plans import CODED
from paged_plans import kernels, naive_mask

from fhopt.ops import algebra, packing
from fhopt.plan.site_plan import BitGroup


def operands(tiers: tuple[BitGroup, ...], tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands of `fhopt::latent_attention`: B=2, H=8, J=4 for keys and 2 for values, R=16."""
    query, keys, values = torch.randn(2, 8, 1, 16), torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)
    shape = algebra.BitGroups([t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers])
    options = algebra.group_options(shape, shape) | {"scale": 0.3}
    if not tiers:
        return (query, keys, None, values, None), options
    return (query, *packing.pack_reference(keys, *shape), *packing.pack_reference(values, *shape)), options


@pytest.mark.parametrize("generated", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
@pytest.mark.parametrize("units", [1, 2])
def test_a_list_of_pages_acts_as_a_mask_of_their_tokens(
    units: int, tiers: tuple[BitGroup, ...], generated: bool
) -> None:
    x, options = operands(tiers, 58)  # the last page is short
    lists = torch.tensor([[[0, 2, 3], [1, -1, -1]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)[:, :units]
    given = torch.rand(2, 1, 1, 58) > 0.3
    for mask, lengths in ((None, None), (given, None), (None, torch.tensor(50)), (given, torch.tensor([58, 20]))):
        seen = naive_mask(lists, 16, 8, 58)
        allowed = seen if mask is None else seen & mask
        with kernels(False):
            expected = torch.ops.fhopt.latent_attention(*x, allowed, **options, lengths=lengths)
        with kernels(generated):
            found = torch.ops.fhopt.latent_attention(*x, mask, **options, lengths=lengths, pages=lists, page_tokens=16)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if units == 2:
        assert bool((found[1][1, 4:] == -math.inf).all() and (found[0][1, 4:] == 0).all())  # an empty list


@pytest.mark.parametrize("generated", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
def test_a_list_of_all_pages_is_bit_identical_to_none(tiers: tuple[BitGroup, ...], generated: bool) -> None:
    x, options = operands(tiers, 160)
    lists = torch.arange(10, dtype=torch.int32).expand(2, 2, 10)
    with kernels(generated):
        dense = torch.ops.fhopt.latent_attention(*x, None, **options)
        found = torch.ops.fhopt.latent_attention(*x, None, **options, pages=lists, page_tokens=16)
    assert torch.equal(found[0], dense[0]) and torch.equal(found[1], dense[1])


def test_lists_that_do_not_divide_heads_are_refused() -> None:
    x, options = operands((), 58)
    for lists, tokens in ((torch.zeros(2, 3, 1, dtype=torch.int32), 16), (torch.zeros(2, 2, 1, dtype=torch.int32), 0)):
        with kernels(False), pytest.raises(ValueError, match="U a divisor of the heads, and pages of at least one"):
            torch.ops.fhopt.latent_attention(*x, None, **options, pages=lists, page_tokens=tokens)
