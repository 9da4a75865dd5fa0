"""Slots of a module's K/V buffer stored as latents, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import StaticLatents
from fhopt.attention.manual_attention import reconstructed
from fhopt.cache.quantized_rows import StaticPackedLatents, encoder_inputs
from fhopt.cache.residual_window import StaticWindow
from fhopt.cache.store import Bases, Store
from fhopt.ops import masks
from fhopt.plan.module_buffer import Places
from fhopt.plan.site_plan import BitGroup, SidePlan

CHUNK = 1024  # slots quantized at a time


# --------------------------------------------------------------------------------------------------- tokens in slots


class BufferSlots:
    """Tokens of one pair of buffers. `ring` [capacity]: buffer slot of the token in each ring entry, or -1."""

    ring: Tensor
    key_bases: Bases
    value_bases: Bases

    def __init__(self, key: SidePlan, value: SidePlan, is_shared: bool, places: Places) -> None:
        self.key, self.value, self.is_shared, self.places = key, value, is_shared, places
        self.window = places.window
        self.window_keys, self.window_values = StaticWindow(self.window), StaticWindow(self.window)
        self.packed_keys = StaticPackedLatents(key, places.packed)
        self.packed_values = self.packed_keys if is_shared else StaticPackedLatents(value, places.packed)

    @property
    def stores(self) -> list[Store]:
        """All stores, each once."""
        packed: list[Store] = [self.packed_keys] if self.is_shared else [self.packed_keys, self.packed_values]
        return [self.window_keys, self.window_values, *packed]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, in a fixed order."""
        return (*(part for store in self.stores for part in store.parts), self.ring)

    def put(self, parts: Sequence[Tensor]) -> None:
        """Set the tensors, in the order of `parts`."""
        rest = iter(parts)
        for store in self.stores:
            store.parts = tuple([next(rest) for _ in range(self._count(store))])
        self.ring = next(rest)

    def _count(self, store: Store) -> int:
        """Return the number of tensors of a store."""
        if isinstance(store, StaticPackedLatents):
            return 2 if store.plan.tiers else 1
        return 2 if self.window.bits == 16 else 3

    def place(self, key_bases: Bases, value_bases: Bases) -> None:
        """Use these bases, on the device of the tokens."""
        self.key_bases = self.packed_keys.bases = key_bases
        self.value_bases = value_bases
        if not self.is_shared:
            self.packed_values.bases = value_bases

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Initialize all slots to zeros, with the shape and dtype of keys and values [B,G,T,D]."""
        self.window_keys.start(keys)
        self.window_values.start(values)
        for packed, x in self._encoded(keys[:, :, :0], values[:, :, :0]):
            packed.start(x)
        self.ring = torch.full((self.window.capacity,), -1, device=keys.device)

    def clear(self) -> None:
        """Set all slots to zeros again."""
        for part in self.parts:
            part.zero_()
        self.ring.fill_(-1)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [B,G,T,D]: attention sinks exactly, all others as latents."""
        first = torch.arange(self.window.sinks, device=keys.device)
        for window, x in ((self.window_keys, keys), (self.window_values, values)):
            window.write(x[:, :, : len(first)], first, torch.full_like(first, self.window.capacity))
        for start in range(len(first), self.places.tokens, CHUNK):
            part = slice(start, start + CHUNK)
            for packed, x in self._encoded(keys[:, :, part], values[:, :, part]):
                packed.write(x, torch.arange(x.shape[2], device=x.device) + (start - len(first)))
        self.ring.fill_(-1)

    def _encoded(self, keys: Tensor, values: Tensor) -> list[tuple[StaticPackedLatents, Tensor]]:
        """Return the packed latents with the input of their encoder matrix."""
        stores = {"key": self.packed_keys, "value": self.packed_values}
        return [(stores[side], x) for side, x in encoder_inputs(keys, values, self.is_shared)]

    def read(
        self, key: Tensor, value: Tensor, slots: Tensor, quantized: Tensor
    ) -> tuple[Tensor, Tensor, StaticLatents]:
        """Return (exact keys, exact values, latents), with new tokens [B,G,S,D] for `slots` [S].

        slots: -1 for a token without a slot. quantized: how many slots after the sinks are attended as latents, not
        from the ring.
        """
        sinks, written = self.window.sinks, self._marked(slots)
        first = torch.arange(sinks, device=slots.device)
        in_ring = (self.ring >= sinks + quantized) & ~written[self.ring]
        held = torch.where(written[:sinks], -1, first), torch.where(in_ring, self.ring, -1)
        positions = torch.cat([*held, slots])
        seen = ~self._marked(positions)[sinks:-1]
        keys, rounded_keys = self.window_keys.for_attention(key)
        values, rounded_values = self.window_values.for_attention(value)
        count = self.places.packed
        key_side = self.packed_keys.side(0, count, self.key_bases.decode, rounded_keys)
        value_side = self.packed_values.side(0, count, self.value_bases.decode, rounded_values)
        return keys, values, StaticLatents(key_side, value_side, sinks, positions, seen, self.places.tokens)

    def _marked(self, slots: Tensor) -> Tensor:
        """Return bool [T + 1]: which slots are in the list; the last entry represents -1."""
        marks = torch.zeros(self.places.tokens + 1, dtype=torch.bool, device=slots.device)
        return marks.index_fill(0, torch.where(slots < 0, self.places.tokens, slots), True)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write new tokens [B,G,S,D] to slots [S]: sinks, or packed latents and, for the newest ones, the ring."""
        sinks, capacity = self.window.sinks, self.window.capacity
        behind = slots - sinks
        is_kept = (behind >= 0) & (slots > slots.max() - capacity)
        in_sinks = torch.where((slots >= 0) & (behind < 0), slots, sinks)
        in_ring = torch.where(is_kept, behind % capacity, capacity)
        packed_at = torch.where(behind >= 0, behind, self.places.packed)
        self.window_keys.write(key, in_sinks, in_ring)
        self.window_values.write(value, in_sinks, in_ring)
        for packed, x in self._encoded(key, value):
            packed.write(x, packed_at)
        kept = torch.where(self._marked(slots)[self.ring], -1, self.ring)  # overwritten slots leave the ring
        self.ring.copy_(F.pad(kept, (0, 1)).index_copy(0, in_ring, slots)[:-1])

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """Reconstruct keys and values [B,G,T,D] of all slots."""
        key, value = (window.parts[0][:, :, :0] for window in (self.window_keys, self.window_values))
        keys, values, latents = self.read(key, value, self.ring[:0], self.ring.new_zeros(()))
        return reconstructed(keys, latents.key, latents), reconstructed(values, latents.value, latents)


# --------------------------------------------------------------------------------------------------- in the graph


def attend_buffered(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, numbers: Tensor, read: Any,
    parts: Sequence[Tensor], bases: Sequence[Tensor], *, is_causal: bool, scale: float, softcap: float,
    is_shared: bool, places: Sequence[int], key_tiers: Sequence[Sequence[Any]], value_tiers: Sequence[Sequence[Any]],
) -> Tensor:  # fmt: skip
    """Attend to buffer slots and new tokens, then write the new tokens to their slots. Returns [B,H,S,E].

    query [B,H,S,D]; new key, value [B,G,S,D]; mask over the first `read` slots. numbers (T of them): for each slot, the
    new token that goes into it, counted from 1, or 0. parts: of `BufferSlots`, updated in place. bases: encode and
    decode of keys, then of values. places: the sizes of `Places`.
    """
    tiers = [tuple([BitGroup(*tier) for tier in side]) for side in (key_tiers, value_tiers)]
    key_bases, value_bases = Bases(*bases[:2]), Bases(*bases[2:])
    key_side, value_side = SidePlan(bases[0], bases[1], tiers[0]), SidePlan(bases[2], bases[3], tiers[1])
    held = BufferSlots(key_side, value_side, is_shared, Places.of(places))
    held.place(key_bases, value_bases)
    held.put(parts)
    slots = arriving(numbers.flatten(), key.shape[2])
    start = torch.where(slots < 0, held.places.tokens, slots).min()
    keys, values, latents = held.read(key, value, slots, held.window.quantized_tokens(start))
    whole = whole_mask(query, mask, is_causal, read, held.places.tokens)
    output = attend(query, keys, values, latents, whole, scale=scale, softcap=softcap)
    held.write(key, value, slots)
    return output


def arriving(numbers: Tensor, count: Any) -> Tensor:
    """Invert the map from slots to new tokens (counted from 1; 0: none): the slot of each of `count` tokens, or -1."""
    slots = numbers.new_full((count + 1,), -1)
    return slots.scatter(0, numbers, torch.arange(numbers.shape[0], device=numbers.device))[1:]


def whole_mask(query: Tensor, mask: Tensor | None, is_causal: bool, read: Any, tokens: int) -> Tensor:
    """Extend a mask over the first `read` slots, or a causal one, to all `tokens` slots."""
    seen = masks.total_mask(query, query.new_zeros(()).expand(1, 1, read, 1), mask, is_causal)
    if seen is None:
        seen = torch.ones(1, read, dtype=torch.bool, device=query.device)
    if seen.shape[-1] == 1:
        seen = seen.expand(*seen.shape[:-1], read)
    unseen = seen.new_full((*seen.shape[:-1], tokens - read), False if seen.dtype == torch.bool else -math.inf)
    return torch.cat([seen, unseen], -1)
