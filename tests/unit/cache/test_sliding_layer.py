"""Sliding-window layers as packed latents: which tokens they store, and which ones attention sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_caches import coded
from needs import sampled
from small_models import VOCABULARY, found
from torch import Tensor
from window_models import windowed

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.report import exact_cache_bytes
from fhopt.cache.sliding_layer import SlidingLatentLayer
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.models.cache_layers import measured_layers
from fhopt.plan.cache_size import cache_size
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.window import MIN_SLIDING, ResidualWindow

W = 64
NEW = 24
TOKENS = 200
OTHERS = ["gpt_oss", "llama4", "mistral"]
CALLS = [
    [TOKENS], [30] + [1] * 50 + [30] * 4, [50, 20, 3, 1, 1, 100] + [1] * 25, [W - 1, 1, 1, TOKENS - W - 1],
    [W, TOKENS - W], [W - 1 + 3, TOKENS - W - 2], [150] + [1] * 50,
]  # fmt: skip


def models(name: str = "gemma3") -> Any:
    changes = dict(attention_chunk_size=W) if name == "llama4" else dict(sliding_window=W)
    return windowed(name, **changes)


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def exact(model: Any, **options: Any) -> LatentPlan:
    sites = [s for s in found(model)[1].sites.values() if any(one.has(s.name) for one in measured_layers(model))]
    return fit_plan.exact_plan(sites, **dict(sinks=4, recent=16, block=8) | options)


def read(model: Any, ids: Tensor, calls: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Process tokens in calls of `calls` tokens each; return their logits and the cache."""
    parts, cache, at = [], None, 0
    for count in calls:
        options: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options = dict(attention_mask=mask[:, : at + count], position_ids=positions[:, at : at + count])
        with torch.no_grad():
            output = model(ids[:, at : at + count], cache=cache, use_cache=True, **options)
        cache, at = output.cache, at + count
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize(
    ("name", "calls"), sampled([*(("gemma3", calls) for calls in CALLS), *((name, CALLS[2]) for name in OTHERS)], 3)
)
def test_an_exact_plan_changes_nothing_and_its_bytes_are_as_counted(name: str, calls: list[int]) -> None:
    model, ids = models(name), tokens()
    expected, _ = read(model, ids, calls)
    plan = exact(model)
    layers = measured_layers(model)
    fhopt.apply(model, plan)
    logits, cache = read(model, ids, calls)
    kinds = [type(layer) for layer in cache.layers]
    assert SlidingLatentLayer in kinds and set(kinds) <= {SlidingLatentLayer, LatentLayer}
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert 2 * cache_size(plan, TOKENS, layers, itemsize=4).plan_bytes == cache.nbytes
    tokens_of = {SlidingLatentLayer: W - 1, LatentLayer: TOKENS}
    numbers = [tokens_of[type(layer)] * layer.site.site.exact_numbers_per_token for layer in cache.layers]
    assert exact_cache_bytes(cache) == 4 * len(ids) * sum(numbers)
    sliding = next(layer for layer in cache.layers if type(layer) is SlidingLatentLayer)
    assert W - 1 <= sliding.held < W - 1 + 8 and sliding.get_seq_length() == TOKENS and sliding.dropped


PADDED = [[150] + [1] * 50, [50, 10, 1, 1, 1, 1, 1] + [5] * 27, [40, 30, 30] + [4] * 25]


