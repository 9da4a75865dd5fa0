"""The cost model against hand-computed numbers."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf

import pytest
import torch
from costed_plan import SITE, figures
from hypothesis import given
from hypothesis import strategies as st

from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.hardware import cost_model
from fhopt.hardware.cost_model import Cost, break_even, hypothetical_cost, model_cost
from fhopt.hardware.devices import DEVICES, Device, layout_time
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan
from fhopt.plan.window import DEFAULT_WINDOW

CODED = SidePlan(torch.zeros(2, 16, 16), torch.zeros(2, 16, 16), (BitGroup(4, 8, 1.0), BitGroup(2, 8, 1.0)))
UNCODED = SidePlan(torch.zeros(1, 8, 16), torch.zeros(2, 8, 8), ())
PLAN = LatentPlan((SitePlan(SITE, "freq", CODED, UNCODED),), sinks=4, recent=64, block=64)
ROUNDED = replace(PLAN, window_bits=8)
BOTH = SidePlan(torch.zeros(1, 16, 48), torch.zeros(2, 16, 16), (BitGroup(8, 16, 1.0),))
SHARED = SitePlan(SITE, "input", BOTH, SidePlan(torch.zeros(1, 16, 0), torch.zeros(2, 8, 16), BOTH.tiers))
EXACT, LATENT = model_cost([SITE], parameters=1000), model_cost([SITE], PLAN, parameters=1000)
WINDOW_OF_CODES = model_cost([SITE], ROUNDED, parameters=1000)
BASES = 2 * (512 + 512 + 128 + 128)  # bytes
devices = st.builds(
    Device, st.just("any"), st.just("gpu"), st.floats(1, 1e4), st.floats(0.01, 5000), st.floats(0.01, 500), st.just(80)
)
latents = st.sampled_from([LATENT, WINDOW_OF_CODES, *(hypothetical_cost([SITE], ratio) for ratio in (1, 2, 8))])


def test_bytes_and_operations_of_one_site_equal_hand_computed_ones() -> None:
    exact = EXACT.on(DEVICES["h100"], 200)
    assert exact.bytes == 200 * 2 * (16 + 8) * 2
    assert exact.operations == 2 * 4 * 200 * (16 + 8)
    latent = LATENT.on(DEVICES["h100"], 200)  # 4 + 64 + 32 tokens are unquantized, 100 quantized
    key_row, value_row = 2 * (8 * 4 // 8 + 8 * 2 // 8 + 2), 8 * 2
    assert latent.bytes == 100 * (key_row + value_row) + 100 * 96 + BASES
    products = 2 * 4 * 100 * (16 + 8) + 2 * 4 * 100 * (16 + 8)
    absorb, expand, encode, unpack = 2 * 4 * 16 * 16, 2 * 4 * 8 * 8, 2 * (512 + 128), 100 * 2 * 16
    assert latent.operations == products + absorb + expand + encode + unpack


def test_an_8_bit_window_costs_a_byte_per_element_its_scales_and_an_operation_per_code() -> None:
    exact, rounded = (
        c.on(DEVICES["h100"], 200) for c in (LATENT, WINDOW_OF_CODES)
    )  # 4 sinks, 96 tokens, 100 quantized
    assert exact.bytes - rounded.bytes == 96 * (96 - (48 + 2 * 2 * 2))
    assert rounded.operations - exact.operations == 96 * 48
    first = [c.on(DEVICES["h100"], 3) for c in (LATENT, WINDOW_OF_CODES)]
    assert first[0] == first[1]  # all three tokens are sinks


def test_an_8_bit_window_may_pay_before_any_token_is_quantized() -> None:
    wide = replace(SITE, heads=4, kv_heads=4, key_dim=64, value_dim=64)
    small = SidePlan(torch.zeros(4, 8, 64), torch.zeros(4, 64, 8), (BitGroup(2, 8, 1.0),))
    plan = LatentPlan((SitePlan(wide, "head", small, small),), 4, 64, 64, window_bits=8)
    exact, latent = model_cost([wide]), model_cost([wide], plan)
    found = break_even(exact, latent, DEVICES["h100"])
    bases = 2 * 4 * (8 * 64 + 64 * 8) * 2  # bytes; all parts are memory-bound
    assert found.verdict == "from" and found.tokens is not None and found.tokens < 100
    assert found.tokens == pytest.approx(4 + bases / (1024 - (512 + 2 * 2 * 4)), rel=1e-9)


def test_shared_rows_count_once_in_bytes_and_codes_and_twice_in_matmuls() -> None:
    rows = cost_model.LatentSizes.planned(SHARED, itemsize=2)
    assert rows == cost_model.LatentSizes(16, 16, token_bytes=18, quantized=16, encode=768, decode=768)
    for itemsize, bits in ((2, 8), (2, 16), (4, 8)):
        plan = LatentPlan((SHARED,), 4, 64, 64, window_bits=bits)
        latent = model_cost([SITE], plan, itemsize=itemsize)
        counted = latent.number(latent.bytes, 4 + 96 + 640) - (768 + 768) * itemsize
        assert counted == plan.cache_bytes(4 + 96 + 640, itemsize)
    arguments = (DEVICES["cpu"], 4, 1, 256, 256, 512)
    assert layout_time(*arguments, 1000, shared=True) < layout_time(*arguments, 1000)  # no codes to unpack


def test_batch_and_queries_scale_the_right_terms() -> None:
    one, many = (LATENT.on(DEVICES["h100"], 500, *sizes) for sizes in ((1, 1), (3, 1)))
    assert many.bytes - BASES == 3 * (one.bytes - BASES) and many.operations == 3 * one.operations
    queries = EXACT.on(DEVICES["h100"], 500, 1, 2)
    assert queries.bytes == EXACT.on(DEVICES["h100"], 500).bytes
    assert queries.operations == 2 * EXACT.on(DEVICES["h100"], 500).operations


def test_the_cost_of_a_model_is_the_sum_of_its_sites_and_its_weights() -> None:
    sites = [SITE, replace(SITE, name="other", key_dim=32)]
    total = model_cost(sites, PLAN, parameters=1000)
    parts = [cost_model.site_cost(SITE, PLAN.sites[0]), cost_model.site_cost(sites[1])]
    assert total.bytes == sum(p.bytes for p in parts) and total.operations == sum(p.operations for p in parts)
    figures = total.on(DEVICES["cpu"], 300)
    assert figures.step_seconds - figures.attention_seconds == pytest.approx(2000 / 25e9)


@figures
@given(st.integers(1, 3000), st.sampled_from([2, 4]), st.sampled_from([PLAN, ROUNDED]))
def test_latent_bytes_agree_with_the_plan_up_to_half_a_block(tokens: int, itemsize: int, plan: LatentPlan) -> None:
    latent = model_cost([SITE], plan, itemsize=itemsize)
    counted = latent.number(latent.bytes, tokens) - BASES * itemsize / 2
    saved = PLAN.exact_token_bytes(itemsize) - PLAN.sites[0].token_bytes(itemsize)
    assert abs(counted - plan.cache_bytes(tokens, itemsize)) <= PLAN.block / 2 * saved


@pytest.mark.parametrize(("window", "sizes"), [(16, [1536] * 3), (128, [9600, 12288, 12288])])
def test_a_sliding_window_is_no_longer_than_itself_and_a_short_one_exact(window: int, sizes: list[int]) -> None:
    sliding = replace(SITE, mask="sliding", window=window)
    plan = replace(PLAN, sites=(replace(PLAN.sites[0], site=sliding),))
    exact, latent = model_cost([sliding]), model_cost([sliding], plan)
    assert [exact.number(exact.bytes, t) for t in (100, 128, 5000)] == sizes
    assert window > 16 or break_even(exact, latent, DEVICES["h100"]).verdict == "never"
    later = [latent.number(latent.bytes, t) for t in (500, 5000)]
    assert later[0] == later[1] and (later[0] == sizes[2] if window == 16 else sizes[2] / 2 < later[0] < sizes[2])


@figures
@given(devices, latents, st.integers(1, 64))
def test_the_break_even_is_where_the_two_times_cross(device: Device, latent: Cost, batch: int) -> None:
    found = break_even(EXACT, latent, device, batch)

    def seconds(tokens: int) -> list[float]:
        return [c.on(device, tokens, batch).attention_seconds for c in (EXACT, latent)]

    slack = 1 + 1e-9  # float rounding
    if found.tokens is None:
        exact, quantized = seconds(10**6)
        assert found.verdict == "never" and exact <= quantized * slack
        return
    (exact_before, coded_before), (exact_after, coded_after) = map(seconds, (int(found.tokens), ceil(found.tokens)))
    assert exact_before <= coded_before * slack and coded_after <= exact_after * slack
    assert float(found.formula.subs(cost_model.BATCH, batch)) == found.tokens


def test_unquantized_latents_of_full_width_never_pay_and_latents_without_bases_always_do() -> None:
    plan = fit_plan.exact_plan([SITE])
    assert break_even(EXACT, model_cost([SITE], plan), DEVICES["h100"]) == cost_model.BreakEven("never")
    free = cost_model.site_cost(SITE, cost_model.LatentSizes(0, 0, 1, 0, 0, 0), open_tokens=100)
    assert break_even(EXACT, free, DEVICES["h100"]) == cost_model.BreakEven("always")


def test_a_larger_batch_pays_earlier_since_it_shares_the_bases() -> None:
    tokens = [break_even(EXACT, LATENT, DEVICES["h100"], batch).tokens for batch in (1, 4)]
    assert tokens[0] is not None and tokens[1] is not None and tokens[1] < tokens[0]


@figures
@given(devices, latents, st.integers(1, 5000), st.floats(1, 10), st.integers(1, 5000))
def test_more_bandwidth_is_never_slower_and_more_tokens_never_cheaper(
    device: Device, latent: Cost, tokens: int, factor: float, more: int
) -> None:
    now = latent.on(device, tokens)
    faster = latent.on(replace(device, bandwidth_gb_s=factor * device.bandwidth_gb_s), tokens)
    assert faster.attention_seconds <= now.attention_seconds and faster.step_seconds <= now.step_seconds
    longer = latent.on(device, tokens + more)
    slack = 1 - 1e-12  # float rounding
    assert longer.bytes >= now.bytes and longer.operations >= now.operations
    assert longer.attention_seconds >= now.attention_seconds * slack


@figures
@given(devices, latents, st.integers(1, 5000), st.integers(1, 8))
def test_the_time_formula_agrees_with_the_numeric_time(device: Device, latent: Cost, tokens: int, batch: int) -> None:
    symbolic = latent.number(latent.time(device), tokens, batch)
    assert symbolic == pytest.approx(latent.on(device, tokens, batch).attention_seconds, rel=1e-9)


@pytest.mark.parametrize(("batch", "ratio", "bound"), [(1, inf, 1.27), (16, 4, 2.55), (32, 8, 4.62)])
def test_the_maximum_gain_of_a_step_is_that_of_its_bytes(batch: int, ratio: float, bound: float) -> None:
    """Llama-3.1-8B in bfloat16 at a 32,768-token context."""
    layer = replace(SITE, heads=32, kv_heads=8, key_dim=128, value_dim=128)
    model = model_cost([layer] * 32, parameters=8_030_261_248)
    weights, cache = (model.number(e, 32768, batch) for e in (model.weights.bytes, model.bytes))
    assert cost_model.upper_bound(weights, cache, ratio) == pytest.approx(bound, abs=0.005)
    assert cost_model.upper_bound(0, cache) == inf


def test_a_plan_for_other_sites_is_refused() -> None:
    with pytest.raises(FhoptError, match=r"1 sites that the model does not have, such as 'layer\.attention'"):
        model_cost([replace(SITE, name="another")], PLAN)


def test_hypothetical_latents_have_the_window_of_a_default_plan() -> None:
    window = FitOptions().window
    assert window == DEFAULT_WINDOW
    assert window.sinks + window.recent + window.block // 2 == cost_model.DEFAULT_OPEN_TOKENS
