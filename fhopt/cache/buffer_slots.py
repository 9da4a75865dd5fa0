"""Slots of a module's K/V buffer held as latents, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import SideRows, StaticLatents
from fhopt.attention.manual_attention import reconstructed
from fhopt.cache.quantized_rows import StaticRows
from fhopt.cache.residual_window import StaticTokens
from fhopt.cache.store import Bases, Store, Window
from fhopt.ops import masks
from fhopt.plan.module_buffer import Places
from fhopt.plan.site_plan import SidePlan, Tier

CHUNK = 1024  # slots that are coded at a time


# --------------------------------------------------------------------------------------------------- tokens in slots


class Slots:
    """The tokens of one pair of buffers. `ring` [window]: slot of the token in each place of the ring, or -1."""

    ring: Tensor
    key_bases: Bases
    value_bases: Bases

    def __init__(self, key: SidePlan, value: SidePlan, is_shared: bool, places: Places) -> None:
        self.key, self.value, self.is_shared, self.places = key, value, is_shared, places
        kept = (places.sinks, places.window, places.window_bits)
        self.open_keys, self.open_values = StaticTokens(*kept), StaticTokens(*kept)
        self.key_rows = StaticRows(key, places.rows)
        self.value_rows = self.key_rows if is_shared else StaticRows(value, places.rows)

    @property
    def stores(self) -> list[Store]:
        """Everything that holds tokens, each once."""
        rows: list[Store] = [self.key_rows] if self.is_shared else [self.key_rows, self.value_rows]
        return [self.open_keys, self.open_values, *rows]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Every tensor, in a fixed order."""
        return (*(part for store in self.stores for part in store.parts), self.ring)

    def put(self, parts: Sequence[Tensor]) -> None:
        """The inverse of `parts`."""
        given = iter(parts)
        for store in self.stores:
            store.parts = tuple([next(given) for _ in range(self._count(store))])
        self.ring = next(given)

    def _count(self, store: Store) -> int:
        """How many tensors a store has."""
        if isinstance(store, StaticRows):
            return 2 if store.plan.tiers else 1
        return 2 if self.places.window_bits == 16 else 3

    def place(self, key_bases: Bases, value_bases: Bases) -> None:
        """Take the bases from there."""
        self.key_bases = self.key_rows.bases = key_bases
        self.value_bases = value_bases
        if not self.is_shared:
            self.value_rows.bases = value_bases

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Hold zeros in all slots, of the shape and dtype of keys and values [B,G,T,D]."""
        self.open_keys.start(keys)
        self.open_values.start(values)
        for rows, x in self._coded(keys[:, :, :0], values[:, :, :0]):
            rows.start(x)
        self.ring = torch.full((self.places.window,), -1, device=keys.device)

    def clear(self) -> None:
        """Hold zeros in all slots again."""
        for part in self.parts:
            part.zero_()
        self.ring.fill_(-1)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Hold keys and values [B,G,T,D]: the sinks exactly, all others as latents."""
        first = torch.arange(self.places.sinks, device=keys.device)
        for opened, x in ((self.open_keys, keys), (self.open_values, values)):
            opened.write(x[:, :, : len(first)], first, torch.full_like(first, self.places.window))
        for start in range(len(first), self.places.tokens, CHUNK):
            part = slice(start, start + CHUNK)
            for rows, x in self._coded(keys[:, :, part], values[:, :, part]):
                rows.write(x, torch.arange(x.shape[2], device=x.device) + (start - len(first)))
        self.ring.fill_(-1)

    def _coded(self, keys: Tensor, values: Tensor) -> list[tuple[StaticRows, Tensor]]:
        """What each encoder reads: keys and values, or both side by side."""
        if self.is_shared:
            return [(self.key_rows, torch.cat([keys, values], -1))]
        return [(self.key_rows, keys), (self.value_rows, values)]

    def read(self, key: Tensor, value: Tensor, slots: Tensor, sealed: Tensor) -> tuple[Tensor, Tensor, StaticLatents]:
        """(open keys, open values, latents), with new tokens [B,G,S,D] that go into `slots` [S], -1 for none.

        sealed: how many slots behind the sinks are not read from the ring.
        """
        places, written = self.places, self._marked(slots)
        first = torch.arange(places.sinks, device=slots.device)
        is_open = (self.ring >= places.sinks + sealed) & ~written[self.ring]
        held = torch.where(written[: places.sinks], -1, first), torch.where(is_open, self.ring, -1)
        positions = torch.cat([*held, slots])
        seen = ~self._marked(positions)[places.sinks : -1]
        keys, key_window = self.open_keys.give(key)
        values, value_window = self.open_values.give(value)
        sides = self._sides(key_window, value_window)
        return keys, values, StaticLatents(*sides, places.sinks, positions, seen, places.tokens)

    def _marked(self, slots: Tensor) -> Tensor:
        """Bool [T + 1]: which slots are among these; of -1, the last is."""
        marks = torch.zeros(self.places.tokens + 1, dtype=torch.bool, device=slots.device)
        return marks.index_fill(0, torch.where(slots < 0, self.places.tokens, slots), True)

    def _sides(self, key: Window, value: Window) -> tuple[SideRows, SideRows]:
        rows = self.places.rows
        return (
            SideRows(self.key_rows.tiers, *self.key_rows.read(0, rows), self.key_bases.decode, key),
            SideRows(self.value_rows.tiers, *self.value_rows.read(0, rows), self.value_bases.decode, value),
        )

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put new tokens [B,G,S,D] into their slots [S]: the sinks, or a row and, the newest ones, the ring."""
        places = self.places
        behind = slots - places.sinks
        is_kept = (behind >= 0) & (slots > slots.max() - places.window)
        in_sinks = torch.where((slots >= 0) & (behind < 0), slots, places.sinks)
        in_ring = torch.where(is_kept, behind % places.window, places.window)
        in_rows = torch.where(behind >= 0, behind, places.rows)
        self.open_keys.write(key, in_sinks, in_ring)
        self.open_values.write(value, in_sinks, in_ring)
        for rows, x in self._coded(key, value):
            rows.write(x, in_rows)
        kept = torch.where(self._marked(slots)[self.ring], -1, self.ring)  # what was overwritten is in the ring no more
        self.ring.copy_(F.pad(kept, (0, 1)).index_copy(0, in_ring, slots)[:-1])

    def rebuild(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B,G,T,D] of all slots: what is left of them."""
        key, value = (opened.parts[0][:, :, :0] for opened in (self.open_keys, self.open_values))
        keys, values, latents = self.read(key, value, self.ring[:0], self.ring.new_zeros(()))
        return reconstructed(keys, latents.key, latents), reconstructed(values, latents.value, latents)


