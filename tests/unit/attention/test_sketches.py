"""Sketches of keys: their logits, their bounds, and how they are stored."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_plans import index_of, paged, sketch
from small_models import FittedModel, token_ids
from torch import Tensor

from fhopt.attention import paged as attention_paged
from fhopt.attention.paged import SAMPLE
from fhopt.attention.sketches import Sketcher
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.evaluation.perplexity import switched
from fhopt.ops import attention
from fhopt.plan.site_plan import SidePlan, SketchPlan

# --------------------------------------------------------------------------------------------------- sketches


def naive_sketch(latent: Tensor, plan: SketchPlan, head: int) -> Tensor:
    """Return the latent [R] that the sketch of one token represents, for one latent head."""
    out = plan.mean[head].clone()
    tiers = [tier for tier in plan.tiers for _ in range(tier.width)]
    units = {}
    for channel, tier in zip(plan.channels[head].tolist(), tiers, strict=True):
        units[channel] = (latent[channel] - plan.mean[head, channel]) / plan.deviation[head, channel], tier
    scale = max(abs(float(unit)) / tier.step / 2 ** (tier.bits - 1) for unit, tier in units.values())
    scale = float(torch.tensor(scale * (1 + 2.0**-11)).half())
    for channel, (unit, tier) in units.items():
        code = math.floor(float(unit / scale / tier.step)) + 2 ** (tier.bits - 1)
        assert 0 <= code < 2**tier.bits  # no code is clipped
        out[channel] += (code - (2**tier.bits - 1) / 2) * tier.step * scale * plan.deviation[head, channel]
    return out


@pytest.mark.parametrize("bits", [(2,), (4,), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_sketches_equal_those_of_the_latents_they_represent(
    dtype: torch.dtype, bits: tuple[int, ...]
) -> None:
    latents, query = torch.randn(2, 3, 5, 16), torch.randn(2, 6, 2, 16, dtype=dtype)
    plan = sketch(SidePlan(torch.zeros(3, 16, 1), torch.zeros(3, 1, 16), ()), bits=bits)
    sketcher = Sketcher.on(plan, latents.device)
    found = sketcher.logits(query, *sketcher.encode(latents))
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
    logits = attention.grouped_scores(query, latents) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    most = attention_paged.token_logits(query, index, None, None, scale=scale, softcap=softcap, at_most=True)
    assert bool((logits <= most + 1e-4 * (1 + size)).all())  # float32


# --------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_sketches_do_not_depend_on_how_tokens_are_split_into_calls(llama: FittedModel, limit: float) -> None:
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
    assert growing.quantized == int(whole.quantized) > 40
    held = [store.read(growing.quantized) for store in (growing.sketches, whole.sketches, single.sketches)]
    assert all((x[2] is None) == (limit == 1) for x in held)
    for other in held[1:]:
        for a, b in zip(held[0], other, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_sketches_stay_right_through_crops_beams_and_selection(llama: FittedModel, kind: str) -> None:
    plan = paged(llama.plan(4, window_bits=16))
    site = plan.sites[0]
    layer = LatentLayer(plan, site) if kind == "growing" else StaticLatentLayer(plan, site, 120)

    def check() -> None:
        assert layer.sketches is not None
        quantized = layer.quantized_tokens
        wanted = layer.sketches.sketcher.encode(layer.packed_keys.unpack(0, quantized))
        codes, scales, _ = layer.sketches.read(quantized)
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


def test_the_mean_of_values_follows_what_happens_to_a_cache(llama: FittedModel) -> None:
    """Quantized blocks, reordering, crop and copy: the same outputs as when the mean is recomputed at every step."""
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


# --------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("count", [1, SAMPLE - 1, SAMPLE, 50])
def test_sampled_pages_differ_and_are_all_where_there_are_few(count: int) -> None:
    lists = attention_paged.sampled_pages(count, torch.device("cpu"))
    assert lists.dtype == torch.int32 and len(lists) == SAMPLE
    chosen = [p for p in lists.tolist() if p >= 0]
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, SAMPLE) and max(chosen) < count
    assert torch.equal(attention_paged.sampled_pages(torch.tensor([3, count]), lists.device)[1], lists)
