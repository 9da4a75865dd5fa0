"""Bytes of a token in an engine's blocks."""

from __future__ import annotations

import pytest
import torch
from hand_plans import CODED, random_plan

from fhopt.ops import algebra, packing
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan
from fhopt.serving.rows import FirstRows, LatentRows, WindowRows

KEYS, VALUES = torch.randn(7, 2, 16), torch.randn(7, 2, 8)
CASES = {"quantized": CODED, "not quantized": ()}


def site_of(plan: LatentPlan) -> SitePlan:
    site = plan.sites[0]
    sides = [SidePlan(s.encode.float(), s.decode.float(), s.tiers) for s in (site.key, site.value)]
    return SitePlan(site.site, site.layout, *sides)


@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_restored_as_packed(layout: str, case: str, dtype: torch.dtype) -> None:
    site = site_of(random_plan(layout, CASES[case]))
    codec = LatentRows(site, dtype)
    rows = torch.zeros(7, codec.size, dtype=torch.uint8)
    codec.write(KEYS, VALUES, rows)
    both = torch.cat([KEYS, VALUES], -1)
    inputs = [both, both] if site.is_shared else [KEYS, VALUES]
    sides = [site.key, site.key] if site.is_shared else [site.key, site.value]
    for (latents, scale), side, x in zip(codec.read(rows), sides, inputs, strict=True):
        expected = algebra.encode(x.transpose(0, 1)[None], side.encode)
        if side.tiers:
            codes, scales = packing.pack_reference(expected, *algebra.bit_groups(side))
            assert torch.equal(latents, codes) and scale is not None and torch.equal(scale, scales)
        else:
            assert scale is None and torch.equal(latents, expected.to(dtype))


def test_a_row_has_the_bytes_of_the_plan() -> None:
    site = site_of(random_plan("head", CODED))
    assert LatentRows(site, torch.bfloat16).size == site.token_bytes()
    assert WindowRows(site, 8, torch.bfloat16).size == site.window_bytes(8)
    assert WindowRows(site, 16, torch.bfloat16).size == site.window_bytes(16)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_window_is_restored_as_written(bits: int) -> None:
    codec = WindowRows(site_of(random_plan("head", CODED)), bits, torch.float32)
    found = codec.read(codec.rows(KEYS, VALUES), torch.float32)
    for x, read in zip((KEYS, VALUES), found, strict=True):
        assert torch.equal(read, packing.unround_rows(*packing.round_rows(x), torch.float32) if bits == 8 else x)


def test_sinks_are_written_in_parts_and_means_afterwards() -> None:
    codec = FirstRows(site_of(random_plan("head", CODED)), 5, True, torch.bfloat16)
    page = torch.zeros(1, codec.size, dtype=torch.uint8)
    codec.write_sinks(page, 0, KEYS[:2], VALUES[:2])
    codec.write_sinks(page, 2, KEYS[2:5], VALUES[2:5])
    assert not any(bool(mean.any()) for mean in codec.read_means(page))
    codec.write_means(page, (KEYS[6], VALUES[6]))
    for x, read in zip((KEYS, VALUES), codec.read_sinks(page), strict=True):
        assert torch.equal(read, x[:5].bfloat16().transpose(0, 1)[None])
    for x, mean in zip((KEYS, VALUES), codec.read_means(page), strict=True):
        assert torch.equal(mean[0], x[6])


def test_a_plan_without_sinks_and_means_still_has_a_page() -> None:
    codec = FirstRows(site_of(random_plan("head", CODED)), 0, False, torch.float32)
    key, value = codec.read_sinks(torch.zeros(1, codec.size, dtype=torch.uint8))
    assert codec.size > 0 and key.shape == (1, 2, 0, 16) and value.shape == (1, 2, 0, 8)
