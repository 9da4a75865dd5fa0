"""Bit allocation over channels: bit groups, for CPUs and for GPUs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fitting_by_hand import MIXING, RATIOS, basis, nats, site, spectrum, statistics, wide
from hand_plans import SITE
from small_models import TOKENS, FittedModel

from fhopt.errors import FhoptError
from fhopt.fitting import allocation, choices, fit_plan
from fhopt.fitting.allocation import STEPS, UNBIASED
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.costs import SideCosts
from fhopt.fitting.statistics import SideStatistics, SiteStatistics
from fhopt.ops import algebra
from fhopt.plan.site_plan import TIER_QUANTUM
from fhopt.plan.window import ResidualWindow

# ---- sizes


@pytest.mark.parametrize("ratio", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("layout", [*MIXING, "auto"])
def test_the_whole_cache_has_the_requested_ratio(fitted: FittedModel, layout: str, ratio: float) -> None:
    plan = fitted.plan(ratio, layout)
    assert ratio <= plan.ratio(TOKENS) < ratio * 1.05  # two small sites: the remainder is less than one chunk


@pytest.mark.parametrize("options", [dict(window_bits=16), dict(sinks=0), dict(tokens=512), dict(recent=64, block=64)])
def test_sinks_and_window_count_towards_the_ratio(llama: FittedModel, options: dict[str, Any]) -> None:
    plan = llama.plan(3, **options)
    assert 3 <= plan.ratio(options.get("tokens", TOKENS)) < 3.15


@pytest.mark.parametrize(
    ("window_bits", "bits"),
    [(8, 186), (16, 182)],
    # 1000 tokens of 2 * (16 + 8) elements: 96 bytes unquantized, 48 + 2 * 2 scales of 2 bytes = 56 in an 8-bit window.
    # 4 sinks, 984 quantized (988 // 8 blocks), 12 in the window. A quarter of 96,000 bytes is 24,000:
    # 8 * (24,000 - 4 * 96 - 12 * 56) / 984 = 186.5; 8 * (24,000 - 16 * 96) / 984 = 182.6
)
def test_a_quantized_token_gets_the_bits_that_sinks_and_window_leave(window_bits: int, bits: int) -> None:
    budget = allocation.Budget(4.0, ResidualWindow(4, 8, 8, window_bits), tokens=1000)
    assert budget.quantized_token_bits([SITE]) == bits


def test_the_exact_cache_of_a_sliding_window_holds_its_tokens() -> None:
    sites = [site("all"), site("slides")]
    budget = allocation.Budget(4.0, ResidualWindow(4, 32, 8, 8), tokens=8192, sliding={"slides": 512})
    bytes_ = [2 * s.exact_numbers_per_token for s in sites]
    assert budget.exact_bytes(sites) == 8192 * bytes_[0] + 512 * bytes_[1]
    assert 8 * budget.exact_bytes(sites) / 4 / 8192 > budget.quantized_token_bits(sites)


def test_a_context_without_quantized_tokens_is_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match=r"19 tokens is covered by sinks .* Raise --tokens"):
        llama.plan(2, tokens=19)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", MIXING)
def test_bit_groups_have_falling_bits_and_whole_chunks(fitted: FittedModel, layout: str, ratio: float) -> None:
    for fitted_site in fitted.plan(ratio, layout).sites:
        for side in (fitted_site.key, fitted_site.value):
            bits = [t.bits for t in side.tiers]
            assert bits == sorted(set(bits), reverse=True)
            assert all(t.width % TIER_QUANTUM == 0 and t.width for t in side.tiers)
            assert sum(t.width for t in side.tiers) == side.width
            assert all(t.step == allocation.STEPS.get(t.bits, 1.0) for t in side.tiers)


def test_channels_go_into_the_bit_groups_of_their_bits() -> None:
    """The second chunk is the most expensive and comes first; the free one is dropped."""
    pair: tuple[Basis, ...] = basis(1, 0.01, 1.0, 1e-12, 1e-12), basis(1, 1.0, 1e-12, 1e-12, 1e-12)
    plan = fit_plan.fit_ratio(
        statistics("a"), bases={"a": {"band": pair}}, ratio=10, layout="band", sinks=0, recent=1, block=1,
        tokens=100_000,
    )  # fmt: skip
    key = plan.sites[0].key
    assert [t.width for t in key.tiers] == [8, 8] and key.width == 16
    kept = key.encode[0].argmax(1).tolist()
    assert kept == [*range(8, 16), *range(8)]
    assert torch.equal(key.decode.reshape(1, 32, 16).mT, key.encode)


def test_only_allowed_bits_are_used(llama: FittedModel) -> None:
    for fitted_site in llama.plan(4, bits=(2, 8)).sites:
        assert {t.bits for side in (fitted_site.key, fitted_site.value) for t in side.tiers} <= {2, 8}


# ---- for a GPU


@pytest.mark.parametrize(("groups", "channels"), [(1, 256), (2, 128), (4, 64), (4, 60), (1, 200)])
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_for_a_gpu_rows_are_few_bit_groups_of_whole_planes(groups: int, channels: int, ratio: float) -> None:
    for fitted_site in wide(groups, channels, ratio).sites:
        for side in (fitted_site.key, fitted_site.value):
            bits = [t.bits for t in side.tiers]
            assert 0 < len(bits) <= 3 and bits == sorted(set(bits) & set(choices.GPU_BITS), reverse=True)
            assert all(t.width * t.bits % (8 * choices.PLANE) == 0 for t in side.tiers)
            assert side.row_bytes() % 16 == 0


@pytest.mark.parametrize(("groups", "channels"), [(1, 256), (2, 128), (4, 64)])
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_for_a_gpu_less_than_a_plane_of_the_budget_is_left(groups: int, channels: int, ratio: float) -> None:
    plan = wide(groups, channels, ratio)
    budget = allocation.Budget(ratio, ResidualWindow(0, 1, 1, 8), tokens=100_000)
    asked = budget.quantized_token_bits([s.site for s in plan.sites])
    used = sum(8 * s.token_bytes() for s in plan.sites)
    assert 0 <= asked - used < 8 * choices.PLANE * groups


def side_of(side: Basis, costs: SideCosts | None, grain: choices.Grain) -> allocation.PartedSide:
    return allocation.side_of(allocation.chunk_nats(side, costs, grain), side.groups, grain)


@pytest.mark.parametrize("levels", [(2, 4, 8), (4, 8), (2, 8), (4,)])
def test_bit_groups_for_a_gpu_are_optimal_for_their_bytes(levels: tuple[int, ...]) -> None:
    """Compare with all numbers of planes per bit group, channels ordered by cost."""
    side = spectrum(88, 1, 300.0, 2)
    part = side_of(side, None, choices.Grain(levels, choices.PLANE)).parts[0]
    dropped = side.variance[0].unflatten(0, (-1, TIER_QUANTUM)).sum(1) / 2
    costs = torch.cat([dropped.sort(descending=True).values, torch.zeros(5)])
    best = dict.fromkeys(range(len(part.bits)), float("inf"))
    for counts in itertools.product(range(9), repeat=len(levels)):
        ends = list(itertools.accumulate(n * 16 // b for n, b in zip(counts, sorted(levels)[::-1], strict=True)))
        if ends[-1] > 16 // min(levels) * -(-11 * min(levels) // 16) or sum(counts) not in best:
            continue
        tiers = zip([0, *ends], [*ends, 16], [*sorted(levels)[::-1], 0], strict=True)
        nats = sum(float(costs[begin:end].sum()) * allocation.DISTORTION[b] for begin, end, b in tiers)
        best[sum(counts)] = min(best[sum(counts)], nats)
    assert part.bits == [8 * choices.PLANE * n for n in best]
    assert part.nats == pytest.approx(list(best.values()))
    for n, nats in best.items():  # the loss was counted for these chunks
        bits = part.chunks(n)
        assert sum(bits) * TIER_QUANTUM == part.bits[n]
        padded = torch.cat([dropped, torch.zeros(len(bits) - 11)])
        assert sum(float(c) * allocation.DISTORTION[b] for c, b in zip(padded, bits, strict=True)) == pytest.approx(
            nats
        )


def test_bits_for_a_cpu_do_not_depend_on_its_threads_and_fill_no_planes() -> None:
    plans = [wide(1, 256, 4.0, device) for device in ("cpu", "cpu:4")]
    tiers = [[(s.layout, s.key.tiers, s.value.tiers) for s in plan.sites] for plan in plans]
    assert tiers[0] == tiers[1]
    assert any(
        tier.width * tier.bits % (8 * choices.PLANE) for _, *sides in tiers[0] for side in sides for tier in side
    )
    assert any(t.bits not in choices.GPU_BITS for s in plans[0].sites for t in s.key.tiers)


def test_whole_planes_cost_less_than_a_tenth_of_the_bytes() -> None:
    """Compare with chunks of the same bits, which a GPU plan without planes would have."""
    for ratio in (3.0, 4.0):
        same = [nats(wide(1, 256, r, None, bits=choices.GPU_BITS)) for r in (ratio, 1.1 * ratio)]
        assert same[0] <= nats(wide(1, 256, ratio)) < same[1]


def test_channels_of_planes_beyond_the_last_one_are_empty() -> None:
    side = wide(4, 60, 1.5).sites[0].key
    assert [(t.bits, t.width) for t in side.tiers] == [(8, 64)]  # more bytes than it can use
    x = torch.randn(1, 4, 5, 60)
    latent = algebra.encode(x, side.encode)
    assert latent.shape[-1] == side.width and int((latent == 0).all(2).sum()) == 4 * (side.width - 60)


def test_bits_that_make_no_kernel_for_a_gpu_are_refused() -> None:
    with pytest.raises(FhoptError, match=r"bits \[3, 5\] have no kernel for h100; expected a subset of 2, 4, 8"):
        wide(1, 256, 4.0, bits=(3, 5))
    with pytest.raises(FhoptError, match="device 'v100' is unknown"):
        wide(1, 256, 4.0, device="v100")


def test_a_ratio_that_leaves_no_plane_is_refused_before_calibration() -> None:
    sites, budget = [site("a")], allocation.Budget(6.0, ResidualWindow(0, 1, 1, 8), tokens=100_000)
    allocation.check_reach(sites, budget, choices.BITS)  # 64 elements: 21 bytes; minimum: two sides of 1 + 2 bytes
    with pytest.raises(FhoptError, match=r"21 bytes per quantized token .* at least 36"):
        allocation.check_reach(sites, budget, choices.BITS, "h100")


@pytest.mark.parametrize("layout", [*MIXING, "auto"])
def test_a_larger_budget_never_increases_the_loss(fitted: FittedModel, layout: str) -> None:
    losses = [nats(fitted.plan(ratio, layout)) for ratio in RATIOS]
    assert losses == sorted(losses)


def test_a_head_size_that_is_no_multiple_of_a_chunk_is_padded(llama: FittedModel) -> None:
    """12 channels are two chunks; the last 4 channels of the second are empty."""
    odd = replace(SITE, key_dim=6, value_dim=6)
    zero = torch.zeros(1, 12, 12, dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64).unsqueeze(0)
    whole = Basis(eye, eye, torch.ones(1, 12, dtype=torch.float64))
    bases: CandidateBases = {"a": {"band": (whole, whole)}}
    sides = SideStatistics(1, zero, zero), SideStatistics(1, zero, zero)
    plan = fit_plan.fit_ratio(
        {"a": SiteStatistics(odd, *sides)}, bases=bases, ratio=1.5, layout="band", sinks=0, recent=1, block=1
    )
    side = plan.sites[0].key
    assert side.width == 16
    x = torch.randn(1, 2, 5, 6)
    torch.testing.assert_close(algebra.decode(algebra.encode(x, side.encode), side.decode), x)


# ---- predicted loss of a plan


def test_measured_costs_count_per_token() -> None:
    """Half of 0.5 nats per channel at 0 bits over 10 tokens, 8 channels per chunk; unmeasured levels are Gaussian."""
    side = basis(1, 1.0, 1.0)
    measured = SideCosts({0: torch.full((1, 16), 0.5, dtype=torch.float64)}, torch.tensor(10))
    parts = side_of(side, measured, choices.Grain((2, 16), 0)).parts
    for part in parts:
        assert part.bits == [0, 2 * 8, 16 * 8]
        assert part.nats == pytest.approx([0.2, 4 * allocation.DISTORTION[2], 0.0])
    assert len(parts) == 2


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_with_the_unbiased_gain_errors_are_uncorrelated_with_the_quantized_values(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(400_000, dtype=torch.float64)
    half = 2 ** (bits - 1)
    kept = ((x / STEPS[bits]).floor().clamp(-half, half - 1) + 0.5) * STEPS[bits]
    assert abs(float(((UNBIASED[bits] * kept - x) * x).mean())) < 0.005 < abs(float(((kept - x) * x).mean()))
