"""Attention to latents and to the exact tokens around them."""

from __future__ import annotations

import copy

import torch
from latent_caches import logits
from small_models import Fitted, token_ids

import fhopt
from fhopt.cache.latent_cache import LatentCache


def test_steps_of_a_block_see_exactly_what_single_tokens_see(fitted: Fitted) -> None:
    """In float64, so that both ways round every latent to the same code."""
    plan, ids, model = fitted.plan(4, window_bits=16), token_ids(1, 60), copy.deepcopy(fitted.model).double()
    fhopt.apply(model, plan)
    blocks = logits(model, LatentCache(plan), ids, list(range(20, 60, 8)))
    single = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(blocks, single, rtol=1e-4, atol=1e-4)


def test_absorbed_attention_equals_attention_on_rebuilt_keys_and_values(fitted: Fitted) -> None:
    """In float64, so that both ways round every latent to the same code; kernels are compared in test_codegen.py."""
    plan, ids, model = fitted.plan(4), token_ids(2, 60), copy.deepcopy(fitted.model).double()
    rebuilt = logits(model, LatentCache(plan, absorb=False), ids, list(range(20, 60)))
    fhopt.apply(model, plan)
    absorbed = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-4, atol=1e-4)  # a decoder is rounded to float32
