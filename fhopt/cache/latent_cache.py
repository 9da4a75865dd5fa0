"""`LatentCache`: a transformers cache that holds latents.

It is a `DynamicCache` (or, with `max_cache_len`, stands for a `StaticCache`) of which the layers that a plan names are
those of fhopt/cache/base_layer.py. Everything else a model caches (linear attention, layers that share keys and values,
very short sliding windows, in caches of fixed size all of them) stays as transformers has it. `encoder_decoder_cache`
makes the pair for a model that also reads an encoder. It is not in fhopt/hf, which is above this package.
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

UNLIKE = 1.35  # times the energy of calibration text: other languages have more, other English text and code less


class LatentCache(DynamicCache):  # type: ignore[misc]
    """A KV cache for one model and plan.

    Raises FhoptError when the plan does not fit the model, or is not a plan.

    Args:
        plan: what to store of each layer, or the path of a saved plan; layers that it does not name stay exact.
        config: the model's configuration; needed when the plan leaves layers out.
        absorb: return tensors on which attention runs without reconstructed K/V; False: tensors of full length,
            reconstructed in each call.
        max_cache_len: room for so many tokens, in tensors that never change their shape (for torch.compile and CUDA
            graphs); None: grow.
        kind: "self", or "cross" for what a decoder reads of its encoder.
        layers: index of the layer that each site (by its name) belongs to; None: read from the names.
        offloading: keep the layers in CPU memory between their turns.
        each_query: where the plan has pages, select pages for each query of a call of several, as in calls of one
            query; False: such calls, as in prefill, read all pages.

    """

    def __init__(
        self, plan: PlanOrPath, config: Any = None, *, absorb: bool = True, max_cache_len: int | None = None,
        kind: str = "self", layers: Mapping[str, int] | None = None, offloading: bool = False,
        each_query: bool = False,
    ) -> None:  # fmt: skip
        if kind not in ("self", "cross") or (max_cache_len is not None and max_cache_len < 1):
            raise FhoptError(
                f"kind={kind!r}, max_cache_len={max_cache_len}: expected 'self' or 'cross', and 1 token or more."
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
        self.warns = bool(plan.provenance)  # of text unlike that of calibration; a plan made by hand has seen none

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
            result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except FhoptError:
            if self._first_pass:  # layers before this one have taken the tokens already
                self.reset()
            raise
        if layer_idx == len(self.layers) - 1:
            self.tell_unlike_text()
        return result

    def tell_unlike_text(self) -> None:
        """Warn, once a process and plan, when the first tokens are unlike the text of calibration.

        Called by `update`, and by what quantizes tokens without it.
        """
        energy = self.latent_energy if self.warns else None
        if energy is None:
            return
        self.warns = False
        if energy > UNLIKE:
            warn_once(
                f"unlike text {id(self.plan)}",
                f"the text is unlike what the plan was calibrated on: latents of its values have {energy:.2f} times "
                f"the energy (up to {UNLIKE} is usual). Expect a larger loss than the plan says; `fhopt eval MODEL "
                "--plan PLAN --data FILE` measures it, `fhopt fit MODEL --data FILE` calibrates on such text.",
            )

    @property
    def latent_energy(self) -> float | None:
        """Mean square of the values' latents against calibration text, where it is about 1 (see `LatentEnergy`).

        The geometric mean over layers with bit groups, without sliding windows that have quantized too few tokens. None
        before enough tokens are quantized, and where nothing says: no such layers, fixed sizes, calls in compiled
        graphs.
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
        """Forget all tokens."""
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
        """Bytes of storage that the cache holds, all layers, everything counted."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """Return a row for each layer: kind, tokens, quantized tokens, bytes in all and by region (REGIONS).

        step_bytes: of these, what attention of the next token reads; dense_step_bytes: what it would, if it read all
        pages; completed: share of its page selections in which the plan's limit made all pages be read.
        """
        return cache_report(self)


class LatentEncoderDecoderCache(EncoderDecoderCache):  # type: ignore[misc]
    """Two latent caches: of what the decoder wrote, and of what it reads of the encoder."""

    def check_dynamic_cache(self, method: str) -> None:
        """Raise nothing: latent caches can do all that dynamic ones can."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage that both caches hold."""
        return cache_bytes(self)

    def report(self) -> list[dict[str, Any]]:
        """Return rows as `LatentCache.report` does: layers of the decoder, then those that read the encoder."""
        return cache_report(self)


def encoder_decoder_cache(plan: LatentPlan, config: Any, **options: Any) -> LatentEncoderDecoderCache:
    """Return a cache for an encoder-decoder model; options as of `LatentCache`."""
    cross = {k: v for k, v in options.items() if k != "max_cache_len"}
    return LatentEncoderDecoderCache(
        LatentCache(plan, config, **options), LatentCache(plan, config, kind="cross", **cross)
    )