# --------------------------------------------------------------------------------------------------- in the graph


def attend_buffered(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, numbers: Tensor, read: Any,
    parts: Sequence[Tensor], bases: Sequence[Tensor], *, is_causal: bool, scale: float, softcap: float,
    is_shared: bool, places: Sequence[int], key_tiers: Sequence[Sequence[Any]], value_tiers: Sequence[Sequence[Any]],
) -> Tensor:  # fmt: skip
    """Attention over the slots of a buffer and new tokens, which are then put into their slots. -> [B,H,S,E].

    query [B,H,S,D], new key, value [B,G,S,D]; mask over the first `read` slots. numbers (T of them): which of the new
    tokens, counted from 1, goes into each slot, 0 for none. parts: of `Slots`, changed in place. bases: encode and
    decode of keys, then of values.
    """
    tiers = [tuple([Tier(*tier) for tier in side]) for side in (key_tiers, value_tiers)]
    key_bases, value_bases = Bases(*bases[:2]), Bases(*bases[2:])
    key_side, value_side = SidePlan(bases[0], bases[1], tiers[0]), SidePlan(bases[2], bases[3], tiers[1])
    held = Slots(key_side, value_side, is_shared, Places(*places))
    held.place(key_bases, value_bases)
    held.put(parts)
    slots = arriving(numbers.flatten(), key.shape[2])
    start = torch.where(slots < 0, held.places.tokens, slots).min()
    keys, values, latents = held.read(key, value, slots, held.places.sealed(start))
    whole = whole_mask(query, mask, is_causal, read, held.places.tokens)
    output = attend(query, keys, values, latents, whole, scale=scale, softcap=softcap)
    held.write(key, value, slots)
    return output


def arriving(numbers: Tensor, count: Any) -> Tensor:
    """Slot of each of `count` new tokens, -1 where it has none, from the token's number in each slot (0: none)."""
    slots = numbers.new_full((count + 1,), -1)
    return slots.scatter(0, numbers, torch.arange(numbers.shape[0], device=numbers.device))[1:]


def whole_mask(query: Tensor, mask: Tensor | None, is_causal: bool, read: Any, tokens: int) -> Tensor:
    """A mask over all `tokens` slots, from what says which of the first `read` ones are seen."""
    seen = masks.total_mask(query, query.new_zeros(()).expand(1, 1, read, 1), mask, is_causal)
    if seen is None:
        seen = torch.ones(1, read, dtype=torch.bool, device=query.device)
    if seen.shape[-1] == 1:
        seen = seen.expand(*seen.shape[:-1], read)
    unseen = seen.new_full((*seen.shape[:-1], tokens - read), False if seen.dtype == torch.bool else -math.inf)
    return torch.cat([seen, unseen], -1)
