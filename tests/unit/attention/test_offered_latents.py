"""Latents that a cache layer offers to attention: used, or lost on the way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from latent_caches import found_sites, logits
from small_models import FittedModel, cached, tiny_llama, token_ids

import fhopt
from fhopt.cache.latent_cache import LatentCache
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache


def test_a_compiled_model_that_loses_the_latents_is_refused() -> None:
    """Operations on keys between cache and attention make new tensors, without the latents attached to the old ones."""
    model, ids = tiny_llama(), token_ids(1, 40)
    fhopt.apply(model, fit_plan.exact_plan(found_sites(model), recent=8, block=8))
    cache = latent_cache(model, max_cache_len=64)

    def lossy(self: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = LatentCache.update(self, *args, **kwargs)
        return key * 1.0, value

    with torch.no_grad():
        model(ids, **cached(cache))
        torch._dynamo.reset()
        step: Any = torch.compile(model.forward, backend="eager", fullgraph=True)
        cache.__class__ = type("Lossy", (LatentCache,), {"update": lossy})
        with pytest.raises(Exception, match="cannot use their latents"):
            step(input_ids=ids[:, :1], **cached(cache), use_cache=True)


def test_a_model_without_the_plan_applied_also_attends_to_latents(fitted: FittedModel) -> None:
    """Its own attention gets full-length tensors that hold latents, so results are right with and without a plan."""
    ids = token_ids(2, 60)
    plan = fitted.plan(2)  # small quantization steps: codes of the next layer may round differently
    expected = logits(fitted.model, LatentCache(plan, absorb=False), ids, [30, 40, 41])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SDPA repeats keys of grouped heads
        found = logits(fitted.model, LatentCache(plan), ids, [30, 40, 41])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
