"""Writes and attention of one layer on an engine's blocks, against fhopt's own cache and plain attention."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_blocks import Engine, random_tokens
from hand_plans import CODED, in_segments, random_plan
from needs import needs_compiler
from torch import Tensor

from fhopt import codegen
from fhopt.attention.attend import attend
from fhopt.attention.latent_tensor import LatentTensor
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.ops import algebra, packing
from fhopt.ops.attention import attention_reference
from fhopt.ops.prefill_attention import CPU_QUERIES, attend_on_cpu
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan
from fhopt.serving import layer_cache
from fhopt.serving.batch import means_from
from fhopt.serving.block_sizes import BlockSizes

SIZES = BlockSizes(12, 4, 24)
COUNT = 90
ROUNDING = 2e-5  # float32 sums in another order


def plan_of(layout: str = "head", tiers: Any = CODED, **options: Any) -> LatentPlan:
    """A handmade float32 plan, as plans of models are."""
    plan = random_plan(layout, tiers, **options)

    def single(side: SidePlan) -> SidePlan:
        return SidePlan(side.encode.float(), side.decode.float(), side.tiers)

    sites = tuple(replace(s, key=single(s.key), value=single(s.value)) for s in plan.sites)
    return replace(plan, sites=sites)


def own_cache(plan: LatentPlan, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attend via fhopt's own cache, one token at a time."""
    layer, site, out = LatentLayer(plan, plan.sites[0]), plan.sites[0].site, []
    for query, key, value in zip(*tokens, strict=True):
        keys: Any
        values: Any
        keys, values = layer.update(key[None, :, None], value[None, :, None])
        if isinstance(keys, LatentTensor):
            result = attend(query[None, :, None], keys.exact, values.exact, keys.latents, None, scale=site.scale)
        else:
            result = attention_reference(query[None, :, None], keys, values, None, scale=site.scale)
        out.append(result[0, :, 0])
    return torch.stack(out)


