"""Checks before a plan is applied to a transformers model, or before a cache is used with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.models.model_facts import check_segments, keeps_own_cache
from fhopt.parallel.offloaded_weights import Weights
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.latent_plan import LatentPlan


def check_decoder(model: torch.nn.Module) -> None:
    """Raise FhoptError unless the model is of transformers and generates with one of its caches."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise FhoptError(
            f"{type(model).__name__} is not a transformers model; expected one with a cache. For any other module use "
            'torch.compile(model, backend="flashhead", options={"plan": plan}).'
        )
    _check_cache(model)


def _check_cache(model: torch.nn.Module) -> None:
    """Raise FhoptError if the model does not generate with a transformers cache: a plan would have no effect."""
    if not hasattr(model, "generate"):
        return
    network: Any = model
    wrapped = network.get_base_model() if hasattr(network, "get_base_model") else network  # PEFT
    taken = inspect.signature(type(wrapped).forward).parameters  # ignores a replaced `forward` of the instance
    takes_one = not {"cache", "past_key_values"}.isdisjoint(taken)
    own = keeps_own_cache(model)
    if own or not takes_one:
        what = "its own kind of cache" if own else "no KV cache"
        raise FhoptError(
            f"{type(model).__name__} uses {what}; expected a model that generates with a transformers "
            "DynamicCache. Use torch.compile(model, backend='flashhead') for this model."
        )


def check_fitted_weights(model: torch.nn.Module, plan: LatentPlan) -> None:
    """Raise FhoptError unless the weights are loaded, fit the plan, and are on devices that it supports."""
    network: Any = model
    weights = Weights(model)
    if weights.absent:
        raise FhoptError(
            f"{weights.absent[0]} of {type(model).__name__} is on the meta device, without values; expected "
            "loaded weights. Load them first, with device_map if they do not fit on one device."
        )
    check_fingerprint(plan, weights, type(model).__name__)
    check_segments(network.config, plan.segment, type(model).__name__)
    if any(p.device.type not in ("cpu", "meta") for p in model.parameters()):  # meta: offloaded to disk
        plan.check_uniform("a GPU")


def check_cache_plan(held: LatentPlan, applied: LatentPlan) -> None:
    """Raise FhoptError if a plan for another model made the cache; another plan for this model is fine."""
    prints = {plan.provenance.get("fingerprint") for plan in (held, applied)} - {None}
    names, known = ({p.site.name for p in plan.sites} for plan in (held, applied))
    if held is not applied and (len(prints) > 1 or not names & known):
        raise FhoptError(
            "the cache was created with a plan for another model. Create one with a plan for this model: "
            "fhopt.LatentCache(plan, model.config)."
        )
    if held is not applied and len({p.sites[0].site.kv_heads for p in (held, applied)}) > 1:
        raise FhoptError(
            f"the cache has {held.sites[0].site.kv_heads} kv heads; expected "
            f"{applied.sites[0].site.kv_heads}, as in this process. Create the cache with "
            "fhopt.hf.apply.latent_cache(model)."
        )
