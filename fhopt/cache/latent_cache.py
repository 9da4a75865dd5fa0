"""`LatentCache`: a transformers cache that stores latents.

A `DynamicCache` (or, with `max_cache_len`, the equivalent of a `StaticCache`) whose layers named by a plan are those of
fhopt/cache/base_layer.py. All other cached layers stay as in transformers: linear attention, layers that share keys and
values, very short sliding windows, and in static caches every sliding window. `encoder_decoder_cache` makes the pair
for encoder-decoder models. This is not in fhopt/hf, which imports this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.layer_map import LATENT_LAYERS, latent_layers, plain_layers
from fhopt.cache.report import cache_bytes, cache_report
from fhopt.cache.sliding_layer import SlidingLatentLayer
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan, PlanOrPath, as_plan
from fhopt.system import warn_once

UNLIKE = 1.35  # times the calibration energy: other languages exceed it, other English text and code do not


class LatentCache(DynamicCache):  # type: ignore[misc]
    """A KV cache for one model and plan.

    Raises FhoptError if the plan does not fit the model, or is not a plan.

    Args:
        plan: a plan or its path; layers that it does not name stay in full precision.
        config: the model's configuration; required if the plan leaves layers out.
        absorb: return tensors on which attention runs without reconstructed K/V; False: full-length tensors,
            reconstructed in each call.
        max_cache_len: capacity in tokens, in tensors of fixed shape (for torch.compile and CUDA graphs); None: dynamic.
        kind: "self", or "cross" for cross attention.
        layers: layer index of each site, by site name; None: parsed from the names.
        offloading: hold a layer in CPU memory except while it runs.
        each_query: with page selection, select pages for each query of a multi-query call, as single-query calls do;
            False: multi-query calls, as in prefill, use all pages.

    """

    def __init__(
        self, plan: PlanOrPath, config: Any = None, *, absorb: bool = True, max_cache_len: int | None = None,
        kind: str = "self", layers: Mapping[str, int] | None = None, offloading: bool = False,
        each_query: bool = False,
    ) -> None:  # fmt: skip
        if kind not in ("self", "cross") or (max_cache_len is not None and max_cache_len < 1):
            raise FhoptError(
                f"kind={kind!r}, max_cache_len={max_cache_len} is invalid; expected kind 'self' or 'cross', "
                "and max_cache_len of at least 1. Correct them."
            )
        plan = as_plan(plan)
        plain = None if config is None else plain_layers(config, max_cache_len)
        made = latent_layers(plan, plain, absorb=absorb, max_cache_len=max_cache_len, kind=kind, layers=layers)
        for layer in made:
            if isinstance(layer, LATENT_LAYERS):
                layer.each_query = each_query
        Cache.__init__(self, layers=made, offloading=offloading)
        self.plan = plan
        self._first_pass = True
        self.warns = bool(plan.provenance)  # a plan made by hand has no calibration set

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to layer `layer_idx`; see `LatentLayer.update`. Raises FhoptError and leaves the cache unchanged."""
        if torch.compiler.is_compiling():  # a change of this object would trigger a recompilation
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._first_pass and layer_idx < len(self.layers) and self.layers[layer_idx].is_initialized:
            self._first_pass = False
        try:
            if layer_idx >= len(self.layers):
                raise FhoptError(
                    f"the model caches layer {layer_idx}, but this cache has only {len(self.layers)} layers. "
                    "Pass the model's configuration too: LatentCache(plan, model.config)."
                )
            result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except FhoptError:
            if self._first_pass:  # earlier layers have already stored the tokens
                self.reset()
            raise
        if layer_idx == len(self.layers) - 1:
            self.tell_unlike_text()
        return result

    def tell_unlike_text(self) -> None:
        """Warn once per process and plan if the first tokens are out of distribution of the calibration set.

        Called by `update`, and by code that quantizes tokens without it.
        """
        energy = self.latent_energy if self.warns else None
        if energy is None:
            return
        self.warns = False
        if energy > UNLIKE:
            warn_once(
                f"unlike text {id(self.plan)}",
                f"input looks out of distribution for this plan: value-latent energy is {energy:.2f}x the "
                f"calibration level (normal: up to {UNLIKE}x). Quality may be worse than the plan's expected "
                "loss. Measure it with `fhopt eval MODEL --plan PLAN --data FILE`, or calibrate on such text "
                "with `fhopt fit MODEL --data FILE`.",
            )

    @property
    def latent_energy(self) -> float | None:
        """Mean square of the values' latents relative to the calibration set, where it is about 1 (see `LatentEnergy`).

        Geometric mean over layers with bit groups, except sliding windows that have quantized too few tokens. None
        before enough tokens are quantized, and if nothing was measured: no such layers, static caches, compiled graphs.
        """
        means = []
        for layer in self.layers:
            if isinstance(layer, LatentLayer) and not layer.packed_values.is_uncoded:
                mean = layer.packed_values.energy.mean
                if mean is not None:
                    means.append(mean)
                elif not layer.is_sliding:
                    return None
        return math.exp(sum(math.log(max(mean, 1e-30)) for mean in means) / len(means)) if means else None

    def reset(self) -> None:
        """Drop all tokens."""
        super().reset()
        self._first_pass = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens of all layers, or of none: see `SlidingLatentLayer.crop`."""
        for layer in self.layers:
            if isinstance(layer, SlidingLatentLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers, everything included."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """Return a row per layer: kind, tokens, quantized tokens, bytes in total and by region (REGIONS).

        step_bytes: bytes that attention of the next token loads; dense_step_bytes: the same with all pages; completed:
        fraction of page selections that the plan's limit extended to all pages.
        """
        return cache_report(self)


class LatentEncoderDecoderCache(EncoderDecoderCache):  # type: ignore[misc]
    """A pair of latent caches: the decoder's own tokens, and its cross attention."""

    def check_dynamic_cache(self, method: str) -> None:
        """Raise nothing: latent caches support everything that dynamic ones do."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage of both caches."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """Return rows as `LatentCache.report` does: decoder layers, then cross-attention layers."""
        return cache_report(self)


def encoder_decoder_cache(plan: LatentPlan, config: Any, **options: Any) -> LatentEncoderDecoderCache:
    """Make a cache for an encoder-decoder model; options as of `LatentCache`."""
    cross = {k: v for k, v in options.items() if k != "max_cache_len"}
    return LatentEncoderDecoderCache(
        LatentCache(plan, config, **options), LatentCache(plan, config, kind="cross", **cross)
    )
