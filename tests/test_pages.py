"""Pages: sketches against plain ones, choices against plain loops, lists against masks, caches that agree."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import CODED, SITE, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Fitted, tiny_gpt2, token_ids
from torch import Tensor

import fhopt
from fhopt import ops, page_ops, pages
from fhopt.applying import latent_cache
from fhopt.cache import LatentCache
from fhopt.codegen import dispatch
from fhopt.codegen.compiler import load
from fhopt.codegen.cpu import pages as cpu_pages
from fhopt.codegen.cpu.pages import weigh_pages
from fhopt.errors import FhoptError
from fhopt.evaluate import new_cache, read_steps, score, switched
from fhopt.fitting import STEPS
from fhopt.latents import Latents, SideRows, attend, mean_values
from fhopt.layers import LatentLayer, StaticLatentLayer
from fhopt.page_ops import FEWEST
from fhopt.pages import SAMPLE, PageIndex, Sketcher
from fhopt.seeing import drawing
from fhopt.sharding import Share, _local_pages
from fhopt.spec import LatentPlan, PagePlan, SidePlan, SketchPlan, Tier

TOKENS = 4  # of a page
LONG = 150  # tokens of a sequence with enough pages


def sketch(key: SidePlan, seed: int = 0, bits: tuple[int, ...] = (4,)) -> SketchPlan:
    """Of half of the channels, in no order, of latents of about unit deviation; 8 in each tier."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 * len(bits)
    channels = torch.rand(key.groups, key.width, generator=generator).argsort(-1)[:, :width]
    mean = torch.randn(key.groups, key.width, generator=generator) / 4
    deviation = torch.rand(key.groups, key.width, generator=generator) + 0.5
    return SketchPlan(channels, mean, deviation, tuple(Tier(b, 8, STEPS[b]) for b in bits))


def paged(
    plan: LatentPlan, share: float = 0.25, mass: float = 1.0, limit: float = 1.0, least: int = 16, fill: bool = False,
    lift: float = 0.0,
) -> LatentPlan:  # fmt: skip
    """The plan with the same pages at every site; fill: a quarter of their weight for the first head, to all of it."""
    count, heads = len(plan.sites), plan.sites[0].site.heads
    sites = tuple(replace(site, sketch=sketch(site.key)) for site in plan.sites)
    parts = (tuple(torch.linspace(0.25, 1, heads).tolist()),) * count if fill else ()
    lifts = (lift,) * count if lift else ()
    return replace(
        plan, sites=sites, pages=PagePlan(TOKENS, (share,) * count, (mass,) * count, least, limit, parts, lifts)
    )


def index_of(latents: Tensor, share: float = 0.25, limit: float = 1.0, **changes: Any) -> PageIndex:
    """An index over latents [B,J,T,R], as many units as latent heads."""
    key = SidePlan(torch.zeros(latents.shape[1], latents.shape[3], 1), torch.zeros(1, 1, 1), ())
    sketcher = Sketcher.on(sketch(key), latents.device)
    coded = sketcher.codes(latents)
    options: dict[str, Any] = dict(tokens=TOKENS, mass=1.0, lift=0.0, least=4, units=latents.shape[1], each_query=False)
    rows = *coded, sketcher.lost(latents, *coded) if limit < 1 else None
    counters = torch.zeros(4, dtype=torch.int64)
    return PageIndex(sketcher, rows, share=share, limit=limit, counters=counters, **(options | changes))


# --------------------------------------------------------------------------------------------------- sketches


def naive_sketch(latent: Tensor, plan: SketchPlan, head: int) -> Tensor:
    """What the sketch of one token's latent [R] in one latent head stands for."""
    out = plan.mean[head].clone()
    tiers = [tier for tier in plan.tiers for _ in range(tier.width)]
    units = {}
    for channel, tier in zip(plan.channels[head].tolist(), tiers, strict=True):
        units[channel] = (latent[channel] - plan.mean[head, channel]) / plan.deviation[head, channel], tier
    scale = max(abs(float(unit)) / tier.step / 2 ** (tier.bits - 1) for unit, tier in units.values())
    scale = float(torch.tensor(scale * (1 + 2.0**-11)).half())
    for channel, (unit, tier) in units.items():
        code = math.floor(float(unit / scale / tier.step)) + 2 ** (tier.bits - 1)
        assert 0 <= code < 2**tier.bits  # nothing is cut off
        out[channel] += (code - (2**tier.bits - 1) / 2) * tier.step * scale * plan.deviation[head, channel]
    return out


