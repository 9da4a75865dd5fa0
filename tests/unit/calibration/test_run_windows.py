"""Sites in models with sliding-window layers: which ones are fitted, their names and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from needs import sampled
from small_models import VOCABULARY, found
from transformers import DynamicCache
from window_models import WINDOW, windowed

import fhopt
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData
from fhopt.errors import FhoptError
from fhopt.hf.apply import latent_cache
from fhopt.models.capture import Captured
from fhopt.plan.cache_size import cache_size
from fhopt.plan.window import MIN_SLIDING

GEMMA: dict[str, Any] = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


def fitted(captured: Captured) -> list[str]:
    return [site.name for site in run.find_compressible(CalibrationData(captured, [], name="model")).sites.values()]


@pytest.mark.parametrize("tokens", sampled([16, WINDOW + 16], 2))
def test_a_window_is_found_in_shorter_graphs_and_its_site_is_fitted(tokens: int) -> None:
    captured, outcome = found(windowed("gemma3", **GEMMA), tokens)
    masks = [(site.mask, site.window) for site in outcome.sites.values()]
    assert masks == [("sliding", WINDOW), ("causal", 0)]
    assert fitted(captured) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_model_with_only_sliding_layers_is_fitted_and_refused_if_windows_are_short() -> None:
    assert len(fitted(found(windowed("mistral"))[0])) == 2
    captured, _ = found(windowed("mistral", sliding_window=MIN_SLIDING - 1))
    with pytest.raises(FhoptError, match=f"windows of at most {MIN_SLIDING - 1}"):
        run.find_compressible(CalibrationData(captured, [], name="model"))


@pytest.mark.slow
def test_the_requested_size_includes_all_compressed_layers() -> None:
    """Sliding layers count with the tokens that they store, and therefore get more bits."""
    model = windowed("gemma3", **GEMMA)
    rows = torch.randint(3, VOCABULARY, (12, 1, 256), generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = dict(context=256, sequences=8, rate_sequences=4, sinks=4, recent=32, block=8)
    for device, ratio in ((None, 4), ("h100", 2)):
        batches = [{"input_ids": row} for row in rows]
        plan = fhopt.fit(model, batches=batches, ratio=ratio, tokens=1024, device=device, **sizes)
        size = cache_size(plan, 1024)
        assert size.exact_layers == 0 and size.ratio == size.compressed_ratio == plan.ratio(1024)
        assert ratio <= size.ratio < ratio * (1.03 if device is None else 1.3)  # whole bit planes for a GPU
        sliding, full = plan.sites
        assert sliding.token_bytes() > full.token_bytes()


def test_a_plan_of_a_gemma_3_model_gives_the_whole_cache_the_requested_size() -> None:
    """Compare allocated bytes of sliding and full layers, in bfloat16, with an ordinary cache."""
    model = windowed("gemma3", sliding_window=512, head_dim=64).bfloat16()
    rows = torch.randint(3, VOCABULARY, (9, 1, 128), generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = dict(context=128, sequences=6, rate_sequences=3)
    plan = fhopt.fit(model, batches=[{"input_ids": row} for row in rows], ratio=4, **sizes)
    fhopt.apply(model, plan)
    for tokens, least in ((512, 2.0), (8192, 3.9), (32768, 4.0)):
        latent, exact = latent_cache(model), DynamicCache(config=model.config)
        for cache in (latent, exact):
            for layer in cache.layers:
                for count in (tokens - 1, 1):
                    layer.update(*(torch.randn(1, 2, count, 64, dtype=torch.bfloat16) for _ in range(2)))
        held = sum(x.nbytes for layer in exact.layers for x in (layer.keys, layer.values))
        size = cache_size(plan, tokens)
        assert size.exact_layers == 0 and size.exact_bytes == pytest.approx(held, rel=0.02)
        assert size.plan_bytes == pytest.approx(latent.nbytes, rel=0.02)
        assert held / latent.nbytes > least


@pytest.mark.slow
def test_layers_that_share_keys_and_values_of_another_have_their_own_names_and_are_not_fitted() -> None:
    captured, outcome = found(windowed("gemma3n"))
    names = [site.name for site in outcome.sites.values()]
    assert names == [f"model.layers.{i}.self_attn" for i in range(6)]
    assert fitted(captured) == [f"model.layers.{i}.self_attn" for i in range(4)]
