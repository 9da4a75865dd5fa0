"""`LatentCache`: a transformers cache that holds latents.

It is a `DynamicCache` (or, with `max_cache_len`, stands for a `StaticCache`) of which the layers that a plan names are
those of fhopt/layers.py. Everything else a model caches (sliding windows, linear attention, layers that share keys and
values) stays as transformers has it. `encoder_decoder_cache` makes the pair for a model that also reads an encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
)

from fhopt.errors import FhoptError
from fhopt.layers import CrossLatentLayer, LatentLayer, StaticLatentLayer
from fhopt.spec import AttentionSite, LatentPlan, SitePlan

LATENT_LAYERS = (LatentLayer, StaticLatentLayer, CrossLatentLayer)
REGIONS = ("sinks", "sealed", "index", "window", "exact", "spare")


class LatentCache(DynamicCache):  # type: ignore[misc]
    """A cache for one model and plan.

    Args:
        plan: what to keep of each layer; layers that it does not name stay exact.
        config: the model's configuration; needed when the plan leaves layers out.
        absorb: give what attention can run on without rebuilding (fhopt/attention.py); False: ordinary tensors of full
            length, rebuilt in each call.
        max_cache_len: room for so many tokens, in tensors that never change their shape (for torch.compile and CUDA
            graphs); None: grow.
        kind: "self", or "cross" for what a decoder reads of its encoder.
        layers: index of the layer that each site (by its name) belongs to; None: read from the names.
        offloading: keep the layers in CPU memory between their turns.
        each_query: where the plan has pages, let each query of a call of several choose its own, as it would in a call
            of its own; False: such calls, as of a prompt, read all pages.

    Raises FhoptError when the plan does not fit the model.
    """

    def __init__(
        self, plan: LatentPlan, config: Any = None, *, absorb: bool = True, max_cache_len: int | None = None,
        kind: str = "self", layers: Mapping[str, int] | None = None, offloading: bool = False,
        each_query: bool = False,
    ) -> None:  # fmt: skip
        if kind not in ("self", "cross") or (max_cache_len is not None and max_cache_len < 1):
            raise FhoptError(
                f"kind={kind!r}, max_cache_len={max_cache_len}: expected 'self' or 'cross', and 1 token or more."
            )
        plain = None if config is None else plain_layers(config, max_cache_len)
        made = latent_layers(plan, plain, absorb=absorb, max_cache_len=max_cache_len, kind=kind, layers=layers)
        for layer in made:
            if isinstance(layer, LATENT_LAYERS):
                layer.each_query = each_query
        Cache.__init__(self, layers=made, offloading=offloading)
        self.plan = plan
        self._first_pass = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to layer `layer_idx`; see `LatentLayer.update`. Raises FhoptError, and leaves the cache as it was."""
        if torch.compiler.is_compiling():  # a change of this object would be another graph
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._first_pass and layer_idx < len(self.layers) and self.layers[layer_idx].is_initialized:
            self._first_pass = False
        try:
            if layer_idx >= len(self.layers):
                raise FhoptError(
                    f"the model caches a layer {layer_idx}, the plan and this cache know {len(self.layers)}. Give the "
                    "configuration of the model too: LatentCache(plan, model.config)."
                )
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except FhoptError:
            if self._first_pass:  # layers before this one have taken the tokens already
                self.reset()
            raise
        return found

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._first_pass = True

    @property
    def nbytes(self) -> int:
        """Bytes of storage that the cache holds, all layers, everything counted."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """One row a layer: kind, tokens, how many of them are sealed, bytes in all and by region (REGIONS).

        step_bytes: of these, what attention of the next token reads; dense_step_bytes: what it would, if it read all
        pages; completed: share of its lists of pages that the plan's limit made complete.
        """
        return cache_report(self)


class LatentEncoderDecoderCache(EncoderDecoderCache):  # type: ignore[misc]
    """Two latent caches: of what the decoder wrote, and of what it reads of the encoder."""

    def check_dynamic_cache(self, method: str) -> None:
        """Latent caches can do all that dynamic ones can."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage that both caches hold."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """As `LatentCache.report`: the layers of the decoder, then those that read the encoder."""
        return cache_report(self)


def encoder_decoder_cache(plan: LatentPlan, config: Any, **options: Any) -> LatentEncoderDecoderCache:
    """A cache for an encoder-decoder model; options as of `LatentCache`."""
    cross = {k: v for k, v in options.items() if k != "max_cache_len"}
    return LatentEncoderDecoderCache(
        LatentCache(plan, config, **options), LatentCache(plan, config, kind="cross", **cross)
    )


# --------------------------------------------------------------------------------------------------- layers


