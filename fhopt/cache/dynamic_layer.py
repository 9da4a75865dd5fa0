"""The cache layer that grows with the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import Latents, SideRows
from fhopt.attention.paged import mean_values
from fhopt.attention.sketches import PageIndex
from fhopt.cache.base_layer import LatentLayerBase, check_crop, encode_sides, make_rows, named_stores
from fhopt.cache.quantized_rows import SealedRows, Sketches
from fhopt.cache.residual_window import OpenTokens, RoundedTokens
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan


class LatentLayer(LatentLayerBase):
    """A layer that grows. `sealed` tokens are latents, the others open."""

    is_compileable = False

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.key_rows, self.value_rows = make_rows(site, SealedRows)
        kind = OpenTokens if plan.window_bits == 16 else RoundedTokens
        self.open_keys, self.open_values = kind(plan.sinks), kind(plan.sinks)
        self.stores = named_stores(self.open_keys, self.open_values, self.key_rows, self.value_rows)
        self._use_pages(Sketches)
        self.sealed = 0
        self._mean: tuple[tuple[Tensor, ...], int, Tensor] | None = None  # of values, and what it is the mean of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty open parts with the shapes and dtype of the first tokens."""
        self._place_bases(key_states, value_states)
        self.open_keys.start(key_states)
        self.open_values.start(value_states)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,T,D] as attention reads them, None before the first tokens."""
        return self._read()[0]

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,T,E] as attention reads them, None before the first tokens."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.is_initialized:
            return None, None
        return self._given((), ())

    def _given(self, new_keys: tuple[Tensor, ...], new_values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What attention reads of the tokens and of new ones."""
        if not self.sealed:
            return self.open_keys.read(*new_keys), self.open_values.read(*new_values)
        keys, key_window = self.open_keys.give(*new_keys)
        values, value_window = self.open_values.give(*new_values)
        sides = self._sides(0, self.sealed, key_window, value_window)
        index = self._with_mean(self._index(self.sealed), *sides)
        return self._give(keys, values, Latents(*sides, self.plan.sinks, self.sealed, index, self.observer))

    def _with_mean(self, index: PageIndex | None, key: SideRows, value: SideRows) -> PageIndex | None:
        """The same with the mean of values, which is made anew when rows were sealed, moved or dropped."""
        if index is None or index.fill is None or index.most == index.count or torch.compiler.is_compiling():
            return index
        held = self.value_rows.parts, self.sealed
        if self._mean is None or self._mean[0] is not held[0] or self._mean[1] != held[1]:
            query = self.open_keys.parts[0].new_zeros((self.batch_size, self.site.site.heads, 1, key.decode.shape[2]))
            self._mean = *held, mean_values(query, key, value, None, None, index.tokens)
        return replace(index, mean=self._mean[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D]; returns all keys and values for attention (see the module docstring).

        Raises FhoptError, and changes nothing, when the tokens do not fit the plan or the cache.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given = self._given((key_states,), (value_states,))
        self._keep(key_states, value_states)
        return given

    def _keep(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Keep new tokens; move whole blocks that left the recent tokens into the sealed rows."""
        plan, opened = self.plan, self.open_keys.count + new_keys.shape[2]
        ready = max(0, opened - plan.sinks - plan.recent) // plan.block * plan.block
        if ready:
            out = slice(plan.sinks, plan.sinks + ready)
            keys, values = self.open_keys.read(new_keys), self.open_values.read(new_values)
            encode_sides(self.site, keys[:, :, out], values[:, :, out], self._append)
            if self.sketches is not None:
                latents = self.key_rows.latents(self.sealed, self.sealed + ready)
                self.sketches.seal(latents, self.sealed, plan.block)
            self.sealed += ready
        self.open_keys.keep(new_keys, ready)
        self.open_values.keep(new_values, ready)

    def _append(self, side: str, x: Tensor) -> None:
        (self.key_rows if side == "key" else self.value_rows).seal(x, self.sealed, self.plan.block)

    def _blank(self) -> tuple[Tensor, Tensor]:
        keys, values = self.open_keys.parts[0], self.open_values.parts[0]
        return keys[:, :, :0], values[:, :, :0]

    def _counters(self) -> dict[str, Any]:
        return {"sealed": self.sealed}

    def _count(self, counters: dict[str, Any]) -> None:
        self.sealed = int(counters["sealed"])
        stores = [s for s in self.stores.values() if isinstance(s, (SealedRows, Sketches))]
        held = {part.shape[2] for rows in stores for part in rows.parts} or {0}
        if held != {self.sealed} or self.open_keys.count != self.open_values.count:
            raise ValueError(f"{self.sealed} sealed tokens, rows for {sorted(held)}")

    @property
    def sealed_rows(self) -> int:
        """Tokens that are read as latents."""
        return self.sealed

    def get_seq_length(self) -> int:
        """Tokens held, open and sealed."""
        return self.sealed + self.open_keys.count if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: all tokens, in order of position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows without a limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        for store in self.stores.values():
            store.parts = ()
        self.sealed, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens; a block that is cut is rebuilt into the window.

        Raises FhoptError for a positive number or for more tokens than are held.
        """
        length = self.get_seq_length()
        check_crop(tokens_to_remove, length)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        target = length + tokens_to_remove
        keep = min(self.sealed, max(0, target - self.plan.sinks) // self.plan.block * self.plan.block)
        if self.sealed > keep:
            for opened, side in zip((self.open_keys, self.open_values), self._sides(keep, self.sealed), strict=True):
                opened.insert(side.reconstruct())
        self.open_keys.crop(target - keep)
        self.open_values.crop(target - keep)
        self.sealed = keep
        self.key_rows.trim(keep, self.plan.block)
        self.value_rows.trim(keep, self.plan.block)
        if self.sketches is not None:
            self.sketches.trim(keep, self.plan.block)
