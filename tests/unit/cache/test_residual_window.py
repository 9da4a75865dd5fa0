"""A residual window of 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_plans import random_plan
from latent_caches import logits, plans
from small_models import tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_logits_behind_a_window_of_codes_stay_close_and_a_prompt_is_exact_to_itself(make: Any) -> None:
    model, ids = make(), token_ids(2, 60)
    exact, rounded = plans(make, 16), plans(make, 8)
    fhopt.apply(model, exact)
    expected = logits(model, LatentCache(exact), ids, list(range(30, 60)))
    absorbed = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    fhopt.unapply(model)
    rebuilt = logits(model, LatentCache(rounded), ids, list(range(30, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-3, atol=1e-3)  # other order of sums, in float32
    assert torch.equal(absorbed[:, :30], expected[:, :30])
    error = float((absorbed - expected).norm() / expected.norm())
    assert 1e-5 < error < 1e-2  # a number moves by at most 1/254 of the largest of its row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_window_of_codes_is_read_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    plan = random_plan("head", window_bits=8)
    layer = LatentLayer(plan, plan.sites[0], absorb=False)
    for tokens in (3, 30, 1):
        key, value = torch.randn(1, 2, tokens, 16, dtype=dtype), torch.randn(1, 2, tokens, 8, dtype=dtype)
        k, v = layer.update(key, value)
        assert k.dtype == v.dtype == dtype
        assert torch.equal(k[:, :, -tokens:], key) and torch.equal(v[:, :, -tokens:], value)
