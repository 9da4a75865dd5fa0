"""Keys and values that hold latents, as operands of torch operations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hand_plans import CODED, random_plan
from latent_caches import found_sites
from small_models import cached, tiny_llama, token_ids
from torch import Tensor

from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan


def latent_pair(**options: Any) -> tuple[Any, Tensor]:
    """Return keys that hold latents, and the same keys as an ordinary tensor."""
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