def latent_layers(
    plan: LatentPlan, plain: list[Any] | None, *, absorb: bool = True, max_cache_len: int | None = None,
    kind: str = "self", layers: Mapping[str, int] | None = None,
) -> list[Any]:  # fmt: skip
    """The layers `plain` with latent ones where the plan has a site and the layer holds all tokens of full attention.

    plain None: as many as the plan has. A layer that is static becomes a static one. Raises FhoptError.
    """
    sites = cached_sites(plan, kind, layers)
    last = max([-1, *sites])
    if plain is None:
        plain = [DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len) for _ in range(last + 1)]
    if last >= len(plain) or (kind == "self" and last < 0):
        raise FhoptError(f"the plan names layer {last}, the model has {len(plain)}. Fit a plan for this model.")
    made = [_latent_layer(plan, sites[i], old, kind, absorb) if i in sites else old for i, old in enumerate(plain)]
    for layer in [layer for layer in made if isinstance(layer, StaticLatentLayer)][1:]:
        layer.checks_room = False
    return made


def _latent_layer(plan: LatentPlan, site: SitePlan, plain: Any, kind: str, absorb: bool) -> Any:
    if kind == "cross":
        return CrossLatentLayer(plan, site, absorb)
    if type(plain) is StaticLayer:
        return StaticLatentLayer(plan, site, plain.max_cache_len, absorb)
    return LatentLayer(plan, site, absorb) if type(plain) is DynamicLayer else plain


def plain_layers(config: Any, max_cache_len: int | None = None) -> list[Any]:
    """The layers that transformers makes for a model, growing or of `max_cache_len` tokens."""
    decoder = config.get_text_config(decoder=True)
    made = DynamicCache(config=decoder) if max_cache_len is None else StaticCache(decoder, max_cache_len)
    return list(made.layers)


def cached_sites(plan: LatentPlan, kind: str = "self", layers: Mapping[str, int] | None = None) -> dict[int, SitePlan]:
    """The plan's sites of a decoder by the index of their layer. Raises FhoptError when two are of the same layer."""
    sites = [p for p in plan.sites if p.site.kind == kind]
    if layers is None:
        decoding = [p for p in sites if "encoder" not in p.site.name.split(".")]
        layers = layer_indices([p.site for p in decoding])
    found: dict[int, SitePlan] = {}
    for site in (p for p in sites if p.site.name in layers):
        index = layers[site.site.name]
        if index in found:
            raise FhoptError(
                f"the plan names two sites of layer {index}, {found[index].site.name} and {site.site.name}; a cache "
                "keeps one. Use torch.compile(model, backend='flashhead') for this model."
            )
        found[index] = site
    return found


def layer_indices(sites: Iterable[AttentionSite]) -> dict[str, int]:
    """Index of the layer of each site, by its name: the number in its module path in which the sites differ.

    Raises FhoptError for a name without a number.
    """
    numbers = {site.name: [int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|#|$)", site.name)] for site in sites}
    for name, found in numbers.items():
        if not found:
            raise FhoptError(
                f"site {name!r} has no layer number in its name; expected one like 'model.layers.3.self_attn'."
            )
    columns = range(min(map(len, numbers.values()), default=0))
    distinct = [c for c in columns if len({found[c] for found in numbers.values()}) == len(numbers)]
    column = distinct[-1] if distinct and len(numbers) > 1 else 0
    return {name: found[column] for name, found in numbers.items()}


# --------------------------------------------------------------------------------------------------- bytes


def cache_bytes(cache: Any) -> int:
    """Bytes of storage that any transformers cache holds."""
    return sum(row["bytes"] for row in cache_report(cache))


def cache_report(cache: Any) -> list[dict[str, Any]]:
    """The rows of `LatentCache.report` for any transformers cache; all that is not latent is exact."""
    if isinstance(cache, EncoderDecoderCache):
        rows = [("self", cache.self_attention_cache), ("cross", cache.cross_attention_cache)]
        return [{"part": part, **row} for part, one in rows for row in cache_report(one)]
    return [_report(index, layer) for index, layer in enumerate(cache.layers)]


def _report(index: int, layer: Any) -> dict[str, Any]:
    latent = isinstance(layer, LATENT_LAYERS)
    regions = dict.fromkeys(REGIONS, 0) | (layer.regions() if latent else {"exact": tensor_bytes(layer)})
    tokens = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
    return {
        "layer": index,
        "kind": layer.site.layout if latent else "exact",
        "tokens": int(tokens),
        "sealed_tokens": layer.sealed_rows if latent else 0,
        "bytes": sum(regions.values()),
        **regions,
        **_read_in_a_step(layer if latent else None, sum(regions.values())),
    }


def _read_in_a_step(layer: Any, held: int) -> dict[str, float]:
    """layer None: an exact one."""
    if layer is None:
        return {"dense_step_bytes": held, "step_bytes": held, "completed": 0.0}
    dense, chosen = layer.step_bytes()
    return {"dense_step_bytes": dense, "step_bytes": chosen, "completed": layer.completed}


def tensor_bytes(layer: Any) -> int:
    """Bytes of storage of an ordinary cache layer, whatever it holds."""
    held: list[Any] = list(vars(layer).values())
    held += [x for value in held if isinstance(value, (dict, list, tuple)) for x in _items(value)]
    tensors = [t for t in held if isinstance(t, Tensor) and t.dim() > 0]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)
