"""Keys and values that hold latents, in operations of torch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hand_plans import CODED, random_plan
from latent_caches import logits
from small_models import Fitted, cached, found, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache


def latent_pair(**options: Any) -> tuple[Any, Tensor]:
    """Keys that hold latents, and the same as an ordinary tensor."""
    layer = LatentLayer(random_plan("head", CODED, **options), random_plan("head", CODED).sites[0])
    layer.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 8))
    keys = layer.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 8))[0]
    return keys, keys.reconstruct()  # type: ignore[attr-defined]


def test_products_of_latents_are_understood_in_every_spelling() -> None:
    keys, plain = latent_pair()
    query = torch.randn(1, 2, 3, 16)
    folded = query.flatten(0, 1)
    for spelling in (
        lambda k: query @ k.mT,
        lambda k: torch.matmul(input=query, other=k.transpose(2, 3)),
        lambda k: torch.bmm(folded, mat2=k.reshape(2, 61, 16).swapaxes(1, 2)),
        lambda k: torch.baddbmm(torch.full((2, 3, 61), torch.nan), folded, k.reshape(shape=(2, 61, 16)).mT, beta=0),
        lambda k: torch.permute(k, dims=(0, 1, 3, 2)),
        lambda k: k[:, :, 5:] * 2,
    ):
        torch.testing.assert_close(spelling(keys), spelling(plain), rtol=1e-4, atol=1e-4)
    assert keys.shape == plain.shape and keys.dtype == plain.dtype and keys.size(2) == 61


def test_a_change_of_latents_in_place_is_refused() -> None:
    keys, _ = latent_pair()

    def assign(x: Tensor) -> None:
        x[:, :, 0] = 0

    def scale(x: Tensor) -> None:
        x *= 2

    for change in (assign, scale, lambda x: x.mul_(2), lambda x: torch.add(x, 1, out=x)):
        with pytest.raises(FhoptError, match=r"in place .*absorb=False"):
            change(keys)


def test_gradients_pass_through_keys_that_had_to_be_rebuilt() -> None:
    model, gradients = tiny_llama(), []
    ids = token_ids(1, 40)
    plan = fit_plan.exact_plan(found_sites(model), recent=8, block=8)
    for absorb in (True, False):
        cache = LatentCache(plan, model.config, absorb=absorb)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model(ids[:, :30], **cached(cache))
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model(ids[:, 30:], **cached(cache)).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def found_sites(model: Any) -> list[Any]:
    return list(found(model, 24)[1].sites.values())


def test_a_compiled_model_that_loses_the_latents_is_told() -> None:
    """Keys that anything is done to, between cache and attention, are other tensors, without what hung on the first."""
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
        with pytest.raises(Exception, match="loses the latents"):
            step(input_ids=ids[:, :1], **cached(cache), use_cache=True)


def test_a_model_without_the_plan_applied_reads_the_latents_too(fitted: Fitted) -> None:
    """Its own attention gets tensors of full length that hold latents: never a wrong number, applied or not."""
    ids = token_ids(2, 60)
    expected = logits(fitted.model, LatentCache(fitted.plan(4), absorb=False), ids, [30, 40, 41])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of grouped heads, sdpa repeats the keys
        found = logits(fitted.model, LatentCache(fitted.plan(4)), ids, [30, 40, 41])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
