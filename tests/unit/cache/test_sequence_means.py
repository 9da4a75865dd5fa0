"""Means of a sequence, which are subtracted before latents are quantized."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FittedModel, cached, token_ids
from torch import Tensor

from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.sequence_means import MEANS, SequenceMeans
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import switched
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.serialization import describe_plan

COUNT = 16  # that the means are computed from


@pytest.fixture
def plan(llama: FittedModel) -> LatentPlan:
    return llama.plan(4, mean_tokens=COUNT)


def steps(model: Any, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """Return the logits of all tokens: prefill the prompt, then decode token by token."""
    options = cached(cache)
    parts = [model(ids[:, :prompt], **options, use_cache=True).logits]
    parts += [model(ids[:, t : t + 1], **options, use_cache=True).logits for t in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


@torch.no_grad()
def logits(model: Any, plan: LatentPlan, ids: Tensor, prompt: int = 40, **options: Any) -> tuple[Tensor, Any]:
    with switched(model, plan):
        cache = LatentCache(plan, model.config, **options)
        return steps(model, cache, ids, prompt), cache


def test_the_mean_is_of_the_first_tokens_after_the_sinks_within_one_call() -> None:
    keys, values = torch.randn(2, 3, 30, 8), torch.randn(2, 3, 30, 6)
    means = SequenceMeans(sinks=4, tokens=10, of_keys=True)
    means.start(keys, values)
    means.see(keys[:, :, :3], values[:, :, :3], 0)
    assert not means.parts[0].any() and not means.parts[1].any()
    means.see(keys[:, :, 3:], values[:, :, 3:], 3)
    torch.testing.assert_close(means.parts[0], keys[:, :, 4:14].mean(2, keepdim=True))
    torch.testing.assert_close(means.parts[1], values[:, :, 4:14].mean(2, keepdim=True))
    held = means.parts
    means.see(keys, values, 30)
    assert means.parts is held


@pytest.mark.parametrize("calls", [(30,), (3, 27), (4, 26), (5, 25), (1, 1, 1, 1, 1, 25)])
def test_a_length_on_the_device_gives_the_same_means(calls: tuple[int, ...]) -> None:
    keys, values = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    host, device = SequenceMeans(4, 10, True), SequenceMeans(4, 10, True)
    host.start(keys, values)
    device.start(keys, values)
    start = 0
    for count in calls:
        part = slice(start, start + count)
        host.see(keys[:, :, part], values[:, :, part], start)
        device.see(keys[:, :, part], values[:, :, part], torch.tensor(start))
        start += count
    assert host.parts[0].any()
    torch.testing.assert_close(device.parts, host.parts)


@pytest.mark.parametrize("window_bits", [8, 16])
def test_attention_adds_the_means_that_reconstructed_keys_and_values_include(
    llama: FittedModel, window_bits: int
) -> None:
    plan, ids = llama.plan(4, mean_tokens=COUNT, window_bits=window_bits), token_ids(2, 41)
    absorbed, cache = logits(llama.model, plan, ids)
    plain, _ = logits(llama.model, plan, ids, absorb=False)
    assert cache.layers[0].quantized_tokens and cache.layers[0].means.parts[0].any()
    torch.testing.assert_close(absorbed, plain, rtol=1e-4, atol=1e-4)


def test_means_change_what_is_quantized(llama: FittedModel, plan: LatentPlan) -> None:
    ids = token_ids(1, 60)
    with_means, _ = logits(llama.model, plan, ids)
    without, _ = logits(llama.model, replace(plan, mean_tokens=0), ids)
    assert (with_means - without).abs().max() > 1e-3


def test_a_static_cache_gives_the_same(llama: FittedModel, plan: LatentPlan) -> None:
    ids = token_ids(2, 41)
    growing, _ = logits(llama.model, plan, ids)
    static, _ = logits(llama.model, plan, ids, max_cache_len=64)
    torch.testing.assert_close(static, growing, rtol=1e-4, atol=1e-4)


def test_a_constant_offset_of_keys_and_values_costs_no_bits(plan: LatentPlan, llama: FittedModel) -> None:
    """An offset of any size is subtracted before rounding, in latents and in the 8-bit window, and restored exactly."""
    site = plan.sites[0].site
    common = torch.randn(1, site.kv_heads, 1, site.key_dim)
    x = torch.randn(1, site.kv_heads, 48, site.key_dim)

    def errors(given: LatentPlan, size: float) -> Tensor:
        cache = LatentCache(given, llama.model.config, absorb=False)
        keys, values = x + size * common, x - size * common
        cache.layers[0].update(keys, values)
        layer = cache.layers[0]
        end = given.sinks + layer.quantized_tokens
        pairs = (layer.keys, keys), (layer.values, values)
        return torch.stack(
            [(a - b)[:, :, part].square().mean() for a, b in pairs for part in (slice(end), slice(end, None))]
        )

    small = errors(plan, 0.0)
    torch.testing.assert_close(errors(plan, 100.0), small, rtol=0.02, atol=0.0)
    assert (errors(replace(plan, mean_tokens=0), 100.0) > 20 * small).all()


def test_with_capped_logits_keys_have_no_mean(plan: LatentPlan, llama: FittedModel) -> None:
    first = plan.sites[0]
    capped = replace(plan, sites=(replace(first, site=replace(first.site, softcap=5.0)), *plan.sites[1:]))
    cache = LatentCache(capped, llama.model.config)
    keys = torch.randn(1, first.site.kv_heads, 48, first.site.key_dim)
    cache.layers[0].update(keys, keys)
    means = cache.layers[0].means
    assert means is not None and not means.parts[0].any() and means.parts[1].any()


@pytest.mark.parametrize("length", [None, 64])
def test_means_move_with_their_sequences(llama: FittedModel, plan: LatentPlan, length: int | None) -> None:
    """Reordering, saved state and copies; a reset cache computes new ones."""
    ids = token_ids(3, 50)
    _, cache = logits(llama.model, plan, ids, max_cache_len=length)
    layer = cache.layers[1]
    before = [part.clone() for part in layer.means.parts]
    other = LatentCache(plan, llama.model.config, max_cache_len=length)
    other.layers[1].restore(copy.deepcopy(layer.state()))
    torch.testing.assert_close(other.layers[1].means.parts, tuple(before))
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(layer.means.parts, tuple([part[[2, 0, 0]] for part in before]))
    cache.reset()
    with torch.no_grad(), switched(llama.model, plan):
        steps(llama.model, cache, token_ids(3, 50), 40)
    assert not torch.equal(cache.layers[1].means.parts[1], before[1])


@pytest.mark.parametrize("length", [None, 64])
def test_a_copy_has_its_own_means(llama: FittedModel, plan: LatentPlan, length: int | None) -> None:
    """Assisted decoding copies the cache: changes of the copy do not affect it, and both give the same logits."""
    ids = token_ids(2, 50)
    _, cache = logits(llama.model, plan, ids, max_cache_len=length)
    other = copy.deepcopy(cache)
    with torch.no_grad(), switched(llama.model, plan):
        expected = llama.model(ids[:, :1], **cached(copy.deepcopy(cache)), use_cache=True).logits
        for layer in cache.layers:
            layer.means.parts = tuple([torch.full_like(part, 1e3) for part in layer.means.parts])
        found = llama.model(ids[:, :1], **cached(other), use_cache=True).logits
    torch.testing.assert_close(found, expected)


def test_bytes_are_counted(llama: FittedModel, plan: LatentPlan) -> None:
    ids, size = token_ids(1, 60), 4
    _, cache = logits(llama.model, plan, ids)
    means = sum(2 * p.site.kv_heads * p.site.key_dim * size for p in plan.sites)
    assert sum(layer.stores[MEANS].nbytes for layer in cache.layers) == means
    assert plan.cache_bytes(512) - replace(plan, mean_tokens=0).cache_bytes(512) == means
    spare = sum(layer.regions()["spare"] for layer in cache.layers)
    assert cache.nbytes - spare == plan.cache_bytes(60, size)


def test_a_plan_with_means_has_the_requested_size(llama: FittedModel) -> None:
    plan = llama.plan(5, mean_tokens=COUNT)
    assert plan.ratio(2048) >= 5


def test_files_store_them_and_other_plans_have_the_same_digest_as_before(plan: LatentPlan, tmp_path: Path) -> None:
    loaded = LatentPlan.load(plan.save(tmp_path / "with"))
    assert loaded.mean_tokens == COUNT and loaded.digest() == plan.digest()
    without = replace(plan, mean_tokens=0)
    assert without.digest() != plan.digest()
    assert describe_plan(without)["version"] == 3 and describe_plan(plan)["version"] == 5  # digests are unchanged


def test_an_operation_that_cannot_add_them_back_says_so(plan: LatentPlan) -> None:
    with pytest.raises(
        FhoptError, match=r"an exported step does not support sequence means.*mean_tokens=16.*--mean-tokens 0"
    ):
        plan.check_no_means("an exported step")
    replace(plan, mean_tokens=0).check_no_means("an exported step")
    with pytest.raises(FhoptError, match="mean_tokens -1"):
        replace(plan, mean_tokens=-1)
