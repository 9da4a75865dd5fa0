"""Attention to selected pages, in caches of models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from paged_plans import LONG, TOKENS, decoded, index_of, kernels, paged
from small_models import FittedModel, tiny_gpt2, token_ids
from torch import Tensor

from fhopt.attention import paged as attention_paged
from fhopt.cache.latent_cache import LatentCache
from fhopt.evaluation.perplexity import switched
from fhopt.hf.apply import latent_cache
from fhopt.ops import page_selection

# --------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def double(llama: FittedModel) -> Any:
    """A float64 model, so that every implementation rounds every latent to the same code."""
    return copy.deepcopy(llama.model).double()


def test_a_step_selects_some_pages_and_selects_the_same_ones_again(
    llama: FittedModel, double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding the same tokens again selects the same pages, only some of them, and differs from dense attention."""
    plan, ids, seen = paged(llama.plan(4)), token_ids(2, LONG), []
    found, page_lists = decoded(double, plan, ids, 120), page_selection.page_lists

    def watch(chosen: Tensor, length: int) -> Tensor:
        lists = page_lists(chosen, length)
        seen.append(lists)
        return lists

    with monkeypatch.context() as patch:
        patch.setattr(page_selection, "page_lists", watch)
        again = decoded(double, plan, ids, 120)
    assert torch.equal(found, again) and len(seen) == 2 * (LONG - 120)
    assert all(0 < int((lists >= 0).sum(-1).max()) < 32 for lists in seen)
    dense = decoded(double, llama.plan(4), ids, 120)
    assert float((found - dense).abs().max()) > 1e-6


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
def test_left_padding_is_never_attended_to(llama: FittedModel, double: Any, fill: bool) -> None:
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


def test_one_latent_for_keys_and_values_is_paged_too(gpt2: FittedModel) -> None:
    plan = gpt2.plan(2, "input")
    assert all(site.is_shared for site in plan.sites)
    ids, model = token_ids(1, LONG), copy.deepcopy(tiny_gpt2()).double()
    model.load_state_dict(gpt2.model.state_dict())
    found, dense = (decoded(model, p, ids, 130) for p in (paged(plan), plan))
    assert bool(found.isfinite().all()) and float((found - dense).abs().max()) > 1e-6


def test_all_pages_are_dense_attention_to_the_bit(llama: FittedModel) -> None:
    plan, ids = llama.plan(4), token_ids(1, LONG)
    whole = paged(plan, share=1.0)
    with kernels(True):
        assert torch.equal(decoded(llama.model, whole, ids, 140), decoded(llama.model, plan, ids, 140))
    few = ids[:, :36]  # no more pages than are always selected
    with kernels(True):
        assert torch.equal(decoded(llama.model, paged(plan), few, 30), decoded(llama.model, plan, few, 30))
    cache = LatentCache(whole)
    assert all(layer.sketches is None for layer in cache.layers)


# --------------------------------------------------------------------------------------------------- the guarantee


def test_only_units_beyond_the_limit_read_the_other_pages_and_are_counted() -> None:
    index = index_of(torch.randn(2, 2, 8 * TOKENS, 8), limit=0.25)
    share = torch.tensor([[0.1, 0.2, 0.25, 0.3], [0.0, 0.0, 0.9, 0.9]]).view(2, 4, 1)
    assert attention_paged.exceeds_limit(share, index).flatten().tolist() == [False, True, False, True]
    assert attention_paged.exceeds_limit(torch.zeros(2, 4, 1), index).any().item() is False
    assert index.counters.tolist() == [0, 2, 0, 0]
