"""The dynamic cache layer, which grows with the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.attend import reads_at_once
from fhopt.attention.cache_view import CacheView, SideRows
from fhopt.attention.latent_tensor import LatentTensor
from fhopt.attention.paged import mean_values
from fhopt.attention.sketches import PageIndex
from fhopt.cache.base_layer import LatentLayerBase, check_crop, make_packed
from fhopt.cache.quantized_rows import LatentEnergy, PackedLatents, TokenSketches
from fhopt.cache.residual_window import RoundedWindow, growing_windows, spare_places
from fhopt.cache.store import QUANTIZED, named_stores
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan
from fhopt.plan.window import ResidualWindow


class LatentLayer(LatentLayerBase):
    """A dynamic layer: `quantized` tokens as latents, the others as attention sinks and residual window."""

    is_compileable = False

    def __init__(
        self, plan: LatentPlan, site: SitePlan, absorb: bool = True, window: ResidualWindow | None = None
    ) -> None:
        super().__init__(plan, site, absorb, window)
        self.packed_keys, self.packed_values = make_packed(site, PackedLatents)
        self.window_keys, self.window_values = growing_windows(self.window)
        self.stores = named_stores((self.window_keys, self.window_values), (self.packed_keys, self.packed_values))
        self._use_pages(TokenSketches)
        self._use_means(self.window_keys, self.window_values)
        self._use_padding()
        self.quantized = 0
        self._mean: tuple[tuple[Tensor, ...], int, Tensor] | None = None  # mean of values, after its inputs

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the shapes and dtype of the first tokens."""
        self._place_bases(key_states, value_states)
        self.window_keys.start(key_states)
        self.window_values.start(value_states)
        if self.means is not None:
            self.means.start(key_states, value_states)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,T,D] for attention; None before the first tokens."""
        return self._read()[0]

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,T,E] for attention; None before the first tokens."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.is_initialized:
            return None, None
        return self._with_new((), ())

    def _with_new(self, new_keys: tuple[Tensor, ...], new_values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return keys and values for attention: the held tokens followed by new ones."""
        order = self.padding.places
        if not self.quantized and not self._reads_window(new_keys):
            read = self.window_keys.read(*new_keys), self.window_values.read(*new_values)
            return read if order is None else (order.by_position(read[0], 2), order.by_position(read[1], 2))
        keys, rounded_keys = self.window_keys.for_attention(*new_keys)
        values, rounded_values = self.window_values.for_attention(*new_values)
        hidden = self.hidden
        sides = self._sides(hidden, self.quantized, rounded_keys, rounded_values)
        index = self._with_mean(self._index(self.quantized), *sides)
        latents = CacheView(*sides, self.window.sinks, self.quantized - hidden, index, self.observer, order=order)
        return self._for_attention(keys, values, latents)

    def _reads_window(self, new_keys: tuple[Tensor, ...]) -> bool:
        """Return whether attention should use an 8-bit window directly, before any token is quantized.

        This makes a decode step on CPU one native call from the first one on.
        """
        if len(new_keys) != 1 or new_keys[0].shape[2] != 1 or self.window.bits == 16 or self.packed_keys.is_uncoded:
            return False
        if not self.absorb or not self.reader.active or not reads_at_once(new_keys[0]):
            return False
        if not self.packed_keys.parts:  # creates it, empty, with the right shape
            self._encode(*self._blank(), self._append)
        return True

    def _with_mean(self, index: PageIndex | None, key: SideRows, value: SideRows) -> PageIndex | None:
        """Return `index` with the mean of values, recomputed if packed latents were added, moved or dropped."""
        if index is None or index.fill is None or index.most == index.count or torch.compiler.is_compiling():
            return index
        held = self.packed_values.parts, self.quantized
        if self._mean is None or self._mean[0] is not held[0] or self._mean[1] != held[1]:
            query = self.window_keys.parts[0].new_zeros((self.batch_size, self.site.site.heads, 1, key.decode.shape[2]))
            self._mean = *held, mean_values(query, key, value, None, None, index.tokens)
        return replace(index, mean=self._mean[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D] and return all keys and values for attention (see fhopt/cache/base_layer.py).

        Raises FhoptError, and changes nothing, if the tokens do not fit the plan or the cache.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        read = self._with_new((key_states,), (value_states,))
        self._take(key_states, value_states)
        return read

    def _take(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Store new tokens."""
        if self.padding.expected is not None:
            new_keys, new_values = self.padding.begin(new_keys, new_values)
        if self.means is not None:
            self.means.see(new_keys, new_values, self.get_seq_length(), self.padding)
        self._keep(new_keys, new_values)

    def _keep(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Append new tokens to the window; quantize whole blocks older than the recent tokens."""
        window = self.window
        ready = window.quantized_tokens(self.window_keys.count + new_keys.shape[2])
        if ready:
            if not self._pack_window(ready):
                keys, values = self.window_keys.oldest(ready, new_keys), self.window_values.oldest(ready, new_values)
                self._encode(keys, values, self._append, self.quantized)
            if self.sketches is not None:
                latents = self.packed_keys.unpack(self.quantized, self.quantized + ready)
                self.sketches.append(latents, self.quantized, window.block)
            self.quantized += ready
        self.window_keys.spare = self.window_values.spare = spare_places(self.quantized, window.block)
        self.window_keys.keep(new_keys, ready)
        self.window_values.keep(new_values, ready)

    def quantize_full_blocks(self) -> None:
        """Quantize full blocks of the window, as `update` does, after tokens were appended to it directly."""
        if self.window.quantized_tokens(self.window_keys.count):
            self._keep(*self._blank())

    def _pack_window(self, count: int) -> bool:
        """Quantize the oldest tokens of 8-bit windows by a native kernel; False if that is not possible."""
        if self.site.is_shared or self.site.gather is not None or torch.compiler.is_compiling():
            return False
        windows = [w for w in (self.window_keys, self.window_values) if isinstance(w, RoundedWindow)]
        rounded = [tokens for window in windows if (tokens := window.oldest_rounded(count)) is not None]
        stores = self.packed_keys, self.packed_values
        if len(rounded) < 2 or not all(store.takes_windows(self.dtype) for store in stores):
            return False
        rotation = self._rotation_now()
        turning = None if rotation is None else rotation.of_tokens(self.quantized + count)
        for store, tokens, window, turned in zip(stores, rounded, windows, (turning, None), strict=True):
            places = self.quantized, self.window.block
            if not store.append_window(tokens, window.mean, self.dtype, *places, turned):
                return False
        return True

    def _append(self, side: str, x: Tensor) -> None:
        self._packed(side).append(x, self.quantized, self.window.block)

    def _blank(self) -> tuple[Tensor, Tensor]:
        keys, values = self.window_keys.parts[0], self.window_values.parts[0]
        return keys[:, :, :0], values[:, :, :0]

    def _counters(self) -> dict[str, Any]:
        return {QUANTIZED: self.quantized}

    def _count(self, counters: dict[str, Any]) -> None:
        self.quantized = int(counters[QUANTIZED])
        stores = [s for s in self.stores.values() if isinstance(s, (PackedLatents, TokenSketches))]
        held = {part.shape[2] for store in stores for part in store.parts} or {0}
        if held != {self.quantized} or self.window_keys.count != self.window_values.count:
            raise ValueError(f"{self.quantized} quantized tokens, packed latents for {sorted(held)}")

    @property
    def quantized_tokens(self) -> int:
        """Number of tokens held as latents."""
        return self.quantized

    @property
    def hidden(self) -> int:
        """Number of oldest quantized tokens that attention skips."""
        return 0

    @property
    def held(self) -> int:
        """Number of tokens held, quantized or not."""
        return self.quantized + self.window_keys.count if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, all of which are held."""
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask: all tokens, in position order."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    def reset(self) -> None:
        """Drop all tokens."""
        for store in self.stores.values():
            store.parts = ()
        self.padding.forget()
        self.packed_keys.energy, self.packed_values.energy = LatentEnergy(), LatentEnergy()
        self.quantized, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; a cut block is dequantized into the window.

        Raises FhoptError for a positive number, or for more tokens than are held.
        """
        length = self.held
        check_crop(tokens_to_remove, length)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        target, block = length + tokens_to_remove, self.window.block
        if self.padding.parts and target < self.padding.reach:
            self._begin_again(target)
            return
        keep = min(self.quantized, max(0, target - self.window.sinks) // block * block)
        if self.quantized > keep:
            windows = self.window_keys, self.window_values
            for window, side in zip(windows, self._sides(keep, self.quantized), strict=True):
                window.insert(side.reconstruct())
        self.window_keys.crop(target - keep)
        self.window_values.crop(target - keep)
        self.quantized = keep
        self.packed_keys.trim(keep, block)
        self.packed_values.trim(keep, block)
        if self.sketches is not None:
            self.sketches.trim(keep, block)

    def _begin_again(self, tokens: int) -> None:
        """Reinsert the first `tokens` tokens, dequantized: padding has changed their slots."""
        keys, values = self._reconstructed()
        self._hold_nothing()
        self.padding.shorten(self.window.sinks, tokens)
        self._take(keys[:, :, :tokens], values[:, :, :tokens])

    def _reconstructed(self) -> tuple[Tensor, Tensor]:
        """Return the keys [B,G,T,D] and values [B,G,T,E] that attention uses, in position order."""
        keys, values = [x.reconstruct() if isinstance(x, LatentTensor) else x for x in self._with_new((), ())]
        return keys, values

    def _hold_nothing(self) -> None:
        """Drop the held tokens, but not means and padding."""
        blank = self._blank()
        self.quantized, self.packed_keys.parts, self.packed_values.parts = 0, (), ()
        if self.sketches is not None:
            self.sketches.parts = ()
        for window, like in zip((self.window_keys, self.window_values), blank, strict=True):
            window.start(like)
