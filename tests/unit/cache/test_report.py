"""Bytes of a cache: by formula, by report and by the allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import CODED, random_plan
from latent_caches import coded, gpt2_with_biases, logits, shared
from model_zoo import huggingface as zoo
from needs import sampled
from small_models import FittedModel, cached, tiny_llama, token_ids

import fhopt
from fhopt.attention import manual_attention
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.report import REGIONS
from fhopt.cache.residual_window import spare_places
from fhopt.codegen import background, dispatch
from fhopt.codegen.build import build_torch
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.models.capture import capture
from fhopt.models.model_facts import cache_argument
from fhopt.passes import pipeline

WINDOWS = (16, 8)


def allocated(run: Callable[[], Any]) -> list[int]:
    """Return the size of every block that torch's allocator returns during `run`, including in C++."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events: Any = trace.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def decoding(model: Any, cache: Any, steps: int) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for _ in range(steps):
            model(token_ids(1, 1), **{cache_argument(model): cache})

    return run


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_decoding_never_allocates_keys_or_values_of_full_length(
    llama: FittedModel, static: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode past 3,000 tokens, across a block that is quantized, and record every allocation.

    None is as large as one layer's latents in floating point, let alone its keys. Only logits and masks grow, by a few
    elements per token.
    """
    if kernel == "torch":
        monkeypatch.setattr(background, "build_kernel", build_torch)
        monkeypatch.setattr(dispatch, "builder", background.Builder())
        monkeypatch.setattr(dispatch, "_kernels", {})
        monkeypatch.setattr(manual_attention, "TILE", 64)
    model, plan, length = tiny_llama(max_position_embeddings=4096), llama.plan(4), 3000
    fhopt.apply(model, plan)
    cache = latent_cache(model, max_cache_len=3100 if static else None)
    with torch.no_grad():
        model(token_ids(1, length), **cached(cache))
    decoding(model, cache, 2)()
    blocks = allocated(decoding(model, cache, plan.block))
    fhopt.unapply(model)
    quantized = int(cache.layers[0].quantized_tokens)
    site = plan.sites[0]
    keys = quantized * site.site.kv_heads * site.site.key_dim * 4
    rows = quantized * (site.key.row_bytes() + 2) * (site.key.groups + 1) * 1.1  # packed latents, while growing
    assert blocks and quantized > 2900
    assert max(blocks) < max(rows, keys / 3)


@pytest.mark.parametrize("name", sampled(["bloom", "falcon", "mpt"], 3))
def test_nor_do_models_with_explicit_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manual_attention, "TILE", 64)
    row = next(m for m in zoo.DECODERS if m.name == name)
    limit = {"max_seq_len": 4096} if name == "mpt" else {}
    model: Any = zoo._make(replace(row, options={**row.options, **limit}), row.implementations[-1])
    sites = pipeline.find_attentions(
        capture(model, (), {"input_ids": token_ids(1, 9), "use_cache": False}).program
    ).sites
    plan = coded(fit_plan.exact_plan(sites.values(), recent=8, block=8))
    fhopt.apply(model, plan)
    cache = latent_cache(model)
    with torch.no_grad():
        model(token_ids(1, 3000), **{cache_argument(model): cache}, use_cache=True)
    decoding(model, cache, 2)()
    blocks = allocated(decoding(model, cache, plan.block))
    site = plan.sites[0].site
    assert max(blocks) < cache.layers[0].quantized * site.kv_heads * site.key_dim * 4 / (1 if site.kv_heads == 1 else 3)


# ---- bytes


def test_the_cache_holds_what_the_plan_says(fitted: FittedModel) -> None:
    plan = fitted.plan(4)
    fhopt.apply(fitted.model, plan)
    cache = LatentCache(plan)
    logits(fitted.model, cache, token_ids(1, 400), [200])
    fhopt.unapply(fitted.model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for row in cache.layers for t in row.tensors}
    assert cache.nbytes == sum(held.values()) == sum(r["bytes"] for r in cache.report())
    needed = plan.cache_bytes(400, itemsize=4)
    spare = sum(p.token_bytes() for p in plan.sites) * (cache.layers[0].quantized / 8 + plan.block)
    assert needed <= cache.nbytes <= needed + spare
    assert cache.nbytes < 0.5 * 400 * plan.exact_token_bytes(itemsize=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("window_bits", WINDOWS)
@pytest.mark.parametrize("layout", ["head", "input"])
def test_the_report_equals_the_allocated_bytes(layout: str, window_bits: int, static: bool, dtype: torch.dtype) -> None:
    from torch.profiler import ProfilerActivity, profile

    plan = random_plan(layout, CODED, window_bits=window_bits, sinks=3)
    batches = [
        (torch.randn(2, 2, n, 16).to(dtype), torch.randn(2, 2, n, 8).to(dtype)) for n in (300, 1, 1, 5, 40, 1, 8, 1)
    ]

    def fill() -> LatentCache:
        cache = LatentCache(plan, max_cache_len=400 if static else None)
        for key, value in batches:
            cache.update(key, value, 0)
        cache.crop(-11)
        cache.update(*batches[1], 0)
        return cache

    fill()  # builds bases and kernels
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        cache = fill()
    events: Any = trace.profiler.kineto_results.events()
    held = sum(e.nbytes() for e in events if e.name() == "[memory]")
    counters = 16 if static else 0  # numbers of tokens and of quantized tokens
    assert cache.nbytes + counters == held
    (row,) = cache.report()
    assert row["bytes"] == cache.nbytes == sum(row[region] for region in REGIONS)
    tokens = 357 - 11 + 1
    assert row["tokens"] == tokens and row["exact"] == 0
    site, size = plan.sites[0], dtype.itemsize
    assert row["sealed"] == 2 * row["sealed_tokens"] * site.token_bytes(size)
    if static:
        assert row["sinks"] == 2 * (3 + 1) * site.window_bytes(16, size)
        assert row["window"] == 2 * (plan.window.capacity + 1) * site.window_bytes(window_bits, size)
    else:
        assert row["sinks"] == 2 * 3 * site.window_bytes(16, size)
        assert row["window"] == 2 * (tokens - 3 - row["sealed_tokens"]) * site.window_bytes(window_bits, size)
        packed = (row["sealed_tokens"] // 64 + plan.block) * site.token_bytes(size)
        places = spare_places(row["sealed_tokens"], plan.block) if window_bits == 8 else 0
        assert row["spare"] <= 2 * (packed + places * site.window_bytes(8))


# ---- 8-bit window


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("window_bits", WINDOWS)
def test_without_spare_rows_the_bytes_follow_the_formula(window_bits: int, layout: str, sinks: int) -> None:
    for tiers in ((), CODED):
        plan = random_plan(layout, tiers, window_bits=window_bits, sinks=sinks)
        for steps in ([1], [3, 1, 1], [100], [100, 3], [20, 1, 1, 1, 1]):
            cache = LatentCache(plan, absorb=False)
            for count in steps:
                cache.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 8), 0)
            row = cache.report()[0]
            assert cache.nbytes == row["bytes"]
            assert row["bytes"] - row["spare"] == plan.cache_bytes(sum(steps), itemsize=4)
            places = spare_places(0, plan.block) if window_bits == 8 else 0  # by which the window grows
            assert row["spare"] <= places * plan.sites[0].window_bytes(window_bits)


# ---- one latent for keys and values


def test_one_latent_of_width_d_model_halves_the_bytes_of_packed_latents() -> None:
    model = gpt2_with_biases()
    plan = shared()
    assert plan.sites[0].is_exact and 2 * plan.sites[0].token_bytes() == plan.exact_token_bytes() // 2
    cache = LatentCache(plan, absorb=False)
    logits(model, cache, token_ids(1, 92), [])
    assert cache.layers[0].quantized == 80
    assert cache.nbytes == plan.cache_bytes(92, itemsize=4)
