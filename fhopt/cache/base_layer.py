"""Layers of a `LatentCache`.

    LatentLayer         [ sinks, exact | sealed blocks of latents | open window, exact or 8-bit ], growing
    StaticLatentLayer   the same in places of fixed number, for torch.compile and CUDA graphs
    CrossLatentLayer    latents of everything that a decoder reads of its encoder

An `update` appends to the window; when the window holds `recent + block` tokens, its oldest block is encoded, packed
and sealed. Tokens of the call itself are always exact to each other; with `window_bits` 8 they are rounded, once, when
the call has read them, so later calls see them in 8 bits. Where a plan has one latent for keys and values (layout
"input"), its rows are stored once.

With `absorb=True` layers give `LatentTensor`s, on which attention runs without anything of full length
(fhopt/attention/interface.py); with `absorb=False` ordinary tensors of full length, rebuilt in every call.

Where the plan lets a site choose pages, a sketch of each row lies beside it, and what a layer gives says how attention
is to choose (fhopt/attention/paged.py).

A static layer codes a token when it arrives and keeps it in the ring too; how many rows are read as latents, and which
of the ring's places are read, is told by two numbers on the device. So an update is the same operations at any length.

Letters: B batch, G kv heads, S new tokens, N open tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fhopt.attention.cache_view import AnyLatents, SideRows
from fhopt.attention.interface import Reader, offer
from fhopt.attention.manual_attention import reconstructed
from fhopt.attention.paged import SAMPLE, log_fill
from fhopt.attention.sketches import PageIndex, Sketcher
from fhopt.cache.quantized_rows import SealedRows, Sketches, StaticRows, StaticSketches
from fhopt.cache.residual_window import OpenTokens, StaticTokens
from fhopt.cache.store import Store, Window, place_bases
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan


class LatentLayerBase(CacheLayerMixin):  # type: ignore[misc]
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
        return reconstructed(keys, latents.key, latents), reconstructed(values, latents.value, latents)

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
            encode_sides(self.site, *self._blank(), lambda side, x: wanted.extend(self._encoded(side, name, x)))
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


def make_rows(site: SitePlan, make: Callable[[SidePlan], Any]) -> tuple[Any, Any]:
    """Rows of keys and of values, the same where one latent serves both."""
    rows = make(site.key)
    return rows, rows if site.is_shared else make(site.value)


def named_stores(keys: Store | None, values: Store | None, key_rows: Store, value_rows: Store) -> dict[str, Store]:
    """Everything that holds tokens, each once."""
    named = {"open_keys": keys, "open_values": values, "key_rows": key_rows, "value_rows": value_rows}
    if value_rows is key_rows:
        del named["value_rows"]
    return {name: store for name, store in named.items() if store is not None}


def encode_sides(site: SitePlan, keys: Tensor, values: Tensor, use: Callable[[str, Tensor], None]) -> None:
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


def check_crop(tokens_to_remove: int, length: int) -> None:
    """Check how many tokens `crop` shall remove, a number from -length to 0. Raises FhoptError."""
    if tokens_to_remove > 0 or -tokens_to_remove > length:
        raise FhoptError(f"crop({tokens_to_remove}) of {length} tokens; expected a number from -{length} to 0.")