@pytest.mark.parametrize("bits", [(2,), (4,), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_sketches_are_those_of_the_latents_they_stand_for(dtype: torch.dtype, bits: tuple[int, ...]) -> None:
    latents, query = torch.randn(2, 3, 5, 16), torch.randn(2, 6, 2, 16, dtype=dtype)
    plan = sketch(SidePlan(torch.zeros(3, 16, 1), torch.zeros(3, 1, 16), ()), bits=bits)
    sketcher = Sketcher.on(plan, latents.device)
    found = sketcher.logits(query, *sketcher.codes(latents))
    for b in range(2):
        for h in range(6):
            stands = torch.stack([naive_sketch(latents[b, h // 2, t], plan, h // 2) for t in range(5)])
            wanted = query[b, h].double() @ stands.double().mT
            torch.testing.assert_close(found[b, h].double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    size=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    scale=st.sampled_from([-0.3, 1.0]),
    softcap=st.sampled_from([0.0, 5.0]),
)
def test_no_logit_is_larger_than_what_its_sketch_allows(seed: int, size: float, scale: float, softcap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = size * torch.randn(2, 2, 12, 16, generator=generator)
    query, index = torch.randn(2, 4, 3, 16, generator=generator), index_of(latents, limit=0.5)
    logits = ops.grouped_scores(query, latents) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    most = pages.token_logits(query, index, None, None, scale=scale, softcap=softcap, at_most=True)
    assert bool((logits <= most + 1e-4 * (1 + size)).all())  # float32


def test_the_weight_of_a_page_is_that_of_its_tokens() -> None:
    logits = torch.randn(2, 3, 1, 10)
    found = ops.page_logits(logits, 4)
    for p, tokens in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
        torch.testing.assert_close(found[..., p], logits[..., tokens].exp().sum(-1).log())


# --------------------------------------------------------------------------------------------------- the choice


def naive_choice(weights: list[float], share: float, mass: float, lift: float, available: int) -> set[int]:
    """Pages of one query of one unit, best first. What is read in any case has the rest of the weight, to 1."""
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
def test_the_pages_that_are_kept_are_those_of_a_plain_loop(
    seed: int, count: int, hidden: float, share: float, mass: float, lift: float, near: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 1, count, generator=generator)
    logits[0, :, :, torch.rand(count, generator=generator) < hidden] = -math.inf
    index = index_of(torch.zeros(2, 3, count * TOKENS, 8), share=share, mass=mass, lift=lift)
    others = torch.randn(2, 6, 1, generator=generator) + 3 if near else None
    weights = page_ops.expected_weights(logits, 3, others)
    kept = pages.keep_best(weights, index, count)
    assert index.counters.tolist() == [6, 0, int(kept.sum()), 6 * count]
    lists = page_ops.page_lists(kept.squeeze(2), index.most)
    for b in range(2):
        for u in range(3):
            wanted = sorted(naive_choice(weights[b, u, 0].tolist(), share, mass, lift, count))
            assert kept[b, u, 0].nonzero().flatten().tolist() == wanted
            assert lists[b, u].tolist() == wanted + [-1] * (index.most - len(wanted))


def test_shares_are_of_all_weight_that_of_open_tokens_included() -> None:
    logits, near = torch.randn(2, 4, 3, 9), torch.randn(2, 4, 3)
    both = torch.cat([logits, near.unsqueeze(-1)], -1).softmax(-1)
    torch.testing.assert_close(page_ops.expected_weights(logits, 4, near), both[..., :-1])
    torch.testing.assert_close(page_ops.expected_weights(logits, 4), logits.softmax(-1))
    nothing = torch.full_like(logits, -math.inf)
    assert page_ops.expected_weights(nothing, 2).eq(0).all()
    assert page_ops.expected_weights(nothing, 2, near).eq(0).all()


def test_units_choose_by_the_weight_that_all_their_heads_expect() -> None:
    logits = torch.tensor([[8.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 8.0, 0.0], [0.0, 8.0, 0.0]]).view(1, 4, 1, 3)
    weights = page_ops.expected_weights(logits, 2)
    assert weights.shape == (1, 2, 1, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 1))
    torch.testing.assert_close(weights[0, 0, 0], (logits[0, 0, 0].softmax(-1) + logits[0, 1, 0].softmax(-1)) / 2)


@pytest.mark.parametrize("additive", [False, True])
def test_masked_tokens_and_those_beyond_the_length_have_no_weight(additive: bool) -> None:
    index, query = index_of(torch.randn(2, 2, 12 * TOKENS, 8)), torch.randn(2, 4, 1, 8)
    far = torch.ones(2, 1, 1, 12 * TOKENS, dtype=torch.bool)
    far[0, ..., : 6 * TOKENS - 1] = False
    given = ops.additive(far, torch.float32) if additive else far
    logits = pages.token_logits(query, index, given, torch.tensor(11 * TOKENS + 1), scale=0.3)
    seen = far & (torch.arange(12 * TOKENS) <= 11 * TOKENS)
    assert torch.equal(logits > -math.inf, seen.expand_as(logits))
    free = pages.token_logits(query, index, None, None, scale=0.3)
    assert torch.equal(logits.masked_fill(~seen, 0), free.masked_fill(~seen, 0))
    kept = pages.keep_best(page_ops.expected_weights(ops.page_logits(logits, TOKENS), 2), index, 12)
    assert not kept[0, ..., :5].any() and kept[0, ..., 5:].any()


# --------------------------------------------------------------------------------------------------- the operation


def operands(tiers: tuple[Tier, ...], tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `fhopt::latent_attention`: B=2, H=8, J=4 for keys and 2 for values, R=16."""
    query, keys, values = torch.randn(2, 8, 1, 16), torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)
    shape = [t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers]
    options = ops.tier_options(shape, shape) | {"scale": 0.3}
    if not tiers:
        return (query, keys, None, values, None), options
    return (query, *ops.pack_reference(keys, *shape), *ops.pack_reference(values, *shape)), options


def naive_mask(lists: Tensor, page_tokens: int, heads: int, tokens: int) -> Tensor:
    seen = torch.zeros(lists.shape[0], heads, 1, tokens, dtype=torch.bool)
    for b in range(lists.shape[0]):
        for h in range(heads):
            for page in lists[b, h * lists.shape[1] // heads].tolist():
                if page >= 0:
                    seen[b, h, 0, page * page_tokens : (page + 1) * page_tokens] = True
    return seen


@contextmanager
def kernels(generated: bool) -> Iterator[None]:
    before = ops.use_kernel("cpu", dispatch.latent_attention if generated else None)
    try:
        yield
    finally:
        ops.use_kernel("cpu", before)


@pytest.mark.parametrize("generated", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
@pytest.mark.parametrize("units", [1, 2])
def test_a_list_of_pages_is_a_mask_of_their_tokens(units: int, tiers: tuple[Tier, ...], generated: bool) -> None:
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
def test_a_list_of_all_pages_changes_no_bit(tiers: tuple[Tier, ...], generated: bool) -> None:
    x, options = operands(tiers, 160)
    lists = torch.arange(10, dtype=torch.int32).expand(2, 2, 10)
    with kernels(generated):
        dense = torch.ops.fhopt.latent_attention(*x, None, **options)
        found = torch.ops.fhopt.latent_attention(*x, None, **options, pages=lists, page_tokens=16)
    assert torch.equal(found[0], dense[0]) and torch.equal(found[1], dense[1])


def test_lists_that_heads_cannot_share_out_are_refused() -> None:
    x, options = operands((), 58)
    for lists, tokens in ((torch.zeros(2, 3, 1, dtype=torch.int32), 16), (torch.zeros(2, 2, 1, dtype=torch.int32), 0)):
        with kernels(False), pytest.raises(ValueError, match="U a divisor of the heads, and pages of at least one"):
            torch.ops.fhopt.latent_attention(*x, None, **options, pages=lists, page_tokens=tokens)


# --------------------------------------------------------------------------------------------------- caches


def decoded(model: Any, plan: LatentPlan, ids: Tensor, start: int, **options: Any) -> Tensor:
    """Logits of tokens from `start` on, fed one by one behind a prompt."""
    with torch.no_grad(), switched(model, plan):
        cache = latent_cache(model, **options)
        model(ids[:, :start], past_key_values=cache)
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def double(llama: Fitted) -> Any:
    """In float64, so that every way rounds every latent to the same code."""
    return copy.deepcopy(llama.model).double()


def test_a_step_reads_some_pages_and_chooses_them_anew_in_the_same_way(
    llama: Fitted, double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens decoded again choose the same pages, some of all, and what they read is another than all."""
    plan, ids, seen = paged(llama.plan(4)), token_ids(2, LONG), []
    found, page_lists = decoded(double, plan, ids, 120), page_ops.page_lists

    def watch(chosen: Tensor, length: int) -> Tensor:
        lists = page_lists(chosen, length)
        seen.append(lists)
        return lists

    with monkeypatch.context() as patch:
        patch.setattr(page_ops, "page_lists", watch)
        again = decoded(double, plan, ids, 120)
    assert torch.equal(found, again) and len(seen) == 2 * (LONG - 120)
    assert all(0 < int((lists >= 0).sum(-1).max()) < 32 for lists in seen)
    dense = decoded(double, llama.plan(4), ids, 120)
    assert float((found - dense).abs().max()) > 1e-6


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_evaluation_in_steps_sees_what_single_tokens_see(llama: Fitted, double: Any, fill: bool) -> None:
    plan, ids = paged(llama.plan(4, window_bits=16), fill=fill), token_ids(1, LONG)
    with torch.no_grad(), switched(double, plan):
        steps = torch.cat([x for _, (x,) in read_steps(double, ids, [new_cache(double, plan)], plan, 20)], 1)
    torch.testing.assert_close(steps, decoded(double, plan, ids, 20), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), switched(double, plan):
        other = new_cache(double, plan, each_query=False)
        dense = torch.cat([x for _, (x,) in read_steps(double, ids, [other], plan, 20)], 1)
    assert float((dense - steps).abs().max()) > 1e-4


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_a_static_cache_chooses_what_a_growing_one_chooses(llama: Fitted, double: Any, fill: bool) -> None:
    plan, ids = paged(llama.plan(4, window_bits=16), fill=fill), token_ids(2, LONG)
    growing = decoded(double, plan, ids, 120)
    static = decoded(double, plan, ids, 120, max_cache_len=LONG + 40)
    torch.testing.assert_close(static, growing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_sketches_do_not_depend_on_how_tokens_came(llama: Fitted, limit: float) -> None:
    plan = paged(llama.plan(4, window_bits=16), limit=limit)
    site, tokens = plan.sites[0], (torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16))
    growing, whole, single = (
        LatentLayer(plan, site),
        StaticLatentLayer(plan, site, 100),
        StaticLatentLayer(plan, site, 100),
    )
    growing.update(*tokens)
    whole.update(*tokens)
    for cut in range(0, 90, 3):
        single.update(*[x[:, :, cut : cut + 3] for x in tokens])
    assert growing.sketches is not None and whole.sketches is not None and single.sketches is not None
    assert growing.sealed == int(whole.sealed) > 40
    held = [store.read(growing.sealed) for store in (growing.sketches, whole.sketches, single.sketches)]
    assert all((x[2] is None) == (limit == 1) for x in held)
    for other in held[1:]:
        for a, b in zip(held[0], other, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_sketches_stay_right_through_crops_beams_and_selection(llama: Fitted, kind: str) -> None:
    plan = paged(llama.plan(4, window_bits=16))
    site = plan.sites[0]
    layer = LatentLayer(plan, site) if kind == "growing" else StaticLatentLayer(plan, site, 120)

    def check() -> None:
        assert layer.sketches is not None
        sealed = layer.sealed_rows
        wanted = layer.sketches.sketcher.codes(layer.key_rows.latents(0, sealed))
        codes, scales, _ = layer.sketches.read(sealed)
        assert torch.equal(codes, wanted[0]) and torch.equal(scales, wanted[1])

    def grow(count: int) -> None:
        batch = layer.batch_size if layer.is_initialized else 2
        layer.update(torch.randn(batch, 2, count, 16), torch.randn(batch, 2, count, 16))
        check()

    grow(100)
    layer.crop(-45)
    check()
    grow(30)
    layer.reorder_cache(torch.tensor([1, 0]))
    check()
    layer.batch_repeat_interleave(2)
    check()
    layer.batch_select_indices(torch.tensor([3, 0]))
    check()
    grow(20)
    layer.reset()
    grow(60)


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_padding_on_the_left_is_never_read(llama: Fitted, double: Any, fill: bool) -> None:
    plan, ids = paged(llama.plan(4, window_bits=16), fill=fill), token_ids(2, LONG)
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(first: Tensor) -> Tensor:
        with torch.no_grad(), switched(double, plan):
            cache = latent_cache(double)
            double(first[:, :140], attention_mask=mask[:, :140], position_ids=positions[:, :140], past_key_values=cache)
            options = dict(attention_mask=mask, position_ids=positions[:, 140:141], past_key_values=cache)
            logits: Tensor = double(first[:, 140:141], **(options | {"attention_mask": mask[:, :141]})).logits
        return logits

    other = ids.clone()
    other[0, :70] = token_ids(1, 70)
    torch.testing.assert_close(run(other), run(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_cache_len", [None, 200])
def test_a_saved_cache_goes_on_where_it_was(llama: Fitted, max_cache_len: int | None, tmp_path: Path) -> None:
    plan, ids = paged(llama.plan(4), fill=True), token_ids(1, LONG)
    options = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
    with torch.no_grad(), switched(llama.model, plan):
        cache = latent_cache(llama.model, **options)
        llama.model(ids[:, :140], past_key_values=cache)
        fhopt.save_cache(llama.model, cache, tmp_path / "cache")
        loaded = fhopt.load_cache(llama.model, tmp_path / "cache")
        a, b = (llama.model(ids[:, 140:141], past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(a, b)


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
@pytest.mark.parametrize("layout", ["head", "input"])
def test_pages_of_either_layout_are_counted_to_the_byte(
    layout: str, fill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhopt.layers.SAMPLE", 3)
    plan = paged(random_plan(layout, CODED, window_bits=16), fill=fill)
    cache = LatentCache(plan)
    cache.update(torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 8), 0)
    row = cache.report()[0]
    assert row["bytes"] - row["spare"] == plan.cache_bytes(100, itemsize=4)
    assert row["index"] == plan.sketch_bytes() * row["sealed_tokens"] > 0
    count = row["sealed_tokens"] // TOKENS
    read = row["sealed"] * (page_ops.pages_read(count, 0.25, 4) + (3 if fill else 0)) // count
    assert row["dense_step_bytes"] - row["step_bytes"] == row["sealed"] - read - row["index"]


@pytest.mark.parametrize("max_cache_len", [None, 200])
def test_bytes_of_a_step_are_those_of_the_pages_that_queries_chose(llama: Fitted, max_cache_len: int | None) -> None:
    """With a lift that most pages do not reach."""
    plan, ids = paged(llama.plan(4), share=0.5, lift=2.0), token_ids(2, LONG)
    listed = []
    chosen = page_ops.choose_pages

    def watch(step: page_ops.PageStep) -> Any:
        found = chosen(step)
        listed.append(found[0])
        return found

    with torch.no_grad(), switched(llama.model, plan), pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_ops, "choose_pages", watch)
        cache = LatentCache(plan, llama.model.config, max_cache_len=max_cache_len)
        llama.model(ids[:, :140], past_key_values=cache)
        assert not listed
        held = cache.report()
        for i in range(140, LONG):
            llama.model(ids[:, i : i + 1], past_key_values=cache)
    count = [layer.lists.tolist() for layer in cache.layers if isinstance(layer, (LatentLayer, StaticLatentLayer))]
    assert len(listed) == 2 * (LONG - 140)
    assert sum(c[2] for c in count) == sum(int((lists >= 0).sum()) for lists in listed)
    assert sum(c[0] for c in count) == sum(lists.shape[:2].numel() for lists in listed)
    assert all(FEWEST * c[0] <= c[2] < 0.5 * c[3] for c in count)
    for before, row, (_, _, read, there) in zip(held, cache.report(), count, strict=True):
        assert (
            row["dense_step_bytes"] - row["step_bytes"]
            == row["sealed"] - int(row["sealed"] * read / there) - row["index"]
        )
        assert before["step_bytes"] < before["dense_step_bytes"]


def test_the_mean_of_values_follows_what_happens_to_a_cache(llama: Fitted) -> None:
    """Sealed blocks, other sequences, fewer tokens, a copy: the same steps as with a mean that is never kept."""
    plan, ids = paged(llama.plan(4), share=0.25, fill=True), token_ids(3, 180)

    def steps(cache: Any) -> list[Tensor]:
        def step(a: int, b: int) -> Tensor:
            return llama.model(ids[:, a:b], past_key_values=cache).logits

        out = [step(0, 120), *[step(i, i + 1) for i in range(120, 150)]]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        out += [step(150, 151), step(151, 152)]
        copied = copy.deepcopy(cache)
        cache.crop(-40)
        out += [step(i, i + 1) for i in range(112, 140)]
        return [*out, llama.model(ids[:, 152:153], past_key_values=copied).logits]

    def never_kept(self: Any, index: Any, key: Any, value: Any) -> Any:
        return index

    with torch.no_grad(), switched(llama.model, plan):
        found = steps(LatentCache(plan, llama.model.config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LatentLayer, "_with_mean", never_kept)
            expected = steps(LatentCache(plan, llama.model.config))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_one_latent_for_keys_and_values_is_paged_too(gpt2: Fitted) -> None:
    plan = gpt2.plan(2, "input")
    assert all(site.is_shared for site in plan.sites)
    ids, model = token_ids(1, LONG), copy.deepcopy(tiny_gpt2()).double()
    model.load_state_dict(gpt2.model.state_dict())
    found, dense = (decoded(model, p, ids, 130) for p in (paged(plan), plan))
    assert bool(found.isfinite().all()) and float((found - dense).abs().max()) > 1e-6


def test_all_pages_are_dense_attention_to_the_bit(llama: Fitted) -> None:
    plan, ids = llama.plan(4), token_ids(1, LONG)
    whole = paged(plan, share=1.0)
    with kernels(True):
        assert torch.equal(decoded(llama.model, whole, ids, 140), decoded(llama.model, plan, ids, 140))
    few = ids[:, :36]  # no more pages than are read at least
    with kernels(True):
        assert torch.equal(decoded(llama.model, paged(plan), few, 30), decoded(llama.model, plan, few, 30))
    cache = LatentCache(whole)
    assert all(layer.sketches is None for layer in cache.layers)


# --------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("masked", [None, "bool", "additive"])
@pytest.mark.parametrize("length", [None, 300])
@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
def test_the_mean_is_that_of_values_which_a_query_may_see(
    tiers: tuple[Tier, ...], length: int | None, masked: str | None
) -> None:
    """Against a plain loop: B=2, H=4, two latent heads of values [R=16], 3 queries."""
    shape = [t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers]
    latents = torch.randn(2, 2, 500, 16) + 1
    rows, scale = ops.pack_reference(latents, *shape) if tiers else (latents, None)
    held = ops.unpack_reference(rows, scale, *shape) if scale is not None else latents
    seen = torch.rand(2, 1, 3, 500) > 0.5
    far = None if masked is None else seen if masked == "bool" else ops.additive(seen, torch.float32)
    lengths = None if length is None else torch.tensor(length)
    options: Any = ops.tier_options(shape, shape)
    mean = mean_values(torch.randn(2, 4, 3, 16), rows, scale, rows, scale, far, lengths, TOKENS, **options)
    count = -(-(length or 500) // TOKENS)
    listed = [i * count // SAMPLE for i in range(SAMPLE)]
    assert len(set(listed)) == SAMPLE and max(listed) < count
    places = [t for p in listed for t in range(TOKENS * p, TOKENS * p + TOKENS) if t < (length or 500)]
    mean = mean.repeat_interleave(4 // mean.shape[1], 1)
    for b, h, s in itertools.product(range(2), range(4), range(mean.shape[2])):
        used = [t for t in places if masked is None or seen[b, 0, s, t]]
        wanted = torch.stack([held[b, h // 2, t] for t in used]).mean(0)
        torch.testing.assert_close(mean[b, h, s], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, SAMPLE - 1, SAMPLE, 50])
def test_sampled_pages_differ_and_are_all_where_there_are_few(count: int) -> None:
    lists = pages.sampled(count, torch.device("cpu"))
    assert lists.dtype == torch.int32 and len(lists) == SAMPLE
    chosen = [p for p in lists.tolist() if p >= 0]
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, SAMPLE) and max(chosen) < count
    assert torch.equal(pages.sampled(torch.tensor([3, count]), lists.device)[1], lists)


def test_a_mean_takes_its_part_of_the_odds_as_a_part_of_attention_would() -> None:
    """The same as merging what was read with the mean, by the log of its weight; nothing read: nothing changes."""
    output, lse, mean = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3), torch.randn(2, 4, 1, 8)
    odds, fill = 3 * torch.randn(2, 4, 3), torch.tensor([0.25, 0.5, 1.0, 0.0])
    lse[0, 0, 0] = odds[0, 0, 0] = -math.inf
    found = page_ops.stand_in(output, lse, mean, odds, fill.log())
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


def test_attention_to_values_that_are_all_the_same_gives_that_value() -> None:
    """Whatever was read, weights add up to one: of pages, of what stands for the others, of open tokens."""
    plan = paged(random_plan("head", window_bits=16), fill=True)
    layer = LatentLayer(plan, plan.sites[0])
    value = layer.site.value.decode.float() @ torch.randn(2, 16, 1)  # [G, E, 1], one that latents can hold
    layer.update(torch.randn(1, 2, 200, 16), value.mT.expand(1, 2, 200, 8))
    side = SideRows(([], [], []), torch.randn(1, 2, 160, 16), None, layer.site.key.decode.float())
    same = replace(side, rows=torch.randn(1, 2, 1, 16).expand(1, 2, 160, 16), decode=layer.site.value.decode.float())
    index = layer._index(160)
    assert index is not None and index.fill is not None and index.most < index.count
    value = same.rebuild()[:, :, :10]
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 10, 16)
    found = attend(query, key, value, Latents(side, same, 2, 160, index), None, scale=0.3)
    torch.testing.assert_close(found, value[:, :, :1].repeat_interleave(2, 1), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the guarantee


def test_the_bound_is_never_below_what_is_left_out() -> None:
    latents, query = torch.randn(1, 2, 40 * TOKENS, 8), 2 * torch.randn(1, 4, 1, 8)
    index = index_of(latents, limit=0.5)
    logits = ops.grouped_scores(query, latents).flatten(0, 2)  # [H, T]
    expected, most = (
        ops.page_logits(pages.token_logits(query, index, None, None, scale=1.0, at_most=which), TOKENS)
        for which in (False, True)
    )
    kept = pages.keep_best(page_ops.expected_weights(expected, 2), index, 40)
    seen = pages.page_mask(kept, TOKENS, 4, 40 * TOKENS).flatten(0, 2)
    lse = logits.masked_fill(~seen, -math.inf).logsumexp(-1).view(1, 4, 1)
    true = (logits.softmax(-1) * ~seen).sum(-1)
    assert bool((pages.left_out(most, kept, lse).flatten() >= true).all()) and bool((true > 0).all())
    assert pages.left_out(most, torch.ones_like(kept), lse).eq(0).all()


@pytest.mark.parametrize("each", [False, True], ids=["lists", "masks"])
def test_a_limit_that_nothing_meets_gives_dense_attention(llama: Fitted, double: Any, each: bool) -> None:
    plan, ids = llama.plan(4, window_bits=16), token_ids(2, LONG)
    dense = decoded(double, plan, ids, 120)
    for max_cache_len in (None, 200):
        limited = paged(plan, limit=1e-9)
        with torch.no_grad(), switched(double, limited):
            cache = LatentCache(limited, double.config, each_query=each, max_cache_len=max_cache_len)
            parts = [double(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 120), (120, 121), (121, LONG))]
        torch.testing.assert_close(torch.cat(parts[1:], 1)[:, :1], dense[:, :1], rtol=1e-6, atol=1e-6)
        assert [row["completed"] for row in cache.report()] == [1.0, 1.0]


def test_only_units_beyond_the_limit_read_the_other_pages_and_are_counted() -> None:
    index = index_of(torch.randn(2, 2, 8 * TOKENS, 8), limit=0.25)
    share = torch.tensor([[0.1, 0.2, 0.25, 0.3], [0.0, 0.0, 0.9, 0.9]]).view(2, 4, 1)
    assert pages.to_complete(share, index).flatten().tolist() == [False, True, False, True]
    assert pages.to_complete(torch.zeros(2, 4, 1), index).any().item() is False
    assert index.counters.tolist() == [0, 2, 0, 0]


# --------------------------------------------------------------------------------------------------- plans


def test_a_plan_with_pages_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = paged(random_plan("head", CODED), share=0.125, mass=0.9, limit=0.25)
    filled = paged(random_plan("head", CODED), fill=True, lift=1.5)
    for each in (plan, filled):
        loaded = LatentPlan.load(each.save(tmp_path / "plan"))
        assert loaded.pages == each.pages and loaded.digest() == each.digest()
    loaded = LatentPlan.load(plan.save(tmp_path / "plan"))
    a, b = loaded.sites[0].sketch, plan.sites[0].sketch
    assert a is not None and b is not None and a.tiers == b.tiers
    assert torch.equal(a.channels, b.channels) and torch.equal(a.mean, b.mean)
    assert len({p.digest() for p in (plan, replace(plan, pages=None), random_plan("head", CODED))}) == 3


def test_what_a_site_reads_on_average_is_told_where_calibration_knows() -> None:
    plan = paged(random_plan("head", CODED), share=0.5)
    (site,) = plan.sites
    assert plan.page_read(site) == plan.page_share(site) == 0.5
    told = plan.with_provenance(pages={"read": {site.site.name: 0.125}})
    assert told.page_read(told.sites[0]) == 0.125
    assert "12% of the pages are read, at most 50%" in drawing._window(told.sites[0], told)
    whole = replace(plan, pages=None)
    assert whole.page_read(site) == 1.0 and not any("pages" in line for line in drawing._window(site, whole))


def test_a_plan_without_pages_is_written_as_before(tmp_path: Path) -> None:
    text = (random_plan("head", CODED).save(tmp_path / "plan") / "plan.json").read_text()
    assert '"version": 3' in text and "pages" not in text and "sketch" not in text


@pytest.mark.parametrize(
    ("pages_of_plan", "reason"),
    [
        (PagePlan(3, (0.5,), (1.0,)), "expected a divisor of the plan's block, 8"),
        (PagePlan(0, (0.5,), (1.0,)), "expected a divisor of the plan's block, 8"),
        (PagePlan(4, (0.5, 0.5), (1.0,)), "pages for 2 and 1 sites, the plan has 1"),
        (PagePlan(4, (0.0,), (1.0,)), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.5,)), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.0,), limit=math.nan), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.0,), least=-1), "least from 0 on"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5,),)), r"filled for \[1\] heads"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5, 0.5, -0.5, 0.0),)), "expected numbers from 0 on"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5, 0.5, math.nan, 0.0),)), "expected numbers from 0 on"),
        (PagePlan(4, (0.5,), (1.0,), limit=0.5, fill=((0.5,) * 4,)), "expected one of both"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(1.0, 1.0)), "expected numbers from 0 on for 1 sites"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(-1.0,)), "expected numbers from 0 on for 1 sites"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(math.inf,)), "expected numbers from 0 on for 1 sites"),
        (PagePlan(4, (0.5,), (1.0,)), "no sketches to choose pages by"),
    ],
)
def test_pages_that_cannot_be_are_refused(pages_of_plan: PagePlan, reason: str) -> None:
    with pytest.raises(FhoptError, match=reason):
        replace(random_plan("head"), pages=pages_of_plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"channels": torch.zeros(1, 8, dtype=torch.int64)}, "sketches have shapes"),
        ({"channels": torch.zeros(2, 8)}, "sketches have shapes"),
        ({"channels": torch.full((2, 8), 16)}, "beyond the 16 that there are"),
        ({"mean": torch.full((2, 16), math.inf)}, "no positive numbers"),
        ({"deviation": torch.zeros(2, 16)}, "no positive numbers"),
        ({"tiers": (Tier(3, 8, 1.0),)}, "bits of"),
        ({"tiers": (Tier(2, 8, 0.0),)}, "bits of"),
        ({"tiers": (Tier(2, 8, 1.0), Tier(2, 8, 1.0))}, "sketches have shapes"),
    ],
)
def test_sketches_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    site = random_plan("head").sites[0]
    with pytest.raises(FhoptError, match=reason):
        replace(random_plan("head"), sites=(replace(site, sketch=replace(sketch(site.key), **change)),))


