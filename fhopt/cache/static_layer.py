"""The static cache layer, for compiled decode steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import StaticLatents
from fhopt.attention.manual_attention import reconstructed
from fhopt.cache.base_layer import LatentLayerBase, check_crop, encode_sides, make_packed
from fhopt.cache.quantized_rows import StaticPackedLatents, StaticSketches
from fhopt.cache.residual_window import StaticWindow
from fhopt.cache.store import QUANTIZED, named_stores
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan


class StaticLatentLayer(LatentLayerBase):
    """A layer of capacity `max_cache_len` whose update runs the same operations at any length."""

    is_compileable = True

    def __init__(self, plan: LatentPlan, site: SitePlan, max_cache_len: int, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.max_cache_len = max_cache_len
        self.capacity = self.window.quantized_tokens(max_cache_len)
        self.packed_keys, self.packed_values = make_packed(site, lambda side: StaticPackedLatents(side, self.capacity))
        self.window_keys, self.window_values = StaticWindow(self.window), StaticWindow(self.window)
        self.stores = named_stores((self.window_keys, self.window_values), (self.packed_keys, self.packed_values))
        self._use_pages(lambda limited: StaticSketches(limited, self.capacity))
        self._use_means(self.window_keys, self.window_values)
        self._use_padding(max_cache_len)
        self.checks_room = True  # in eager mode the check synchronizes with the device; one layer of a cache is enough
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.quantized = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory, with the shapes and dtype of the first tokens."""
        self._place_bases(key_states, value_states)
        if self.rotation is not None:
            self.rotation = self.rotation.with_phases(self.rotation.segments(self.capacity))
        self.window_keys.start(key_states)
        self.window_values.start(value_states)
        if self.means is not None:
            self.means.start(key_states, value_states)
        encode_sides(self.site, key_states, value_states, lambda side, x: self._packed_at(side).start(x))
        if isinstance(self.sketches, StaticSketches):
            self.sketches.start(self.packed_keys.unpack(0, 0))
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.quantized = self.quantized.to(self.device)
        if not torch.compiler.is_compiling():
            counters = (self.cumulative_length, self.quantized, *([] if self.sketches is None else [self.lists]))
            for tensor in (*self.tensors, *counters):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _packed_at(self, side: str) -> StaticPackedLatents:
        packed = self._packed(side)
        assert isinstance(packed, StaticPackedLatents)
        return packed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D] and return K/V for attention, in the first call only the new tokens if possible.

        Raises FhoptError, and changes nothing, if the tokens do not fit the plan or the cache. In a compiled graph too
        many tokens raise RuntimeError.
        """
        self._check_site(key_states, value_states)
        self._fit_again(key_states)
        self._check(key_states, value_states)
        self._check_room(key_states.shape[2])
        is_first = not self.is_initialized
        if is_first:
            self.lazy_initialization(key_states, value_states)
        is_alone = is_first and self.reader.active
        result = (key_states, value_states) if is_alone else self._for_attention(*self._read(key_states, value_states))
        self._write(key_states, value_states)
        return result

    def _fit_again(self, key_states: Tensor) -> None:
        """Let an empty layer accept another batch size, dtype or device by reallocating."""
        if not self.is_initialized or torch.compiler.is_compiling():
            return
        same = (self.batch_size, self.dtype, self.device) == (key_states.shape[0], key_states.dtype, key_states.device)
        if not same and int(self.cumulative_length) == 0:
            self.is_initialized = False

    def _check_room(self, new: int) -> None:
        message = f"{self.site.site.name}: a static cache of {self.max_cache_len} tokens has no room for {new} more"
        if torch.compiler.is_compiling():
            torch._assert_async(self.cumulative_length + new <= self.max_cache_len, message)
        elif self.checks_room and (held := int(self.cumulative_length)) + new > self.max_cache_len:
            raise FhoptError(f"{message}; it already holds {held}. Raise max_cache_len, or crop or reset the cache.")

    def _read(self, *new: Tensor) -> tuple[Tensor, Tensor, StaticLatents]:
        """Return (exact keys, exact values, latents), followed by the `new` tokens (keys, values)."""
        key, value = new or (None, None)
        keys, rounded_keys = self.window_keys.for_attention(*([] if key is None else [key]))
        values, rounded_values = self.window_values.for_attention(*([] if value is None else [value]))
        positions = self._positions()
        if key is not None:
            arriving = torch.arange(key.shape[2], device=self.device) + self.cumulative_length
            positions = torch.cat([positions, arriving])
        sides = self._sides(0, self.capacity, rounded_keys, rounded_values)
        quantized = self.quantized.clone()  # `_write` changes it later
        index = self._index(self.capacity)
        latents = StaticLatents(
            *sides, self.window.sinks, positions, quantized, self.max_cache_len, index, order=self.padding.places
        )
        return keys, values, latents

    def _positions(self) -> Tensor:
        """Return the position of the token in each slot of sinks and ring; -1 for an empty slot."""
        sinks, ring = self.window.sinks, self.window.capacity
        first = torch.arange(sinks, device=self.device)
        first = torch.where(first < self.cumulative_length, first, -1)
        place, newest = torch.arange(ring, device=self.device), self.cumulative_length - sinks - 1
        rest = newest - (newest - place) % ring  # the newest token of this slot, counted after the sinks
        return torch.cat([first, torch.where(rest >= self.quantized, rest + sinks, -1)])

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write new tokens and their packed latents to their slots."""
        if self.padding.expected is not None:
            key_states, value_states = self.padding.begin(key_states, value_states)
        (sinks, ring), count = (self.window.sinks, self.window.capacity), key_states.shape[2]
        index = torch.arange(count, device=self.device)
        behind = index + self.cumulative_length - sinks
        in_sinks = torch.where(behind < 0, behind + sinks, sinks)
        is_kept = (behind >= 0) & (index >= count - ring)
        in_ring = torch.where(is_kept, behind % ring, ring)
        packed_at = torch.where((behind >= 0) & (behind < self.capacity), behind, self.capacity)
        if self.means is not None:
            self.means.see(key_states, value_states, self.cumulative_length, self.padding)
        self.window_keys.write(key_states, in_sinks, in_ring)
        self.window_values.write(value_states, in_sinks, in_ring)
        self._encode(key_states, value_states, lambda side, x: self._packed_at(side).write(x, packed_at), behind)
        if isinstance(self.sketches, StaticSketches):
            self.sketches.write(self._packed_at("key").unpack_at(packed_at), packed_at)
        self.cumulative_length.add_(count)
        self.quantized.copy_(torch.maximum(self.quantized, self.window.quantized_tokens(self.cumulative_length)))

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,max_cache_len,D] for attention; None before the first tokens."""
        return self._for_attention(*self._read())[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,max_cache_len,E] for attention; None before the first tokens."""
        return self._for_attention(*self._read())[1] if self.is_initialized else None

    def _blank(self) -> tuple[Tensor, Tensor]:
        keys, values = self.window_keys.parts[0], self.window_values.parts[0]
        return keys[:, :, :0], values[:, :, :0]

    def _counters(self) -> dict[str, Any]:
        return {"cumulative_length": int(self.cumulative_length), QUANTIZED: int(self.quantized)}

    def _count(self, counters: dict[str, Any]) -> None:
        length, quantized = int(counters["cumulative_length"]), int(counters[QUANTIZED])
        if not (0 <= length <= self.max_cache_len and 0 <= quantized <= self.capacity):
            raise ValueError(f"{length} tokens, {quantized} of them quantized")
        self.cumulative_length.fill_(length)
        self.quantized.fill_(quantized)

    @property
    def quantized_tokens(self) -> int:
        """Number of tokens held as latents."""
        return int(self.quantized)

    def get_seq_length(self) -> int | Tensor:
        """Return the number of tokens held, as a device tensor that updates change; 0 before the first tokens."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask: all slots."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Return the capacity in tokens."""
        return self.max_cache_len

    def reset(self) -> None:
        """Drop all tokens; the memory stays allocated at its address."""
        self.padding.forget()
        self._each(lambda t: t.zero_())
        self.cumulative_length.zero_()
        self.quantized.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; tokens that left the ring are attended as latents.

        Raises FhoptError for a positive number, or for more tokens than are held.
        """
        length = int(self.cumulative_length)
        check_crop(tokens_to_remove, length)
        if self.padding.parts and length + tokens_to_remove < self.padding.reach:
            self._begin_again(length + tokens_to_remove)
            return
        behind = self.cumulative_length - self.window.sinks
        oldest = torch.maximum(self.quantized, behind - self.window.capacity)  # oldest token in the ring
        self.quantized.copy_(torch.minimum(oldest, behind + tokens_to_remove).clamp(min=0))
        self.cumulative_length.add_(tokens_to_remove)

    def _begin_again(self, tokens: int) -> None:
        """Reinsert the first `tokens` tokens, dequantized: padding has changed their slots."""
        exact_keys, exact_values, latents = self._read()
        keys = reconstructed(exact_keys, latents.key, latents)[:, :, :tokens]
        values = reconstructed(exact_values, latents.value, latents)[:, :, :tokens]
        self.cumulative_length.zero_()
        self.quantized.zero_()
        self.padding.shorten(self.window.sinks, tokens)
        if tokens:
            self._write(keys, values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences `beam_idx` (beam search), in place if the batch size is unchanged."""
        if beam_idx.shape[0] != self.batch_size:
            super().reorder_cache(beam_idx)
        else:
            for part in self.tensors:
                part.copy_(part.index_select(0, beam_idx.to(part.device)))
