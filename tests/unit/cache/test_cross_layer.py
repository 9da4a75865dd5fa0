"""Encoder latents: stored once, and counted."""

from __future__ import annotations

import pytest
import torch
from encoder_decoders import SOURCE, fitted, model_of, plan_of

from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError


def test_a_plan_counts_cross_tokens_as_quantized() -> None:
    plan = fitted("bart", 4)
    assert not [p.site.name for p in plan.sites if ".encoder." in p.site.name]  # encoders cache no tokens
    assert plan.ratio(2048) == pytest.approx(4, rel=0.02)
    cross = sum(p.token_bytes() for p in plan.sites if p.site.kind == "cross")
    assert plan.cache_bytes(100, source=1500) - plan.cache_bytes(100, source=0) == 1500 * cross


def test_cross_layers_take_their_tokens_once() -> None:
    layer = LatentCache(plan_of("bart", "identity"), model_of("bart").config, kind="cross").layers[0]
    keys, values = torch.randn(1, 4, SOURCE, 16), torch.randn(1, 4, SOURCE, 16)
    assert layer.update(keys, values)[0] is keys
    state = [t.clone() for t in layer.tensors]
    with pytest.raises(FhoptError, match=r"is full with 30 tokens.*reset"):
        layer.update(keys, values)
    assert all(map(torch.equal, layer.tensors, state))
    layer.reset()
    with pytest.raises(FhoptError, match="Use a plan that was fitted for this model"):
        layer.update(keys[:, :3], values)
    layer.update(keys, values)
    torch.testing.assert_close(layer.keys.reconstruct(), keys)
