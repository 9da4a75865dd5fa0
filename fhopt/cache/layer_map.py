"""Mapping of a model's attention sites to cache layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from fhopt.cache.cross_layer import CrossLatentLayer
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.sliding_layer import SlidingLatentLayer
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.layer_index import cached_sites
from fhopt.plan.site_plan import SitePlan
from fhopt.plan.window import MIN_SLIDING

LATENT_LAYERS = (LatentLayer, StaticLatentLayer, CrossLatentLayer)


# --------------------------------------------------------------------------------------------------- layers


def latent_layers(
    plan: LatentPlan, plain: list[Any] | None, *, absorb: bool = True, max_cache_len: int | None = None,
    kind: str = "self", layers: Mapping[str, int] | None = None,
) -> list[Any]:  # fmt: skip
    """Return the layers `plain` with latent layers at the sites of the plan.

    Only layers that hold all tokens, or a sliding window up to its size, can be replaced.

    plain: None for as many layers as the plan has. Static layers are replaced by static ones. kind, layers: as of
    `cached_sites`. Raises FhoptError.
    """
    sites = cached_sites(plan, kind, layers)
    last = max([-1, *sites])
    if plain is None:
        plain = [DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len) for _ in range(last + 1)]
    if kind == "self" and last < 0:
        raise FhoptError("the plan has no site in any layer that this model caches. Fit a plan for this model.")
    if last >= len(plain):
        raise FhoptError(
            f"the plan names layer {last}; expected a layer below {len(plain)}. Fit a plan for this model."
        )
    made = [_latent_layer(plan, sites[i], old, kind, absorb) if i in sites else old for i, old in enumerate(plain)]
    for layer in [layer for layer in made if isinstance(layer, StaticLatentLayer)][1:]:
        layer.checks_room = False
    return made


def _latent_layer(plan: LatentPlan, site: SitePlan, plain: Any, kind: str, absorb: bool) -> Any:
    if kind == "cross":
        return CrossLatentLayer(plan, site, absorb)
    if type(plain) is StaticLayer:
        return StaticLatentLayer(plan, site, plain.max_cache_len, absorb)
    if type(plain) is DynamicSlidingWindowLayer and plain.sliding_window >= MIN_SLIDING:
        layer = SlidingLatentLayer(plan, site, plain.sliding_window, absorb)
        layer.record_past = plain.record_past  # generate sets it before the plan's layers exist
        return layer
    return LatentLayer(plan, site, absorb) if type(plain) is DynamicLayer else plain


def plain_layers(config: Any, max_cache_len: int | None = None) -> list[Any]:
    """Return the layers that transformers makes for a model, dynamic or of `max_cache_len` tokens."""
    decoder = config.get_text_config(decoder=True)
    made = DynamicCache(config=decoder) if max_cache_len is None else StaticCache(decoder, max_cache_len)
    return list(made.layers)
