"""`apply` makes a transformers model use latents by itself; `unapply` takes it back.

Only transformers' own seams are used: the attention implementation registry, the cache class, and a forward hook that
puts a `LatentCache` where the model (or `generate`) would start with an ordinary one. No model source is patched.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.fitting import check_model
from fhopt.spec import LatentPlan

IMPLEMENTATION = "fhopt"


@dataclass
class _Applied:
    plan: LatentPlan
    hook: Any
    before: str


def apply(model: torch.nn.Module, plan: LatentPlan) -> torch.nn.Module:
    """Let `model` (a transformers model with a decoder) cache latents by `plan`; returns the model.

    `model.generate()` and `model(..., use_cache=True)` need no change. Applying another plan replaces the first.
    Raises FhoptError when the model is of another kind, or not the one that the plan was fitted for.
    """
    import fhopt.codegen
    from fhopt.cache import latent_attention, layer_index

    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise FhoptError(
            f"{type(model).__name__} is not a transformers model; expected one with a cache. For any other module use "
            'torch.compile(model, backend="flashhead", options={"plan": plan}).'
        )
    network: Any = model  # a transformers model; torch types its attributes as tensors or modules
    if network.config.is_encoder_decoder:
        raise FhoptError(f"{type(model).__name__} is an encoder-decoder; its caches cannot hold latents yet.")
    if len({layer_index(s.site.name) for s in plan.sites}) < len(plan.sites) or any(
        "#" in s.site.name for s in plan.sites
    ):
        raise FhoptError("the plan names several sites of one layer; a cache keeps one for each layer.")
    check_model(plan, dict(model.named_parameters()), type(model).__name__)
    for site in plan.sites:
        _check_site(model, site.site.name, layer_index(site.site.name))
    _register(latent_attention)
    unapply(model)
    before = network.config._attn_implementation
    network.set_attn_implementation(IMPLEMENTATION)
    hook = model.register_forward_pre_hook(_use_latents, with_kwargs=True)
    network._fhopt_applied = _Applied(plan, hook, before)
    fhopt.codegen.install()
    return model


def unapply(model: torch.nn.Module) -> torch.nn.Module:
    """Take `apply` back; a model without it is left as it is. Returns the model."""
    applied: _Applied | None = getattr(model, "_fhopt_applied", None)
    if applied is not None:
        applied.hook.remove()
        model.set_attn_implementation(applied.before)  # type: ignore[operator]
        del model._fhopt_applied
    return model


def _check_site(model: torch.nn.Module, name: str, layer: int) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise FhoptError(
            f"the plan names {name}, which {type(model).__name__} does not have. Fit a plan for it."
        ) from error
    if getattr(module, "layer_idx", layer) != layer:
        raise FhoptError(f"{name} is cached as layer {module.layer_idx}, its name says {layer}; cannot apply the plan.")


def _register(attention: Any) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without it padding would be ignored


def _use_latents(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: a LatentCache in place of none; an ordinary cache that is still empty gets latent layers."""
    from transformers import DynamicCache

    from fhopt.cache import LatentCache

    applied: _Applied = model._fhopt_applied  # type: ignore[assignment]
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    named = {**bound, **bound.get("kwargs", {})}
    given = next((c for c in (named.get("cache"), named.get("past_key_values")) if c is not None), None)
    if given is not None:
        if type(given) is DynamicCache and given.get_seq_length() == 0:
            given.layers = LatentCache(applied.plan, model.config, absorb=True).layers  # the caller keeps its object
            given.layer_class_to_replicate = None
        return args, kwargs
    wanted = named.get("use_cache")
    wanted = model.config.use_cache and not model.training if wanted is None else wanted  # type: ignore[union-attr]
    if wanted:
        kwargs = {**kwargs, cache_argument(model): LatentCache(applied.plan, model.config, absorb=True)}
    return args, kwargs


def cache_argument(model: torch.nn.Module) -> str:
    """What this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
