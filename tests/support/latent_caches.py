"""Caches of small models and handmade plans."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hand_plans import shared_plan
from small_models import cached, found, tiny_gpt2
from torch import Tensor

from fhopt.fitting import fit_plan
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan


def logits(model: Any, cache: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], **cached(cache)).logits for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)
        ]
    return torch.cat(parts, 1)


def coded(plan: LatentPlan) -> LatentPlan:
    """Return the plan with its latents in 4 bits."""

    def side(old: SidePlan) -> SidePlan:
        return replace(old, tiers=(BitGroup(4, old.width, 0.4),))

    return replace(plan, sites=tuple(replace(s, key=side(s.key), value=side(s.value)) for s in plan.sites))


@functools.cache
def plans(make: Callable[[], Any], window_bits: int) -> LatentPlan:
    """A plan of unquantized latents for all sites of the model that `make` makes."""
    with torch.random.fork_rng():
        sites = found(make())[1].sites.values()
    return replace(fit_plan.exact_plan(sites, recent=8, block=8), window_bits=window_bits)


def gpt2_with_biases() -> Any:
    """A GPT-2 with nonzero biases and nontrivial norms, as in a trained model; the same values in each call."""
    model, generator = tiny_gpt2(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return model


@functools.cache
def shared() -> LatentPlan:
    """A plan with one latent for keys and values: both are affine in the normed input, whose width it has."""
    with torch.random.fork_rng():
        return shared_plan(found(gpt2_with_biases(), 96)[1], width=64)


def found_sites(model: Any) -> list[Any]:
    return list(found(model, 24)[1].sites.values())