def by_hand(plan: LatentPlan, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attend by the rule of the engine, in plain attention on whole keys and values."""
    query, key, value = tokens
    site, window, start = plan.sites[0], plan.window, means_from(plan)
    as_read = []
    for x, side in ((key, site.key), (value, site.value)):
        near = packing.unround_rows(*packing.round_rows(x), torch.float32) if window.bits == 8 else x
        mean = near[window.sinks : start].mean(0) if start else torch.zeros(x.shape[1:])
        source = torch.cat([near[:start], x[start:]]) - mean
        latent = algebra.encode(source.transpose(0, 1)[None], side.encode)
        groups = algebra.bit_groups(side)
        if groups.bits:
            codes, scales = packing.pack_reference(latent, *groups)
            latent = packing.unpack_reference(codes, scales, *groups)
        far = algebra.decode(latent, side.decode)[0].transpose(0, 1) + mean
        as_read.append((x, far, near))
    out = []
    for p in range(len(query)):
        quantized = window.quantized_tokens(p)
        ends = min(window.sinks, p + 1), window.sinks + quantized
        k, v = (
            torch.cat([x[: ends[0]], far[window.sinks : ends[1]], near[ends[1] : p + 1]]) for x, far, near in as_read
        )
        q = query[p][None, :, None]
        result = attention_reference(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], None, scale=site.site.scale)
        out.append(result[0, :, 0])
    return torch.stack(out)


def in_pieces(plan: LatentPlan, tokens: tuple[Tensor, Tensor, Tensor], *ends: int) -> Tensor:
    engine, start, out = Engine(plan, SIZES), 0, []
    for stop in (*ends, len(tokens[0])):
        out += engine.step([tokens], [(start, stop)])
        start = stop
    return torch.cat(out)


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < ROUNDING * float(b.abs().max())


PLANS: dict[str, LatentPlan] = {
    "quantized": plan_of(),
    "window of 16 bits": plan_of(window_bits=16),
    "means": plan_of(mean_tokens=12),
    "means, window of 8 bits": plan_of(mean_tokens=12, window_bits=8),
    "window of 8 bits": plan_of(window_bits=8),
    "not quantized": plan_of(tiers=()),
    "no sinks": plan_of(sinks=0, window_bits=8),
}


SEGMENTS = in_segments(plan_of(window_bits=16))


@pytest.mark.parametrize("name", PLANS)
def test_every_query_attends_by_the_rule(name: str) -> None:
    plan = PLANS[name]
    tokens = random_tokens(plan, COUNT)
    expected = by_hand(plan, tokens)
    close(in_pieces(plan, tokens), expected)
    close(in_pieces(plan, tokens, *range(1, COUNT)), expected)
    close(in_pieces(plan, tokens, 3, 9, 13, 14, 40, 41, 77), expected)


@pytest.mark.parametrize("plan", [plan_of(window_bits=16), plan_of("input", window_bits=16), SEGMENTS])
def test_it_agrees_with_the_own_cache_token_by_token(plan: LatentPlan) -> None:
    tokens = random_tokens(plan, COUNT)
    close(in_pieces(plan, tokens, *range(1, COUNT)), own_cache(plan, tokens))


def test_sequences_of_one_batch_are_independent() -> None:
    plan = PLANS["means, window of 8 bits"]
    several = [random_tokens(plan, COUNT) for _ in range(3)]
    alone = [by_hand(plan, one) for one in several]
    engine = Engine(plan, SIZES)
    steps = [[(0, 30), (0, 10), (0, 14)], [(30, 31), (10, 60), (14, 15)], [(31, 90), (60, 61), (15, 90)]]
    for spans in steps:
        for result, expected, (start, stop) in zip(engine.step(several, spans), alone, spans, strict=True):
            close(result, expected[start:stop])


def test_bytes_of_a_previous_owner_are_not_used_as_means() -> None:
    plan = plan_of(sinks=0, mean_tokens=12)
    engine, several = Engine(plan, SIZES), [random_tokens(plan, 60) for _ in range(2)]
    for cache in engine.caches:
        cache.fill_(255)  # NaN as float32
    engine.step(several, [(0, 50), (0, 3)])
    for result, one, at in zip(engine.step(several, [(50, 51), (3, 4)]), several, (50, 3), strict=True):
        close(result, by_hand(plan, one)[at : at + 1])


@needs_compiler
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("ends", [(), (20,), (3, 40, 57)])
def test_a_prompt_is_prefilled_in_two_kernel_calls(
    name: str, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(op: str, query: Tensor, *args: Any, **options: Any) -> Any:
        part = attend_on_cpu(op, query, *args, **options)
        calls.append(query.shape[2] if part is not None else 0)
        return part

    monkeypatch.setattr(layer_cache, "attend_on_cpu", counted)
    codegen.register_kernels()
    plan = PLANS[name]
    tokens = random_tokens(plan, COUNT)
    found = in_pieces(plan, tokens, *ends)
    close(found, by_hand(plan, tokens))
    bounds = [0, *ends, COUNT]
    pieces = [stop - start for start, stop in itertools.pairwise(bounds)]
    assert [n for n in calls if n] == [n for n in pieces if n >= CPU_QUERIES for _ in ("window", "latents")]


def test_encoders_of_a_16_bit_model_are_float16_if_in_range() -> None:
    plan = plan_of()
    site = plan.sites[0]
    large = replace(site, key=replace(site.key, encode=site.key.encode * 1e6))  # the maximum of float16 is 65,504
    for one, dtype, expected in (
        (site, torch.bfloat16, torch.float16),
        (site, torch.float32, torch.float32),
        (large, torch.bfloat16, torch.float32),
    ):
        layer = layer_cache.LayerCache(plan, one, 0.25, dtype)
        for side in (layer.site.key, layer.site.value):
            assert side.encode.dtype == expected
        assert torch.allclose(layer.site.key.encode.float(), one.key.encode, rtol=2**-11, atol=2**-24)