@pytest.mark.parametrize("calls", sampled(PADDED, 2))
def test_the_same_holds_with_left_padding(calls: list[int]) -> None:
    model, ids = models(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    expected, _ = read(model, ids, calls, mask)
    fhopt.apply(model, exact(model))
    logits, _ = read(model, ids, calls, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "calls", sampled(PADDED[:2], 2)
)  # the third begins with fewer tokens than there are attention sinks
def test_padding_is_no_part_of_the_means(calls: list[int]) -> None:
    model, ids = models(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    plan = coded(exact(model))
    fhopt.apply(model, LatentPlan(plan.sites, 4, 16, 8, mean_tokens=16))
    padded = read(model, ids, calls, mask)[1].layers[0]
    alone = read(model, ids[:1, 37:], [calls[0] - 37, *calls[1:]])[1].layers[0]
    for means, expected in zip(padded.means.parts, alone.means.parts, strict=True):
        torch.testing.assert_close(means[:1], expected)


def test_a_padded_batch_cropped_before_it_slides_continues() -> None:
    model, ids = models(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    calls = [35, 30] + [1] * 60
    expected, _ = read(model, ids, calls, mask)
    fhopt.apply(model, exact(model))
    _, cache = read(model, ids, [50], mask)
    cache.crop(-15)
    assert [layer.get_seq_length() for layer in cache.layers] == [35] * len(cache.layers)
    positions, at = (mask.cumsum(1) - 1).clamp(min=0), 35
    for count in calls[1:]:
        now = slice(at, at + count)
        options = dict(attention_mask=mask[:, : at + count], position_ids=positions[:, now])
        with torch.no_grad():
            logits = model(ids[:, now], cache=cache, use_cache=True, **options).logits
        seen = mask[:, now].bool()
        torch.testing.assert_close(logits[seen], expected[:, now][seen], rtol=1e-3, atol=1e-4)
        at += count


def test_quantized_latents_do_not_depend_on_how_tokens_are_split_into_calls() -> None:
    """The window has 16 bits, from which tokens are quantized without previous rounding."""
    model, ids = models(), tokens()
    fhopt.apply(model, coded(exact(model)))
    states = []
    for calls in CALLS:
        cache = read(model, ids, calls)[1]
        layer = cache.layers[0]  # later layers have errors of earlier calls
        states.append((layer.dropped, layer.quantized, layer.packed_keys.unpack(0, layer.quantized)))
    assert {state[:2] for state in states} == {(TOKENS - layer.held, layer.quantized)}
    for _, _, latents in states[1:]:
        difference = (latents - states[0][2]).abs()
        assert (difference > 1e-3).float().mean() < 0.02  # values between two codes round either way


def test_tokens_that_were_recorded_may_be_removed_again() -> None:
    model, ids = models(), tokens()
    plan = exact(model)
    expected, _ = read(model, ids, [150] + [1] * 10)
    fhopt.apply(model, plan)
    _, cache = read(model, ids, [150])
    cache.activate_past_recording()
    with torch.no_grad():
        model(torch.flip(ids[:, :40], (1,)), cache=cache, use_cache=True)
        assert cache.layers[0].held > W + 30
        cache.crop(-40)
        assert cache.get_seq_length() == 150 and cache.layers[0].held < W - 1 + 8
        for at in range(150, 160):
            logits = model(ids[:, at : at + 1], cache=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at], rtol=1e-3, atol=1e-4)


def test_a_crop_that_needs_dropped_tokens_is_an_error_that_changes_nothing() -> None:
    model, ids = models(), tokens()
    fhopt.apply(model, exact(model))
    _, cache = read(model, ids, [150])
    layer = cache.layers[0]
    held = layer.held
    with pytest.raises(FhoptError, match="activate_past_recording"):
        layer.crop(-20)
    assert layer.held == held and layer.get_seq_length() == 150
    full = cache.layers[-1]
    cache.layers.insert(0, cache.layers.pop())  # the first layer can remove any token
    with pytest.raises(FhoptError, match="activate_past_recording"):
        cache.crop(-20)
    assert full.get_seq_length() == 150
    layer.crop(-150 + 150)  # no token
    with pytest.raises(FhoptError, match="expected a number from"):
        layer.crop(1)


@pytest.mark.parametrize(
    "options", sampled([{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"num_return_sequences": 2}], 2)
)
def test_generation_equals_that_of_the_unmodified_model(options: dict[str, Any]) -> None:
    model, ids = models(), tokens(1)[:, :100]
    ids[:, 50:] = ids[:, :50]  # so that prompt lookup finds matches
    if "num_return_sequences" in options:
        options = options | {"num_beams": 2}
    alone = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    fhopt.apply(model, exact(model))
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **options), alone)


@pytest.mark.parametrize("count", sampled([40, 150], 2))
def test_a_saved_layer_continues_where_it_was(count: int) -> None:
    model, ids = models(), tokens()
    plan = coded(exact(model))
    fhopt.apply(model, plan)
    calls = [count] + [1] * (TOKENS - count)
    expected, _ = read(model, ids, calls)
    _, cache = read(model, ids, [count])
    again = latent_cache(model)
    for layer, other in zip(cache.layers, again.layers, strict=True):
        other.restore(layer.state())
    assert again.get_seq_length() == count
    with torch.no_grad():
        for at in range(count, TOKENS):
            logits = model(ids[:, at : at + 1], cache=again, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at], rtol=1e-3, atol=1e-4)
    state = cache.layers[0].state() | {"dropped": 3, "slides": False}
    with pytest.raises(ValueError, match="3 tokens dropped"):
        again.layers[0].restore(state)
    again.reset()
    assert again.layers[0].window.sinks == 4 and again.get_seq_length() == 0
    torch.testing.assert_close(read(model, ids, [count])[0], expected[:, :count], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_short_windows_stay_exact_and_static_caches_keep_theirs() -> None:
    from transformers import DynamicCache, StaticCache

    model = windowed("gemma3", sliding_window=MIN_SLIDING - 1)
    ids = tokens()[:, :60]
    fhopt.apply(model, exact(model))
    _, cache = read(model, ids, [60])
    assert [type(layer) for layer in cache.layers] == [
        *[type(one) for one in DynamicCache(config=model.config).layers[:5]], LatentLayer
    ]  # fmt: skip
    model = models()
    alone = model.generate(ids, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    fhopt.apply(model, exact(model))
    static = StaticCache(model.config, 100)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, cache=static), alone)
    assert not any(type(layer) is SlidingLatentLayer for layer in static.layers)


@pytest.mark.parametrize("sliding", [0, MIN_SLIDING, 100, 512])
@pytest.mark.parametrize("tokens", [1, 31, 99, 100, 101, 116, 511, 512, 600, 8192])
def test_the_parts_of_a_residual_window_are_the_stored_tokens(sliding: int, tokens: int) -> None:
    window = ResidualWindow(16, 256, 64, 8).within(sliding)
    first, newest, quantized = window.split(tokens, sliding)
    assert min(first, newest, quantized) >= 0
    assert first + newest + quantized == tokens - window.dropped(tokens, sliding)
    if sliding:
        assert window.recent <= sliding // 4 and window.block <= sliding // 8
        assert min(tokens, sliding - 1) <= first + newest + quantized < sliding + window.block + window.sinks
    else:
        assert window == ResidualWindow(16, 256, 64, 8) and window.split(tokens)[2] == window.quantized_tokens(tokens)
