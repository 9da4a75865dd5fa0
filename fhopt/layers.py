"""Layers of a `LatentCache`.

    LatentLayer         [ sinks, exact | sealed blocks of latents | open window, exact or 8-bit ], growing
    StaticLatentLayer   the same in places of fixed number, for torch.compile and CUDA graphs
    CrossLatentLayer    latents of everything that a decoder reads of its encoder

An `update` appends to the window; when the window holds `recent + block` tokens, its oldest block is encoded, packed
and sealed. Tokens of the call itself are always exact to each other; with `window_bits` 8 they are rounded, once, when
the call has read them, so later calls see them in 8 bits. Where a plan has one latent for keys and values (layout
"input"), its rows are stored once.

With `absorb=True` layers give `LatentTensor`s, on which attention runs without anything of full length
(fhopt/attention.py); with `absorb=False` ordinary tensors of full length, rebuilt in every call.

Where the plan lets a site choose pages, a sketch of each row lies beside it, and what a layer gives says how attention
is to choose (fhopt/pages.py).

A static layer codes a token when it arrives and keeps it in the ring too; how many rows are read as latents, and which
of the ring's places are read, is told by two numbers on the device. So an update is the same operations at any length.

Letters: B batch, G kv heads, S new tokens, N open tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fhopt import ops
from fhopt.attention import Reader, offer
from fhopt.errors import FhoptError
from fhopt.latents import AnyLatents, Latents, SideRows, StaticLatents, mean_values, rebuilt
from fhopt.pages import SAMPLE, PageIndex, Sketcher, log_fill
from fhopt.spec import LatentPlan, SidePlan, SitePlan, sealed_tokens
from fhopt.storage import (
    OpenTokens,
    RoundedTokens,
    SealedRows,
    Sketches,
    StaticRows,
    StaticSketches,
    StaticTokens,
    Store,
    Window,
    place_bases,
)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What the layers share: the checks, the stores and everything that moves whole sequences."""

    is_sliding = False
    is_croppable = True
    site: SitePlan
    key_rows: SealedRows
    value_rows: SealedRows  # those of the keys, where one latent serves both
    sketches: Sketches | None = None  # where the plan lets the site choose pages
    lists: Tensor  # see `PageIndex.counters`, where it does
    stores: dict[str, Store]  # by region and side

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool) -> None:
        # Without the parent's `__init__`, which sets `keys` and `values`: here they are properties.
        self.plan, self.site, self.absorb = plan, site, absorb
        self.reader = Reader()  # of the model that the cache is for, where a plan is applied
        self.is_initialized = False
        self.each_query = False  # of a call of several chooses pages, as it would alone
        self.observer: Callable[..., None] | None = None  # see `Latents`
        self.share, self.mass, self.lift = plan.page_share(site), plan.page_mass(site), plan.page_lift(site)
        self.fill: Tensor | None = None  # see `PageIndex`

    def _check_site(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError when the tokens do not fit the plan."""
        site = self.site.site
        found = (key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        wanted = (site.kv_heads, site.key_dim, site.kv_heads, site.value_dim)
        if found != wanted:
            raise FhoptError(
                f"{site.name}: keys and values have (heads, size) {found[:2]} and {found[2:]}, the plan expects "
                f"{wanted[:2]} and {wanted[2:]}. Is this the model that the plan was fitted for?"
            )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise FhoptError when the tokens do not fit the plan or the cache."""
        self._check_site(key_states, value_states)
        site = self.site.site
        if self.is_initialized and (key_states.dtype != self.dtype or key_states.shape[0] != self.batch_size):
            raise FhoptError(
                f"{site.name}: new tokens are {key_states.dtype} of batch {key_states.shape[0]}, the cache holds "
                f"{self.dtype} of batch {self.batch_size}. Use one cache for each batch and dtype."
            )

    def _place_bases(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fetch the bases to where the tokens are."""
        self.device, self.dtype = key_states.device, key_states.dtype
        if self.sketches is not None and self.site.sketch is not None:
            self.sketches.sketcher = Sketcher.on(self.site.sketch, self.device)
            self.lists = self.lists.to(self.device)
            self.fill = log_fill(self.plan.page_fill(self.site), self.device)
        self.key_bases = self.key_rows.bases = place_bases(self.site.key, key_states)
        self.value_bases = place_bases(self.site.value, value_states)
        if not self.site.is_shared:
            self.value_rows.bases = self.value_bases

    def _sides(self, start: int, stop: int, *windows: Window) -> tuple[SideRows, SideRows]:
        """Rows of keys and of values, as attention reads them, with the windows of both where they are rounded."""
        key, value = windows or (None, None)
        return (
            SideRows(self.key_rows.tiers, *self.key_rows.read(start, stop), self.key_bases.decode, key),
            SideRows(self.value_rows.tiers, *self.value_rows.read(start, stop), self.value_bases.decode, value),
        )

    def _use_pages(self, make: Callable[[bool], Sketches]) -> None:
        """Keep sketches where the plan lets the site choose pages; `make` is told whether there is a limit."""
        if self.plan.pages is not None and self.share < 1:
            self.sketches = self.stores["sketches"] = make(self.plan.pages.limit < 1)
            self.lists = torch.zeros(4, dtype=torch.int64)

    def _index(self, rows: int) -> PageIndex | None:
        """What pages of the first `rows` rows are chosen by; None where all are read."""
        pages, sketches = self.plan.pages, self.sketches
        if sketches is None or pages is None:
            return None
        units = math.gcd(self.site.key.groups, self.site.value.groups)
        least = -(-pages.least // pages.tokens)
        numbers = (pages.tokens, self.share, self.mass, self.lift, least, pages.limit, units)
        return PageIndex(sketches.sketcher, sketches.read(rows), *numbers, self.each_query, self.lists, self.fill)

    def _give(self, keys: Tensor, values: Tensor, latents: AnyLatents) -> tuple[Tensor, Tensor]:
        """Open keys and values with latents behind them, as the attention that follows wants them."""
        if self.absorb and (self.reader.active or not torch.compiler.is_compiling()):
            return offer(keys, values, latents, self.reader)
        return rebuilt(keys, latents.key, latents), rebuilt(values, latents.value, latents)

    # ---- what transformers asks of a layer

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first tokens."""
        return next((int(s.parts[0].shape[0]) for s in self.stores.values() if s.parts), -1)

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.each(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences `beam_idx` (beam search)."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move all tokens to the CPU."""
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tokens back to the device of the model."""
        self._each(lambda t: t.to(self.device, non_blocking=True))

    # ---- files

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, without spare room. Expects a layer with tokens."""
        used = self.sealed_rows
        parts = {
            name: [part[:, :, : _used(store, used)] for part in store.parts] for name, store in self.stores.items()
        }
        return {"parts": parts, "blank": list(self._blank()), **self._counters()}

    def restore(self, state: dict[str, Any]) -> None:
        """Hold what another layer's `state` said, on the device of its tensors.

        Raises FhoptError or ValueError when it is not the state of such a layer, which is empty then.
        """
        self.reset()
        try:
            self._check(*state["blank"])
            self.lazy_initialization(*state["blank"])
            for name, store in self.stores.items():
                self._fill(name, store, state["parts"][name])
            self._count(state)
        except Exception:
            self.reset()
            raise

    def _fill(self, name: str, store: Store, parts: list[Tensor]) -> None:
        """Put loaded parts into a store, in place where it has a fixed size. Raises ValueError."""
        is_fixed = isinstance(store, (StaticRows, StaticTokens, StaticSketches))
        wanted = list(store.parts)
        if type(store) is Sketches and parts:
            blank, key = self._blank()[0], self.site.key
            wanted = list(store.make(blank.new_zeros(blank.shape[0], key.groups, 0, key.width)))
        if type(store) is SealedRows and parts:
            _encode(self.site, *self._blank(), lambda side, x: wanted.extend(self._encoded(side, name, x)))
        for given, like in zip(parts, wanted, strict=True):
            same = given.shape == like.shape if is_fixed else _but_tokens(given) == _but_tokens(like)
            if not same or given.dtype != like.dtype:
                raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, not {like.dtype} {tuple(like.shape)}")
            if is_fixed:
                like.copy_(given)
        if not is_fixed:
            store.parts = tuple(parts)

    def _encoded(self, side: str, name: str, x: Tensor) -> tuple[Tensor, ...]:
        rows: SealedRows = getattr(self, f"{side}_rows")
        return rows.encode(x) if name == f"{side}_rows" else ()

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Keys [B,G,0,D] and values [B,G,0,E] of no tokens."""
        raise NotImplementedError

    def _counters(self) -> dict[str, Any]:
        """What tells how the parts are read."""
        raise NotImplementedError

    def _count(self, counters: dict[str, Any]) -> None:
        """The inverse of `_counters`. Raises ValueError when the parts have other tokens."""
        raise NotImplementedError

    # ---- bytes

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        return [part for store in self.stores.values() for part in store.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind the tokens: codes, scales, sinks, window, spare room."""
        return sum(self.regions().values())

    def regions(self) -> dict[str, int]:
        """Bytes of sinks, sealed rows, their sketches, window, and of spare room."""
        out = dict(sinks=0, sealed=0, index=0, window=0, spare=0)
        sealed = self.sealed_rows
        for store in self.stores.values():
            if isinstance(store, (SealedRows, Sketches)):
                used = sum(part[:, :, :sealed].nbytes for part in store.parts)
                out["sealed" if isinstance(store, SealedRows) else "index"] += used
                out["spare"] += store.nbytes - used
            elif isinstance(store, (OpenTokens, StaticTokens)):
                out["sinks"] += store.sink_bytes
                out["window"] += store.nbytes - store.sink_bytes
        return out

    @property
    def completed(self) -> float:
        """Share of the lists of pages that the plan's limit made complete."""
        lists, complete, *_ = (0, 0) if self.sketches is None else self.lists.tolist()
        return float(complete / max(1, lists))

    def step_bytes(self) -> tuple[int, int]:
        """Bytes that attention of the next token reads of the cache: (with all pages, with as large a part of them as
        it read so far on average, or the most that it may read where it has not chosen yet)."""
        held, index = self.regions(), self._index(self.sealed_rows) if self.sealed_rows else None
        every = held["sinks"] + held["sealed"] + held["window"]
        if index is None or index.most == index.count:
            return every, every
        _, _, listed, available = self.lists.tolist()
        part = listed / available if available else index.most / index.count
        sampled = 0.0 if index.fill is None else min(1.0, SAMPLE / index.count)
        return every, every - held["sealed"] + held["index"] + int(held["sealed"] * min(1.0, part + sampled))

    @property
    def sealed_rows(self) -> int:
        """Tokens that are read as latents."""
        raise NotImplementedError


class LatentLayer(_Layer):
    """A layer that grows. `sealed` tokens are latents, the others open."""

    is_compileable = False

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.key_rows, self.value_rows = _rows(site, SealedRows)
        kind = OpenTokens if plan.window_bits == 16 else RoundedTokens
        self.open_keys, self.open_values = kind(plan.sinks), kind(plan.sinks)
        self.stores = _stores(self.open_keys, self.open_values, self.key_rows, self.value_rows)
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
            rows = key.rows, key.scale, value.rows, value.scale
            tiers: Any = ops.tier_options(key.tiers, value.tiers)
            self._mean = *held, mean_values(query, *rows, None, None, index.tokens, **tiers)
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
            _encode(self.site, keys[:, :, out], values[:, :, out], self._append)
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
        _check_crop(tokens_to_remove, length)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        target = length + tokens_to_remove
        keep = min(self.sealed, max(0, target - self.plan.sinks) // self.plan.block * self.plan.block)
        if self.sealed > keep:
            for opened, side in zip((self.open_keys, self.open_values), self._sides(keep, self.sealed), strict=True):
                opened.insert(side.rebuild())
        self.open_keys.crop(target - keep)
        self.open_values.crop(target - keep)
        self.sealed = keep
        self.key_rows.trim(keep, self.plan.block)
        self.value_rows.trim(keep, self.plan.block)
        if self.sketches is not None:
            self.sketches.trim(keep, self.plan.block)


class StaticLatentLayer(_Layer):
    """A layer for `max_cache_len` tokens, with an update that is the same operations at any length."""

    is_compileable = True

    def __init__(self, plan: LatentPlan, site: SitePlan, max_cache_len: int, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.max_cache_len = max_cache_len
        self.capacity = sealed_tokens(max_cache_len, plan.sinks, plan.recent, plan.block)
        self.key_rows, self.value_rows = _rows(site, lambda side: StaticRows(side, self.capacity))
        places = (plan.sinks, plan.window, plan.window_bits)
        self.open_keys, self.open_values = StaticTokens(*places), StaticTokens(*places)
        self.stores = _stores(self.open_keys, self.open_values, self.key_rows, self.value_rows)
        self._use_pages(lambda limited: StaticSketches(limited, self.capacity))
        self.checks_room = True  # in eager mode this reads a number from the device; one layer of a cache is enough
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.sealed = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, with the shapes and dtype of the first tokens."""
        self._place_bases(key_states, value_states)
        self.open_keys.start(key_states)
        self.open_values.start(value_states)
        _encode(self.site, key_states, value_states, lambda side, x: self._rows_of(side).start(x))
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
        _encode(self.site, key_states, value_states, lambda side, x: self._rows_of(side).write(x, in_rows))
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
        _check_crop(tokens_to_remove, int(self.cumulative_length))
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


class CrossLatentLayer(_Layer):
    """Keys and values that a decoder reads of its encoder: all of them as latents, written once.

    The first call attends to them exactly. Shapes do not change from step to step, so that it serves static caches too.
    """

    is_compileable = True

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.key_rows, self.value_rows = _rows(site, SealedRows)
        self.stores = _stores(None, None, self.key_rows, self.value_rows)
        self.count = 0
        self.shapes: tuple[Tensor, Tensor] | None = None  # no tokens, of the shapes and dtype of keys and values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember shapes and dtype."""
        self._place_bases(key_states, value_states)
        self.shapes = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep k, v [B,G,T,D] as latents; returns them as they came.

        Raises FhoptError, and changes nothing, when they do not fit the plan or the layer is full.
        """
        self._check(key_states, value_states)
        if self.count:
            raise FhoptError(
                f"{self.site.site.name}: the cross attention cache holds {self.count} tokens and does not grow. "
                "Call reset(), or use one cache for each input."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _encode(self.site, key_states, value_states, self._append)
        self.count = key_states.shape[2]
        return key_states, value_states

    def _append(self, side: str, x: Tensor) -> None:
        (self.key_rows if side == "key" else self.value_rows).seal(x, 0, 1)

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,T,D] as attention reads them, None before they came."""
        return self._read()[0]

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,T,E] as attention reads them, None before they came."""
        pending, self.reader.pending = self.reader.pending, False  # the keys were read before, and count
        values = self._read()[1]
        self.reader.pending = pending
        return values

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.count:
            return None, None
        keys, values = self._blank()
        return self._give(keys, values, Latents(*self._sides(0, self.count), 0, self.count))

    def _blank(self) -> tuple[Tensor, Tensor]:
        assert self.shapes is not None
        keys, values = [x[:1].expand(self.batch_size if self.count else x.shape[0], -1, -1, -1) for x in self.shapes]
        return keys, values

    def _counters(self) -> dict[str, Any]:
        return {"count": self.count}

    def _count(self, counters: dict[str, Any]) -> None:
        self.count = int(counters["count"])
        if {part.shape[2] for store in self.stores.values() for part in store.parts} != {self.count}:
            raise ValueError(f"rows for other than {self.count} tokens")

    @property
    def sealed_rows(self) -> int:
        """Tokens that are read as latents."""
        return self.count

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask."""
        return self.count, 0

    def get_max_length(self) -> int:
        """-1: as many as the encoder gives."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        for store in self.stores.values():
            store.parts = ()
        self.count, self.is_initialized, self.shapes = 0, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: a decoder that goes back reads the same encoder."""


def _rows(site: SitePlan, make: Callable[[SidePlan], Any]) -> tuple[Any, Any]:
    """Rows of keys and of values, the same where one latent serves both."""
    rows = make(site.key)
    return rows, rows if site.is_shared else make(site.value)


def _stores(keys: Store | None, values: Store | None, key_rows: Store, value_rows: Store) -> dict[str, Store]:
    """Everything that holds tokens, each once."""
    named = {"open_keys": keys, "open_values": values, "key_rows": key_rows, "value_rows": value_rows}
    if value_rows is key_rows:
        del named["value_rows"]
    return {name: store for name, store in named.items() if store is not None}


def _encode(site: SitePlan, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None]) -> None:
    """Hand what each encoder reads to `use(side, x)`: keys and values, or both side by side."""
    if site.gather is not None:
        keys, values = site.gather(keys, values)
    if site.is_shared:
        return use("key", torch.cat([keys, values], -1))
    use("key", keys)
    return use("value", values)


def _used(store: Store, sealed: int) -> int | None:
    """How much of a store that grows stands for `sealed` tokens; None: all of any other."""
    return sealed if type(store) in (SealedRows, Sketches) else None


def _but_tokens(x: Tensor) -> tuple[int, ...]:
    """The shape without the dimension of tokens."""
    return (*x.shape[:2], *x.shape[3:])


def _check_crop(tokens_to_remove: int, length: int) -> None:
    if tokens_to_remove > 0 or -tokens_to_remove > length:
        raise FhoptError(f"crop({tokens_to_remove}) of {length} tokens; expected a number from -{length} to 0.")