def test_what_reads_an_encoder_cannot_choose() -> None:
    plan = random_plan("head")
    site = replace(plan.sites[0], site=replace(SITE, kind="cross"))
    with pytest.raises(FhoptError, match="expected a share of 1"):
        replace(plan, sites=(site,), pages=PagePlan(4, (0.5,), (1.0,)))
    assert replace(plan, sites=(site,), pages=PagePlan(4, (1.0,), (1.0,))).sketch_bytes() == 0


def test_perplexity_with_pages_is_measured_and_worse_than_with_all(llama: Fitted) -> None:
    ids, found = token_ids(2, 200), {}
    for name, plan in (("all", llama.plan(2)), ("some", paged(llama.plan(2), share=0.05))):
        with switched(llama.model, plan):
            found[name] = score(llama.model, ids, plan).nats
    assert found["some"] != found["all"] and abs(found["some"] - found["all"]) < 0.2


# --------------------------------------------------------------------------------------------------- the kernel


def page_operands(
    tiers: dict[int, int], rows: int, tokens: int, masked: bool, length: int | None, size: int = 32
) -> tuple[tuple[Tensor, Tensor], Any]:
    """(weights, constant) and what follows them in `fhopt::page_weights`: B=2, J=4, pages of `size` tokens."""
    bits, widths, steps = list(tiers), list(tiers.values()), [STEPS[b] for b in tiers]
    planes = [ops.integer_bytes(torch.randn(2, 4, tokens + 7, w), b, STEPS[b]) for b, w in tiers.items()]
    codes = torch.cat(planes, -1)[:, :, :tokens]  # a view, as of a cache with spare room
    scales = torch.rand(2, 4, tokens + 7).add(0.5).to(torch.float16)[:, :, :tokens]
    far = torch.rand(2, 1, 1, tokens) > 0.3 if masked else None
    factors = torch.randn(2, 4, rows, sum(widths)), torch.randn(2, 4, rows)
    return factors, (codes, scales, bits, widths, steps, size, far, None if length is None else torch.tensor(length))


