"""The cache layer of fixed size, for compiled decode steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import StaticLatents
from fhopt.cache.base_layer import LatentLayerBase, check_crop, encode_sides, make_rows, named_stores
from fhopt.cache.quantized_rows import StaticRows, StaticSketches
from fhopt.cache.residual_window import StaticTokens
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan
from fhopt.plan.window import sealed_tokens


class StaticLatentLayer(LatentLayerBase):
    """A layer for `max_cache_len` tokens, with an update that is the same operations at any length."""

    is_compileable = True

    def __init__(self, plan: LatentPlan, site: SitePlan, max_cache_len: int, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.max_cache_len = max_cache_len
        self.capacity = sealed_tokens(max_cache_len, plan.sinks, plan.recent, plan.block)
        self.key_rows, self.value_rows = make_rows(site, lambda side: StaticRows(side, self.capacity))
        places = (plan.sinks, plan.window, plan.window_bits)
        self.open_keys, self.open_values = StaticTokens(*places), StaticTokens(*places)
        self.stores = named_stores(self.open_keys, self.open_values, self.key_rows, self.value_rows)
        self._use_pages(lambda limited: StaticSketches(limited, self.capacity))
        self.checks_room = True  # in eager mode this reads a number from the device; one layer of a cache is enough
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.sealed = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, with the shapes and dtype of the first tokens."""
        self._place_bases(key_states, value_states)
        self.open_keys.start(key_states)
        self.open_values.start(value_states)
        encode_sides(self.site, key_states, value_states, lambda side, x: self._rows_of(side).start(x))
        if isinstance(self.sketches, StaticSketches):
            self.sketches.start(self.key_rows.latents(0, 0))
        self.cumulative_length, self.sealed = self.cumulative_length.to(self.device), self.sealed.to(self.device)
        if not torch.compiler.is_compiling():
            counters = (self.cumulative_length, self.sealed, *([] if self.sketches is None else [self.lists]))
            for tensor in (*self.tensors, *counters):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _rows_of(self, side: str) -> StaticRows:
        rows = self.key_rows if side == "key" else self.value_rows
        assert isinstance(rows, StaticRows)
        return rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D]; returns what attention reads: where it can, the new tokens alone in the first call.

        Raises FhoptError, and changes nothing, when the tokens do not fit the plan or the cache. In a compiled graph
        too many tokens raise RuntimeError.
        """
        self._check_site(key_states, value_states)
        self._fit_again(key_states)
        self._check(key_states, value_states)
        self._check_room(key_states.shape[2])
        is_first = not self.is_initialized
        if is_first:
            self.lazy_initialization(key_states, value_states)
        is_alone = is_first and self.reader.active
        given = (key_states, value_states) if is_alone else self._give(*self._read(key_states, value_states))
        self._write(key_states, value_states)
        return given

    def _fit_again(self, key_states: Tensor) -> None:
        """An empty layer takes another batch, dtype or device: its memory is reserved anew."""
        if not self.is_initialized or torch.compiler.is_compiling():
            return
        same = (self.batch_size, self.dtype, self.device) == (key_states.shape[0], key_states.dtype, key_states.device)
        if not same and int(self.cumulative_length) == 0:
            self.is_initialized = False

    def _check_room(self, new: int) -> None:
        message = f"{self.site.site.name}: a static cache of {self.max_cache_len} tokens cannot take {new} more"
        if torch.compiler.is_compiling():
            torch._assert_async(self.cumulative_length + new <= self.max_cache_len, message)
        elif self.checks_room and (held := int(self.cumulative_length)) + new > self.max_cache_len:
            raise FhoptError(f"{message}, it holds {held}. Make it longer (max_cache_len), or crop or reset it.")

    def _read(self, *new: Tensor) -> tuple[Tensor, Tensor, StaticLatents]:
        """(open keys, open values, latents), the `new` tokens (keys, values) behind."""
        key, value = new or (None, None)
        keys, key_window = self.open_keys.give(*([] if key is None else [key]))
        values, value_window = self.open_values.give(*([] if value is None else [value]))
        positions = self._positions()
        if key is not None:
            arriving = torch.arange(key.shape[2], device=self.device) + self.cumulative_length
            positions = torch.cat([positions, arriving])
        sides = self._sides(0, self.capacity, key_window, value_window)
        sealed = self.sealed.clone()  # what `_write` changes later
        index = self._index(self.capacity)
        return keys, values, StaticLatents(*sides, self.plan.sinks, positions, sealed, self.max_cache_len, index)

    def _positions(self) -> Tensor:
        """Of the token in each open place [sinks + window], -1 where there is none."""
        sinks, window = self.plan.sinks, self.plan.window
        first = torch.arange(sinks, device=self.device)
        first = torch.where(first < self.cumulative_length, first, -1)
        place, newest = torch.arange(window, device=self.device), self.cumulative_length - sinks - 1
        rest = newest - (newest - place) % window  # the newest token whose place this is, counted behind the sinks
        return torch.cat([first, torch.where(rest >= self.sealed, rest + sinks, -1)])

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put new tokens into their places, and their codes into their rows."""
        plan, count = self.plan, key_states.shape[2]
        index = torch.arange(count, device=self.device)
        behind = index + self.cumulative_length - plan.sinks  # the sinks
        in_sinks = torch.where(behind < 0, behind + plan.sinks, plan.sinks)
        is_kept = (behind >= 0) & (index >= count - plan.window)
        in_ring = torch.where(is_kept, behind % plan.window, plan.window)
        in_rows = torch.where((behind >= 0) & (behind < self.capacity), behind, self.capacity)
        self.open_keys.write(key_states, in_sinks, in_ring)
        self.open_values.write(value_states, in_sinks, in_ring)
        encode_sides(self.site, key_states, value_states, lambda side, x: self._rows_of(side).write(x, in_rows))
        if isinstance(self.sketches, StaticSketches):
            self.sketches.write(self._rows_of("key").gather(in_rows), in_rows)
        self.cumulative_length.add_(count)
        ready = (self.cumulative_length - plan.sinks - plan.recent).clamp(min=0) // plan.block * plan.block
        self.sealed.copy_(torch.maximum(self.sealed, ready))

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,max_cache_len,D] as attention reads them, None before the first tokens."""
        return self._give(*self._read())[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,max_cache_len,E] as attention reads them, None before the first tokens."""
        return self._give(*self._read())[1] if self.is_initialized else None

    def _blank(self) -> tuple[Tensor, Tensor]:
        keys, values = self.open_keys.parts[0], self.open_values.parts[0]
        return keys[:, :, :0], values[:, :, :0]

    def _counters(self) -> dict[str, Any]:
        return {"cumulative_length": int(self.cumulative_length), "sealed": int(self.sealed)}

    def _count(self, counters: dict[str, Any]) -> None:
        length, sealed = int(counters["cumulative_length"]), int(counters["sealed"])
        if not (0 <= length <= self.max_cache_len and 0 <= sealed <= self.capacity):
            raise ValueError(f"{length} tokens, {sealed} of them sealed")
        self.cumulative_length.fill_(length)
        self.sealed.fill_(sealed)

    @property
    def sealed_rows(self) -> int:
        """Tokens that are read as latents."""
        return int(self.sealed)

    def get_seq_length(self) -> int | Tensor:
        """Tokens held, as a number on the device that the next update changes; 0 before the first tokens."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: all places."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Tokens that fit in."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens; the memory stays where it is."""
        self._each(lambda t: t.zero_())
        self.cumulative_length.zero_()
        self.sealed.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; what the ring no longer holds is read as latents.

        Raises FhoptError for a positive number or for more tokens than are held.
        """
        check_crop(tokens_to_remove, int(self.cumulative_length))
        behind = self.cumulative_length - self.plan.sinks
        oldest = torch.maximum(self.sealed, behind - self.plan.window)  # in the ring
        self.sealed.copy_(torch.minimum(oldest, behind + tokens_to_remove).clamp(min=0))
        self.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences `beam_idx` (beam search), in place where their number stays."""
        if beam_idx.shape[0] != self.batch_size:
            super().reorder_cache(beam_idx)
        else:
            for part in self.tensors:
                part.copy_(part.index_select(0, beam_idx.to(part.device)))
