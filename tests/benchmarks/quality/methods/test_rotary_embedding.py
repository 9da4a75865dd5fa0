"""Undoing RoPE, and recording attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baseline_caches import exact_logits
from small_models import tiny_gpt2, tiny_llama, token_ids
from torch import Tensor
from transformers import DynamicCache

from benchmarks.quality.methods.rotary_embedding import Rotary, watched


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@torch.no_grad()
def test_undone_keys_are_the_projections_of_the_model(llama: Any) -> None:
    seen: list[Tensor] = []
    hook = llama.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, i, output: seen.append(output))
    cache = DynamicCache()
    llama(token_ids(1, 40), past_key_values=cache)
    hook.remove()
    expected = seen[0].unflatten(-1, (2, 16)).transpose(1, 2)  # [B, G, T, D]
    found = Rotary.of(llama).undo(cache.layers[0].keys, torch.arange(40))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32
    assert float((cache.layers[0].keys - expected).abs().max()) > 0.1


def test_redo_undoes_undo(llama: Any) -> None:
    x, positions = torch.randn(2, 1, 2, 20, 16), torch.arange(7, 27)
    rotary = Rotary.of(llama)
    torch.testing.assert_close(rotary.redo(rotary.undo(x, positions), positions), x, rtol=0, atol=1e-5)
    assert float((rotary.undo(x, positions) - x).abs().max()) > 0.1


def test_16_bit_keys_are_rotated_in_float32(llama: Any) -> None:
    x, positions = torch.randn(2, 20, 16).bfloat16(), torch.arange(200, 220)
    found = Rotary.of(llama).undo(x, positions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, Rotary.of(llama).undo(x.float(), positions).bfloat16())


def test_a_scaled_embedding_is_supported(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, positions = torch.randn(2, 20, 16), torch.arange(20)
    expected = Rotary.of(llama).undo(x, positions)
    monkeypatch.setattr(llama.model.rotary_emb, "attention_scaling", 1.7)  # like YaRN's
    torch.testing.assert_close(Rotary.of(llama).undo(x, positions), expected, rtol=0, atol=1e-5)


def test_a_model_without_rotary_embedding_is_not_changed() -> None:
    x = torch.randn(1, 4, 5, 16)
    assert torch.equal(Rotary.of(tiny_gpt2()).undo(x, torch.arange(5)), x)


def test_partial_rotation_is_supported(llama: Any) -> None:
    x, positions = torch.randn(1, 1, 5, 20), torch.arange(5)
    found = Rotary.of(llama).undo(x, positions)
    assert torch.equal(found[..., 16:], x[..., 16:])
    torch.testing.assert_close(found[..., :16], Rotary.of(llama).undo(x[..., :16], positions))


def test_recorded_attention_is_unchanged_and_exposes_its_operands(llama: Any) -> None:
    ids = token_ids(1, 30)
    expected = exact_logits(llama, ids)
    seen: list[tuple[int, ...]] = []
    with watched(llama, lambda module, query, key, value, scale: seen.append((*query.shape, *key.shape))):
        torch.testing.assert_close(exact_logits(llama, ids), expected, rtol=1e-5, atol=1e-5)
    assert seen == [(1, 4, 30, 16, 1, 2, 30, 16)] * 2
    exact_logits(llama, ids)
    assert len(seen) == 2 and llama.config._attn_implementation == "sdpa"
