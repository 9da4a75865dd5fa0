"""An 8-bit residual window."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import CODED, random_plan
from latent_caches import logits, plans
from needs import needs_compiler
from small_models import tiny_gpt2, tiny_llama, token_ids

import fhopt
import fhopt.codegen
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.residual_window import RoundedWindow, spare_places
from fhopt.plan.window import ResidualWindow


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_logits_after_a_quantized_window_stay_close_and_a_prompt_attends_to_itself_exactly(make: Any) -> None:
    model, ids = make(), token_ids(2, 60)
    exact, rounded = plans(make, 16), plans(make, 8)
    fhopt.apply(model, exact)
    expected = logits(model, LatentCache(exact), ids, list(range(30, 60)))
    absorbed = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    fhopt.unapply(model)
    rebuilt = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-3, atol=1e-3)  # float32 sums in another order
    assert torch.equal(absorbed[:, :30], expected[:, :30])
    error = float((absorbed - expected).norm() / expected.norm())
    assert 1e-5 < error < 1e-2  # an element moves by at most 1/254 of the largest of its row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_window_is_dequantized_to_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0], absorb=False)
    for tokens in (3, 30, 1):
        key, value = torch.randn(1, 2, tokens, 16, dtype=dtype), torch.randn(1, 2, tokens, 8, dtype=dtype)
        k, v = layer.update(key, value)
        assert k.dtype == v.dtype == dtype
        assert torch.equal(k[:, :, -tokens:], key) and torch.equal(v[:, :, -tokens:], value)


@pytest.mark.parametrize("mean_tokens", [0, 16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("steps", [[7], [30] + [1] * 9, [3, 1]])
def test_the_oldest_tokens_come_first(steps: list[int], bits: int, mean_tokens: int) -> None:
    plan = replace(random_plan("head", CODED, window_bits=bits), mean_tokens=mean_tokens)
    layer = LatentLayer(plan, plan.sites[0], absorb=True)
    parts_after(layer, steps)
    new = torch.randn(1, 2, 5, 16)
    for count in (0, 1, layer.window_keys.count, layer.window_keys.count + 3):
        first = layer.window_keys.sinks
        expected = layer.window_keys.read(new)[:, :, first : first + count]
        assert torch.equal(layer.window_keys.oldest(count, new), expected)


# ---- spare places of the window


def parts_after(layer: LatentLayer, steps: list[int], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        for count in steps:
            layer.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 8))
    return [part.clone() for window in (layer.window_keys, layer.window_values) for part in window.parts]


@pytest.mark.parametrize("mean_tokens", [0, 16])
@pytest.mark.parametrize("steps", [[1] * 60, [30] + [1] * 40, [2, 3, 40, 1, 1, 7, 1, 20, 1]])
def test_tokens_rounded_into_spare_places_equal_concatenated_ones(
    steps: list[int], mean_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(random_plan("head", CODED, window_bits=8), mean_tokens=mean_tokens)
    in_place = parts_after(LatentLayer(plan, plan.sites[0]), steps)
    monkeypatch.setattr(RoundedWindow, "_append", lambda self, new: False)
    joined = parts_after(LatentLayer(plan, plan.sites[0]), steps)
    for a, b in zip(in_place, joined, strict=True):
        assert torch.equal(a, b)


@needs_compiler
def test_returned_parts_of_a_window_do_not_change_when_tokens_are_appended() -> None:
    fhopt.codegen.register_kernels()
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0])
    parts_after(layer, [30, 1])
    held = layer.window_keys.parts
    copies = [part.clone() for part in held]
    other = copy.deepcopy(layer)
    parts_after(layer, [1, 1, 1], seed=1)
    assert layer.window_keys.parts[1].data_ptr() == held[1].data_ptr()  # appended in place, without a copy
    for part, before in zip(held, copies, strict=True):
        assert torch.equal(part, before)
    parts_after(other, [1, 1, 1], seed=1)
    for a, b in zip(layer.window_keys.parts, other.window_keys.parts, strict=True):
        assert torch.equal(a, b)


def test_a_cropped_or_reordered_window_is_not_written_in_place() -> None:
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0])
    parts_after(layer, [30, 1, 1])
    layer.crop(-1)
    cut = layer.window_keys.parts
    layer.reorder_cache(torch.tensor([0]))
    parts_after(layer, [1])
    assert layer.window_keys.parts[1].data_ptr() != cut[1].data_ptr()
    assert layer.get_seq_length() == 32


@needs_compiler
@pytest.mark.parametrize("change", ["each", "crop", "copy"])
def test_a_changed_window_has_no_reserved_room(change: str) -> None:
    fhopt.codegen.register_kernels()
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0], absorb=True)
    parts_after(layer, [30, 1, 1])
    window: Any = layer.window_keys
    room, count, held = window.room(1), window.rounded, [part.clone() for part in window.parts]
    assert window.is_in(room, count) and room[0].shape[2] > count
    if change == "each":
        window.each(lambda part: part)
    elif change == "crop":
        window.crop(window.count)
    else:
        window = copy.deepcopy(window)
    assert not window.is_in(room, count) and window.rounded == count
    assert all(map(torch.equal, window.parts, held))


@needs_compiler
@pytest.mark.parametrize(("quantized", "moves"), [(300, 64 // 8), (2048, 64 // 32), (6000, 1)])
def test_a_longer_cache_copies_its_window_less_often(quantized: int, moves: int) -> None:
    fhopt.codegen.register_kernels()
    window = RoundedWindow(ResidualWindow(0, 64, 64, 8))
    window.start(torch.randn(1, 2, 1, 8))
    window.spare = spare_places(quantized, 64)
    window.keep(torch.randn(1, 2, 64, 8), 0)
    moved, room = 0, None
    for _ in range(64):
        window.keep(torch.randn(1, 2, 1, 8), 0)
        moved += window.room(0) is not room
        room = window.room(0)
    assert moved == moves


@pytest.mark.parametrize(("tokens", "places"), [(300, 8), (1500, 1472 // 64), (5000, 64)])
def test_a_layer_reserves_places_by_its_length_and_no_more_than_a_block(tokens: int, places: int) -> None:
    for block in (16, 64):
        plan = random_plan("head", CODED, window_bits=8, block=block)
        cache = LatentCache(plan, absorb=False)
        for count in (tokens, 1):
            cache.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 8), 0)
        assert cache.layers[0].window_keys.spare == min(places, block)
        cache.reset()
        cache.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 8), 0)
        assert cache.layers[0].window_keys.spare == 8