def rounded(weights: Tensor, options: Any) -> Tensor:
    """Weights as the kernel multiplies them: products with the steps of channels in 8 bits."""
    _, _, _, widths, steps, *_ = options
    stretch = torch.cat([torch.full((w,), s) for w, s in zip(widths, steps, strict=True)])
    products = weights * stretch
    unit = products.abs().amax(-1, keepdim=True) / 127
    return (products / unit).round() * unit / stretch


@contextmanager
def page_kernel() -> Iterator[None]:
    before = page_ops.use_page_kernels("cpu", page_ops.PageKernels(weigh_pages, dispatch.attend_pages))
    try:
        yield
    finally:
        page_ops.use_page_kernels("cpu", before)


@pytest.mark.parametrize("tiers", [{4: 16, 2: 16}, {4: 8}, {2: 48}, {4: 24, 2: 32}, {4: 72}], ids=str)
@pytest.mark.parametrize(
    ("tokens", "length", "masked", "size"),
    [
        (100, None, False, 32), (100, None, False, 8), (96, 70, True, 8), (33, 33, False, 24), (16, 5, True, 32),
        (2100, 2051, True, 32), (2100, 2051, True, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_kernel_weighs_pages_as_the_reference_does(
    rows: int, tokens: int, length: int | None, masked: bool, size: int, tiers: dict[int, int]
) -> None:
    (weights, constant), options = page_operands(tiers, rows, tokens, masked, length, size)
    expected = page_ops.page_weights_reference(rounded(weights, options).double(), constant.double(), *options)
    with page_kernel():
        found = torch.ops.fhopt.page_weights(weights, constant, *options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)


def page_step(
    tiers: dict[int, int], tokens: int, masked: bool, length: int | None, size: int = 32, **changes: Any
) -> page_ops.PageStep:
    """B=2, H=12, J=4, R=40, R_V=16, numbers for latents, pages of `size` tokens; queries that the kernel need not
    round."""
    (weights, _), options = page_operands(tiers, 3, tokens, masked, length, size)
    codes, scales, bits, widths, steps, page_tokens, far, lengths = options
    channels = torch.rand(4, 40).argsort(-1)[:, : sum(widths)]
    mean, deviation, query = torch.randn(4, 40) / 4, torch.rand(4, 40) + 0.5, torch.randn(2, 4, 3, 40)
    index = channels[None, :, None].expand_as(weights)
    query.scatter_(-1, index, rounded(weights, options) / deviation[None, :, None].expand_as(query).gather(-1, index))
    given: dict[str, Any] = dict(
        query=query.reshape(2, 12, 1, 40), key=torch.randn(2, 4, tokens, 40), key_scale=None,
        value=torch.randn(2, 4, tokens, 16), value_scale=None, far=far, lengths=lengths,
        **ops.latent_options(None, None), scale=0.25, codes=codes, scales=scales, bits=bits, widths=widths,
        steps=steps, channels=channels, mean=mean, deviation=deviation, near=None, page_tokens=page_tokens, units=4,
        most=max(2, -(-tokens // size) // 4), share=0.2, least=2, mass=1.0, lift=0.0, fill=None, values=None,
    )  # fmt: skip
    return page_ops.PageStep(**given | changes)


def attended(step: page_ops.PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel, which has to serve."""
    with kernels(True), page_kernel(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_ops, "attend_pages_reference", None)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.fhopt.attend_pages(*step)
    return found


@pytest.mark.parametrize(
    ("mass", "lift", "near"), [(1.0, 0.0, False), (0.5, 0.0, True), (1.0, 1.5, True), (0.9, 0.7, False)]
)
@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize(
    ("tokens", "length", "masked", "size"),
    [
        (2100, 1500, True, 32),
        (2100, 1500, True, 8),
        (1024, None, False, 32),
        (1020, None, False, 8),
        (90, 40, True, 24),
    ],
)
def test_the_kernel_reads_the_pages_that_the_reference_chooses(
    tokens: int, length: int | None, masked: bool, size: int, units: int, mass: float, lift: float, near: bool
) -> None:
    step = page_step({4: 16, 2: 16}, tokens, masked, length, size, units=units, mass=mass, lift=lift)
    if near:
        _, constant = page_ops.factors(step.query, step.mean, step.deviation, step.channels)
        step = step._replace(near=(constant * step.scale).reshape(2, 12, 1) + 5 + torch.randn(2, 12, 1))
    filled = step._replace(fill=torch.rand(12).log(), values=torch.randn(2, 2, 1, 16))
    for each in (step, filled):
        expected = page_ops.attend_pages_reference(each._replace(query=each.query.double()))
        found = attended(each)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-3)
        assert found[2].tolist() == expected[2].tolist()
    assert found[2][2] > 0 or mass == 0.5  # what is read in any case may suffice
    if mass == 1 and not masked and not lift:
        assert found[2][2] == 2 * units * page_ops.pages_read(-(-tokens // size), 0.2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx",)], ids=["avx2", "sse"])
def test_other_instruction_sets_read_the_same_pages(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    step = page_step({4: 16, 2: 16}, 1020, True, None, 8, lift=0.7)
    expected = attended(step)
    monkeypatch.setattr(cpu_pages, "load", lambda name, text: load(name, text, flags))
    monkeypatch.setattr(cpu_pages, "_compiled", functools.cache(cpu_pages._compiled.__wrapped__))
    same(attended(step), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_16_bits_read_what_the_same_numbers_read(dtype: torch.dtype) -> None:
    values = torch.randn(2, 4, 1, 16).to(dtype)
    step = page_step({4: 16}, 500, False, None, fill=torch.zeros(12), values=values)
    step = step._replace(query=step.query.to(dtype))
    expected = attended(step._replace(query=step.query.float()))
    found = attended(step)
    assert found[0].dtype == dtype and torch.equal(found[0], expected[0].to(dtype))
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def test_a_sequence_of_which_nothing_may_be_read_has_an_empty_list() -> None:
    step = page_step({4: 16}, 200, True, None, fill=torch.zeros(12), values=torch.randn(2, 4, 1, 16))
    assert step.far is not None
    step.far[1] = False
    lists, odds, _ = page_ops.choose_pages(step)
    assert bool((lists[0] >= 0).all()) and bool((lists[1] == -1).all())
    assert bool(odds[0].isfinite().all()) and bool((odds[1] == -math.inf).all())
    output, lse, counts = attended(step)
    assert bool(lse[0].isfinite().all()) and bool((lse[1] == -math.inf).all()) and bool((output[1] == 0).all())
    assert int(counts[2]) == int((lists >= 0).sum())


def test_the_kernel_leaves_to_others_what_it_does_not_know() -> None:
    weights, constant = torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 1)
    codes, scales = torch.zeros(1, 1, 20, 4, dtype=torch.uint8), torch.ones(1, 1, 20, dtype=torch.float16)

    def found(bits: int, page_tokens: int, mask: Tensor | None = None) -> Any:
        return weigh_pages(weights, constant, codes, scales, (bits,), (8,), (1.0,), page_tokens, mask, 20)

    assert found(4, 4) is None  # pages of 4 tokens
    assert found(4, 2048) is None
    assert found(2, 16) is None  # rows of 2 bytes
    assert found(4, 16, torch.zeros(1, 1, 1, 20)) is None  # an additive mask
    assert found(4, 16) is not None and found(4, 16, torch.ones(1, 1, 1, 20, dtype=torch.bool)) is not None


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=1e-4, atol=1e-3)
    assert found[2].tolist() == expected[2].tolist()


@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
def test_other_layouts_of_operands_are_read_right(tiers: tuple[Tier, ...]) -> None:
    """Values of fewer latent heads, operands that are views, a fill in float64, two threads."""
    step = page_step({4: 16, 2: 16}, 1000, True, None, units=2, fill=torch.rand(12).double().log())
    value, shape = torch.randn(2, 2, 1000, 16), [[getattr(t, x) for t in tiers] for x in ("bits", "width", "step")]
    rows: dict[str, Any] = dict(value=value)
    if tiers:
        codes, scale = ops.pack_reference(value, *shape)
        rows = dict(value=codes, value_scale=scale, value_bits=shape[0], value_widths=shape[1], value_steps=shape[2])

    def strided(x: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
        return out.copy_(x)

    step = step._replace(
        **rows, query=strided(step.query), near=torch.randn(2, 12, 2)[..., ::2],
        values=torch.randn(2, 12, 2, 16)[:, :, :1], mean=strided(step.mean), deviation=strided(step.deviation),
        channels=strided(step.channels),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = attended(step)
    finally:
        torch.set_num_threads(threads)
    same(found, page_ops.attend_pages_reference(step._replace(query=step.query.double())))


def test_a_list_without_room_reads_nothing() -> None:
    step = page_step({4: 16}, 200, False, None, most=0, fill=torch.zeros(12), values=torch.randn(2, 4, 1, 16))
    expected = page_ops.attend_pages_reference(step._replace(query=step.query.double()))
    with kernels(True), page_kernel():
        assert dispatch.attend_pages(step) is None
        found = torch.ops.fhopt.attend_pages(*step)
    assert bool((expected[1] == -math.inf).all()) and not expected[2][2]
    same(found, expected)


REFUSED: dict[str, Callable[[page_ops.PageStep], dict[str, Any]]] = {
    "pages of 20 tokens": lambda s: dict(page_tokens=20),
    "float64": lambda s: dict(query=s.query.double()),
    "a gradient": lambda s: dict(query=s.query.clone().requires_grad_()),
    "one mask for all tokens": lambda s: dict(far=torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    "one mean for all sequences": lambda s: dict(fill=torch.zeros(12), values=torch.randn(1, 4, 1, 16)),
    "channels of 32 bits": lambda s: dict(channels=s.channels.int()),
    "scales of 32 bits": lambda s: dict(scales=s.scales.float()),
    "several queries": lambda s: dict(query=s.query.repeat(1, 1, 2, 1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_step_that_no_kernel_serves_is_left_to_torch(why: str) -> None:
    step = page_step({4: 16}, 200, False, None)
    step = step._replace(**REFUSED[why](step))
    with kernels(True), page_kernel():
        assert dispatch.attend_pages(step) is None
        if why in ("channels of 32 bits", "several queries"):  # torch refuses them, too
            return
        found = torch.ops.fhopt.attend_pages(*step)
    expected = page_ops.attend_pages_reference(step._replace(query=step.query.double()))
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)


def test_units_that_do_not_share_out_heads_are_refused() -> None:
    with kernels(True), page_kernel(), pytest.raises((ValueError, RuntimeError)):
        torch.ops.fhopt.attend_pages(*page_step({4: 16}, 200, False, None, units=3))


def test_gradients_go_through_the_pages_that_are_read() -> None:
    step = page_step({4: 16}, 200, False, None)
    parts = [x.clone().requires_grad_() for x in (step.query, step.key, step.value)]
    query, key, value = parts
    with kernels(True), page_kernel():
        output, lse, _ = torch.ops.fhopt.attend_pages(*step._replace(query=query, key=key, value=value))
    lists, _, _ = page_ops.choose_pages(step)
    seen = naive_mask(lists, 32, 12, 200)
    reference: Any = ops.latent_attention_reference
    expected = reference(query, key, None, value, None, seen, **ops.latent_options(None, None), scale=step.scale)
    wanted = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), parts)
    found = torch.autograd.grad(output.square().sum() + lse.sum(), parts)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "queries"), [("latents", 12), ("window of 8 bits", 12), ("pages", 1), ("pages with a limit", 1)]
)
def test_a_compiled_graph_has_the_gradients_of_an_eager_call(llama: Fitted, kind: str, queries: int) -> None:
    """Of tokens behind a cache: a graph for gradients must not hold operations that have none."""
    plan, ids = llama.plan(4, window_bits=8 if kind == "window of 8 bits" else 16), token_ids(1, LONG)
    if "pages" in kind:
        plan = paged(plan, fill=kind == "pages", limit=0.5 if "limit" in kind else 1.0)
    model, found = copy.deepcopy(llama.model).requires_grad_(True), []
    with switched(model, plan), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*graph break.*|.*recompil.*")
        for call in (model, torch.compile(model, backend="aot_eager")):
            torch._dynamo.reset()
            model.zero_grad()
            cache = latent_cache(model)
            with torch.no_grad():
                model(ids[:, :-queries], past_key_values=cache)
            call(ids[:, -queries:], past_key_values=cache).logits.square().sum().backward()
            found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert len(found[0]) == sum(1 for _ in model.parameters())
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("fixed", [{}, {"max_cache_len": LONG}], ids=["growing", "fixed"])
def test_codes_in_a_cache_keep_no_history(llama: Fitted, fixed: dict[str, int]) -> None:
    plan, ids = paged(llama.plan(4, window_bits=8)), token_ids(1, LONG)
    model = copy.deepcopy(llama.model).requires_grad_(True)
    with switched(model, plan):
        cache = latent_cache(model, **fixed)
        model(ids, past_key_values=cache).logits.square().sum().backward()
    for layer in cache.layers:
        parts = *layer.key_rows.parts, *layer.value_rows.parts, *layer.sketches.parts
        assert parts and not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_a_compiled_step_with_a_static_cache_chooses_as_an_eager_one(llama: Fitted, fill: bool) -> None:
    """One graph for all steps, in float32: where two pages weigh the same, another one may be read."""
    plan, ids = paged(llama.plan(4, window_bits=16), share=0.5, fill=fill), token_ids(1, LONG)
    eager = decoded(llama.model, plan, ids, 140, max_cache_len=200)
    graphs = 0

    def count(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    with torch.no_grad(), switched(llama.model, plan):
        cache = latent_cache(llama.model, max_cache_len=200)
        llama.model(ids[:, :140], past_key_values=cache)
        step: Any = torch.compile(llama.model, backend=count, dynamic=False)
        parts = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, LONG)]
    torch.testing.assert_close(torch.cat(parts, 1), eager, rtol=1e-3, atol=1e-3)
    assert graphs == 1
