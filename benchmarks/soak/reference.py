"""A plain KV cache of all tokens, the reference for latent caches in soak tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fhopt.ops import algebra, packing
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan


class ExactReference(DynamicLayer):  # type: ignore[misc]
    """A cache of the keys and values of all tokens as attention should use them.

    A dynamic cache quantizes a token, in the form the recent window stored it, together with its block. A static cache
    quantizes the original token, and also dequantizes tokens that a crop finds outside of the window's ring buffer.
    """

    def __init__(self, plan: LatentPlan, site: SitePlan, static: bool) -> None:
        super().__init__()
        self.plan, self.site, self.static = plan, site, static
        self.quantized, self.rounded = 0, 0  # quantized tokens; tokens rounded by an 8-bit recent window
        self.dequantized: tuple[Tensor, Tensor] | None = None  # dequantized from the original tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values, those of this call unquantized; then replace full blocks by dequantized ones."""
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = keys.clone(), values.clone()
        if self.static:
            new = self._round_trip(key_states, value_states)
            old = self.dequantized or tuple(x[:, :, :0] for x in new)
            self.dequantized = (torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2))
        plan, length = self.plan, self.keys.shape[2]
        ready = max(0, length - plan.sinks - plan.recent) // plan.block * plan.block
        if ready > self.quantized:
            self._quantize(ready)
        if plan.window_bits == 8:
            self._round(slice(max(self.rounded, plan.sinks + self.quantized), length))
            self.rounded = length
        return keys, values

    def _quantize(self, count: int) -> None:
        """Replace the first `count` tokens after the attention sinks by their dequantized values."""
        new = slice(self.plan.sinks + self.quantized, self.plan.sinks + count)
        held = self.keys[:, :, new], self.values[:, :, new]
        replaced = (
            tuple(x[:, :, new] for x in self.dequantized) if self.dequantized is not None else self._round_trip(*held)
        )
        self.keys[:, :, new], self.values[:, :, new] = replaced
        self.quantized = count

    def _round(self, part: slice) -> None:
        """Round some tokens as an 8-bit recent window does."""
        for x in (self.keys, self.values):
            x[:, :, part] = packing.unround_rows(*packing.round_rows(x[:, :, part]), x.dtype)

    def _round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize and dequantize tokens: encode, pack, unpack, decode, by the slow reference of each."""
        site = self.site
        if site.is_shared:
            latent = _through(torch.cat([keys, values], -1), site.key)
            return algebra.decode(latent, site.key.decode), algebra.decode(latent, site.value.decode)
        sides = ((keys, site.key), (values, site.value))
        both = [algebra.decode(_through(x, side), side.decode) for x, side in sides]
        return both[0], both[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens."""
        if not tokens_to_remove:
            return
        behind = self.keys.shape[2] - self.plan.sinks
        target = behind + tokens_to_remove
        if self.static and behind - self.plan.window.capacity > self.quantized:
            self._quantize(min(behind - self.plan.window.capacity, max(target, self.quantized)))
        super().crop(tokens_to_remove)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        if self.dequantized is not None:
            self.dequantized = (
                self.dequantized[0][:, :, :tokens_to_remove],
                self.dequantized[1][:, :, :tokens_to_remove],
            )
        whole = target if self.static else target // self.plan.block * self.plan.block
        kept = max(0, min(self.quantized, whole))
        if self.plan.window_bits == 8:  # dequantized tokens are rounded in the window, as new ones are
            self._round(slice(self.plan.sinks + kept, self.plan.sinks + self.quantized))
        self.quantized, self.rounded = kept, min(self.rounded, self.keys.shape[2])

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.keys is None:  # before the first tokens
            return
        self.keys, self.values = function(self.keys), function(self.values)
        if self.dequantized is not None:
            self.dequantized = (function(self.dequantized[0]), function(self.dequantized[1]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences."""
        self._each(lambda x: x[beam_idx])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Retain the sequences at these indices."""
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.quantized, self.rounded, self.dequantized = 0, 0, None


def _through(x: Tensor, side: SidePlan) -> Tensor:
    latent = algebra.encode(x.to(side.encode.dtype), side.encode)
    if not side.tiers:
        return latent.to(x.dtype)
    bits, widths, steps = algebra.bit_groups(side)
    packed, scale = packing.pack_reference(latent, bits, widths, steps)
    return packing.unpack_reference(packed, scale, bits, widths, steps).to(x.dtype)
