"""Attention to latents in segments: every implementation matches reconstructed keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import CODED, in_segments, random_plan
from torch import Tensor

from fhopt.attention import latent_parts as parts_module
from fhopt.attention import manual_attention
from fhopt.attention.attend import attend_parts
from fhopt.attention.latent_tensor import LatentTensor
from fhopt.attention.operands import AttentionOperands, PartMasks
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.ops.attention import attention_reference

COUNT = 300


def operands(batch: int, queries: int, masks: str, means: int = 12) -> tuple[AttentionOperands, Tensor]:
    """Return operands of a cache of COUNT tokens, and attention on its reconstructed keys."""
    torch.manual_seed(0)
    plan = in_segments(random_plan("head", CODED, mean_tokens=means))
    layer, site = LatentLayer(plan, plan.sites[0]), plan.sites[0].site
    keys, values = (
        torch.randn(batch, site.kv_heads, COUNT, n, dtype=torch.float64) + 1 for n in (site.key_dim, site.value_dim)
    )
    key: Any
    value: Any
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    key, value = layer.update(keys[:, :, -1:], values[:, :, -1:])
    assert isinstance(key, LatentTensor)
    query = torch.randn(batch, site.heads, queries, site.key_dim, dtype=torch.float64)
    latents, sinks = key.latents, plan.sinks
    far, lengths, seen = None, None, torch.ones(batch, 1, 1, COUNT, dtype=torch.bool)
    rows = latents.key.rows.shape[2]
    if masks == "of each sequence":
        far = torch.rand(batch, 1, 1, rows) > 0.5
        seen[..., sinks : sinks + rows] = far
    elif masks == "of all":
        far = torch.rand(rows) > 0.5
        seen[..., sinks : sinks + rows] = far
    elif masks == "a length":
        lengths = torch.tensor(100)
        seen[..., sinks + 100 : sinks + rows] = False
    elif masks == "lengths":
        lengths = torch.arange(batch) * 90
        for b in range(batch):
            seen[b, ..., sinks + 90 * b : sinks + rows] = False
    expected = attention_reference(query, key.reconstruct(), value.reconstruct(), seen, scale=0.25)
    read = PartMasks(latents=far, lengths=lengths)
    return AttentionOperands(query, key.exact, value.exact, latents.key, latents.value, read, 0.25), expected


@pytest.mark.parametrize("batch", [1, 3, 9])  # with 9 sequences, each segment is processed for all at once
@pytest.mark.parametrize("masks", ["", "of each sequence", "of all", "a length", "lengths"])
@pytest.mark.parametrize("means", [0, 12])
def test_attention_on_segments_equals_attention_on_reconstructed_keys(batch: int, masks: str, means: int) -> None:
    given, expected = operands(batch, 2, masks, means)
    torch.testing.assert_close(attend_parts(given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("means", [0, 12])
def test_products_by_hand_are_those_with_reconstructed_keys(means: int) -> None:
    """Multiply as BLOOM and MPT do: queries with keys, then weights with values."""
    torch.manual_seed(0)
    plan = in_segments(random_plan("head", CODED, mean_tokens=means, window_bits=8))
    layer = LatentLayer(plan, plan.sites[0])
    keys, values = (torch.randn(2, 2, COUNT, n, dtype=torch.float64) + 1 for n in (16, 8))
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    key: Any
    key, _ = layer.update(keys[:, :, -1:], values[:, :, -1:])
    query = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    whole = key.reconstruct().repeat_interleave(2, 1)
    found = manual_attention.scores(query, key.exact, key.latents)
    torch.testing.assert_close(found, query @ whole.mT, rtol=1e-6, atol=1e-6)
    quantized = slice(plan.sinks, plan.sinks + key.latents.visible)
    found = manual_attention.latent_logits(query, key.latents, scale=0.5)
    torch.testing.assert_close(found, 0.5 * (query @ whole.mT)[..., quantized], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masks", ["", "of all", "a length", "lengths"])
def test_many_queries_attend_to_keys_rotated_back(masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.codegen import dispatch

    dispatch.register_kernels()
    monkeypatch.setattr(parts_module, "NUMBERS_AT_ONCE", 1)  # in several parts
    monkeypatch.setattr(parts_module, "MIN_AT_ONCE", 100)
    given, expected = operands(2, 128, masks)
    single = replace(
        given, query=given.query.float(), key=given.key.float(), value=given.value.float(),
        key_side=replace(given.key_side, decode=given.key_side.decode.float()),
        value_side=replace(given.value_side, decode=given.value_side.decode.float()),
    )  # fmt: skip
    with torch.inference_mode():
        dispatch.build_all()
        assert parts_module._reads_finished(single)
        torch.testing.assert_close(attend_parts(single).double(), expected, rtol=1e-4, atol=1e-4)


def test_many_parts_in_16_bits_are_merged_as_exactly_as_one() -> None:
    """In 16-bit sums, a part with 1/512 of the weight would be rounded away when added to the previous parts."""
    outputs, lse = torch.randn(600, 1, 1, 1, 64).bfloat16(), torch.zeros(600, 1, 1, 1)
    found, total = parts_module._joined(zip(outputs, lse, strict=True))
    torch.testing.assert_close(found, outputs.float().mean(0), rtol=1e-3, atol=1e-4)
    assert abs(float(total) - math.log(600)) < 1e-4
    nothing = torch.full((2, 1, 1, 1), -math.inf)
    empty, none = parts_module._joined(zip(torch.zeros(2, 1, 1, 1, 4), nothing, strict=True))
    assert not empty.any() and float(none) == -math.inf


@pytest.mark.parametrize("most", [0, 1 << 40])
def test_segments_are_attended_to_one_by_one_if_queries_are_many(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "MAX_TURNED", most)
    given, expected = operands(1, 5, "of all")
    torch.testing.assert_close(attend_parts(given), expected, rtol=1e-6, atol=1e-6)


def test_gradients_reach_queries_through_every_segment() -> None:
    given, _ = operands(1, 1, "")
    query = given.query.requires_grad_()
    attend_parts(replace(given, query=query)).sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all()) and bool((query.grad != 0).all())
