"""Page weights and page selection, against plain loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hand_plans import CODED, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_plans import TOKENS, index_of, kernels, page_kernel, page_step, paged, same

from fhopt.attention import paged as attention_paged
from fhopt.attention.attend import attend
from fhopt.attention.cache_view import CacheView, SideRows
from fhopt.attention.paged import SAMPLE, mean_values
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.codegen import dispatch
from fhopt.ops import algebra, attention, masks, packing, page_selection, paged_attention
from fhopt.ops.page_selection import FEWEST
from fhopt.parallel.tensor_parallel import Share, _local_pages
from fhopt.plan.site_plan import BitGroup, PagePlan

# --------------------------------------------------------------------------------------------------- sketches


def test_the_weight_of_a_page_is_that_of_its_tokens() -> None:
    logits = torch.randn(2, 3, 1, 10)
    found = page_selection.page_logits(logits, 4)
    for p, tokens in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
        torch.testing.assert_close(found[..., p], logits[..., tokens].exp().sum(-1).log())


# --------------------------------------------------------------------------------------------------- selection


def naive_choice(weights: list[float], share: float, mass: float, lift: float, available: int) -> set[int]:
    """Pages of one query of one unit, best first. Always-visible tokens have the remaining weight, up to 1."""
    most = min(available, max(4, math.floor(available * share)))
    chosen: set[int] = set()
    for page in sorted(range(len(weights)), key=lambda p: -weights[p])[:most]:
        others = sum(w for p, w in enumerate(weights) if p not in chosen)
        enough = weights[page] * available >= lift or len(chosen) < FEWEST
        if weights[page] > 0 and (mass == 1 or others > 1 - mass) and enough:
            chosen.add(page)
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    count=st.integers(1, 40),
    hidden=st.floats(0, 1),
    share=st.sampled_from([1 / 64, 1 / 8, 0.3, 1.0]),
    mass=st.sampled_from([0.5, 0.9, 1.0]),
    lift=st.sampled_from([0.0, 0.5, 3.0]),
    near=st.booleans(),
)
def test_the_selected_pages_are_those_of_a_plain_loop(
    seed: int, count: int, hidden: float, share: float, mass: float, lift: float, near: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 1, count, generator=generator)
    logits[0, :, :, torch.rand(count, generator=generator) < hidden] = -math.inf
    index = index_of(torch.zeros(2, 3, count * TOKENS, 8), share=share, mass=mass, lift=lift)
    others = torch.randn(2, 6, 1, generator=generator) + 3 if near else None
    weights = page_selection.expected_weights(logits, 3, others)
    kept, counts = page_selection.select_pages(logits, index.rule, count, others)
    assert counts.tolist() == [6, 0, int(kept.sum()), 6 * count]
    lists = page_selection.page_lists(kept.squeeze(2), index.most)
    for b in range(2):
        for u in range(3):
            wanted = sorted(naive_choice(weights[b, u, 0].tolist(), share, mass, lift, count))
            assert kept[b, u, 0].nonzero().flatten().tolist() == wanted
            assert lists[b, u].tolist() == wanted + [-1] * (index.most - len(wanted))


def test_shares_are_of_all_weight_including_full_precision_tokens() -> None:
    logits, near = torch.randn(2, 4, 3, 9), torch.randn(2, 4, 3)
    both = torch.cat([logits, near.unsqueeze(-1)], -1).softmax(-1)
    torch.testing.assert_close(page_selection.expected_weights(logits, 4, near), both[..., :-1])
    torch.testing.assert_close(page_selection.expected_weights(logits, 4), logits.softmax(-1))
    nothing = torch.full_like(logits, -math.inf)
    assert page_selection.expected_weights(nothing, 2).eq(0).all()
    assert page_selection.expected_weights(nothing, 2, near).eq(0).all()


def test_units_select_by_the_weight_that_all_their_heads_expect() -> None:
    logits = torch.tensor([[8.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 8.0, 0.0], [0.0, 8.0, 0.0]]).view(1, 4, 1, 3)
    weights = page_selection.expected_weights(logits, 2)
    assert weights.shape == (1, 2, 1, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 1))
    torch.testing.assert_close(weights[0, 0, 0], (logits[0, 0, 0].softmax(-1) + logits[0, 1, 0].softmax(-1)) / 2)


@pytest.mark.parametrize("additive", [False, True])
def test_masked_tokens_and_those_beyond_the_length_have_no_weight(additive: bool) -> None:
    index, query = index_of(torch.randn(2, 2, 12 * TOKENS, 8)), torch.randn(2, 4, 1, 8)
    far = torch.ones(2, 1, 1, 12 * TOKENS, dtype=torch.bool)
    far[0, ..., : 6 * TOKENS - 1] = False
    given = masks.additive(far, torch.float32) if additive else far
    logits = attention_paged.token_logits(query, index, given, torch.tensor(11 * TOKENS + 1), scale=0.3)
    seen = far & (torch.arange(12 * TOKENS) <= 11 * TOKENS)
    assert torch.equal(logits > -math.inf, seen.expand_as(logits))
    free = attention_paged.token_logits(query, index, None, None, scale=0.3)
    assert torch.equal(logits.masked_fill(~seen, 0), free.masked_fill(~seen, 0))
    kept, _ = page_selection.select_pages(page_selection.page_logits(logits, TOKENS), index.rule, 12)
    assert not kept[0, ..., :5].any() and kept[0, ..., 5:].any()


# --------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("masked", [None, "bool", "additive"])
@pytest.mark.parametrize("length", [None, 300])
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
def test_the_mean_is_of_values_visible_to_a_query(
    tiers: tuple[BitGroup, ...], length: int | None, masked: str | None
) -> None:
    """Compare with a plain loop: B=2, H=4, two latent heads of values [R=16], 3 queries."""
    shape = algebra.BitGroups([t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers])
    latents = torch.randn(2, 2, 500, 16) + 1
    rows, scale = packing.pack_reference(latents, *shape) if tiers else (latents, None)
    held = packing.unpack_reference(rows, scale, *shape) if scale is not None else latents
    seen = torch.rand(2, 1, 3, 500) > 0.5
    far = None if masked is None else seen if masked == "bool" else masks.additive(seen, torch.float32)
    lengths = None if length is None else torch.tensor(length)
    side = SideRows(shape, rows, scale, torch.zeros(0))
    mean = mean_values(torch.randn(2, 4, 3, 16), side, side, far, lengths, TOKENS)
    count = -(-(length or 500) // TOKENS)
    listed = [i * count // SAMPLE for i in range(SAMPLE)]
    assert len(set(listed)) == SAMPLE and max(listed) < count
    places = [t for p in listed for t in range(TOKENS * p, TOKENS * p + TOKENS) if t < (length or 500)]
    mean = mean.repeat_interleave(4 // mean.shape[1], 1)
    for b, h, s in itertools.product(range(2), range(4), range(mean.shape[2])):
        used = [t for t in places if masked is None or seen[b, 0, s, t]]
        wanted = torch.stack([held[b, h // 2, t] for t in used]).mean(0)
        torch.testing.assert_close(mean[b, h, s], wanted, rtol=1e-4, atol=1e-4)


def test_a_mean_takes_its_share_of_the_odds_like_a_part_of_attention() -> None:
    """Equal to merging attention with the mean, weighted by the log of its weight; no change if no page was read."""
    output, lse, mean = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3), torch.randn(2, 4, 1, 8)
    odds, fill = 3 * torch.randn(2, 4, 3), torch.tensor([0.25, 0.5, 1.0, 0.0])
    lse[0, 0, 0] = odds[0, 0, 0] = -math.inf
    found = page_selection.fill_with_mean(output, lse, mean, odds, fill.log())
    weight = odds.exp() * fill[:, None]
    wanted = (output + weight[..., None] * mean) / (1 + weight[..., None])
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], lse + torch.log1p(weight))
    assert torch.equal(found[0][:, 3], output[:, 3]) and torch.equal(found[1][:, 3], lse[:, 3])
    assert float(found[1][0, 0, 0]) == -math.inf and torch.equal(found[0][0, 0, 0], output[0, 0, 0])


def test_each_process_fills_pages_for_its_own_heads() -> None:
    given = PagePlan(4, (0.5, 0.5), (1.0, 1.0), fill=((0.1, 0.2, 0.3, 0.4), (0.5, 0.6)))
    found = _local_pages(given, (Share(1, 2), None))
    assert found is not None and found.fill == ((0.3, 0.4), (0.5, 0.6)) and replace(found, fill=given.fill) == given
    assert _local_pages(None, ()) is None


def test_attention_to_equal_values_gives_that_value() -> None:
    """For any selection, weights add up to one: of pages, of the mean for the others, of full-precision tokens."""
    plan = paged(random_plan("head", window_bits=16), fill=True)
    layer = LatentLayer(plan, plan.sites[0])
    value = layer.site.value.decode.float() @ torch.randn(2, 16, 1)  # [G, E, 1], representable by latents
    layer.update(torch.randn(1, 2, 200, 16), value.mT.expand(1, 2, 200, 8))
    side = SideRows(algebra.bit_groups(None), torch.randn(1, 2, 160, 16), None, layer.site.key.decode.float())
    same = replace(side, rows=torch.randn(1, 2, 1, 16).expand(1, 2, 160, 16), decode=layer.site.value.decode.float())
    index = layer._index(160)
    assert index is not None and index.fill is not None and index.most < index.count
    value = same.reconstruct()[:, :, :10]
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 10, 16)
    found = attend(query, key, value, CacheView(side, same, 2, 160, index), None, scale=0.3)
    torch.testing.assert_close(found, value[:, :, :1].repeat_interleave(2, 1), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the guarantee


def test_the_bound_is_never_below_the_omitted_weight() -> None:
    latents, query = torch.randn(1, 2, 40 * TOKENS, 8), 2 * torch.randn(1, 4, 1, 8)
    index = index_of(latents, limit=0.5)
    logits = attention.grouped_scores(query, latents).flatten(0, 2)  # [H, T]
    expected, most = (
        page_selection.page_logits(
            attention_paged.token_logits(query, index, None, None, scale=1.0, at_most=which), TOKENS
        )
        for which in (False, True)
    )
    kept, _ = page_selection.select_pages(expected, index.rule, 40)
    seen = attention_paged.page_mask(kept, TOKENS, 4, 40 * TOKENS).flatten(0, 2)
    lse = logits.masked_fill(~seen, -math.inf).logsumexp(-1).view(1, 4, 1)
    true = (logits.softmax(-1) * ~seen).sum(-1)
    assert bool((attention_paged.left_out_bound(most, kept, lse).flatten() >= true).all()) and bool((true > 0).all())
    assert attention_paged.left_out_bound(most, torch.ones_like(kept), lse).eq(0).all()


# --------------------------------------------------------------------------------------------------- the kernel


def test_a_list_without_room_attends_to_nothing() -> None:
    step = page_step({4: 16}, 200, False, None, most=0, fill=torch.zeros(12), values=torch.randn(2, 4, 1, 16))
    expected = paged_attention.attend_pages_reference(step._replace(query=step.query.double()))
    with kernels(True), page_kernel():
        assert dispatch.dispatch_attend_pages(step) is None
        found = torch.ops.fhopt.attend_pages(*step)
    assert bool((expected[1] == -math.inf).all()) and not expected[2][2]
    same(found, expected)
