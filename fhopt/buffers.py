"""Latents in place of the K/V buffers that a user's module keeps: what compiled graphs hold between their calls.

    register_buffer("k_cache", zeros(B, G, T, D))     the buffer    a few NaN, seen as [B,G,T,D]
                                                ->    its state     [ sinks | ring, exact | a row of codes a slot ]

The state of a pair of buffers (keys, values) is found by the identity of the tensors, so that all graphs of a module
share it, and dies with them. Tokens that the buffers hold when they come first are coded; then their memory is given
back. What reads them outside of a compiled graph gets NaN; what writes them there is found, and refused, by the next
call of a graph (until then, uncompiled code that reads what it wrote gets wrong numbers). `buffer.zero_()` forgets all
tokens, `restore` brings the memory back.

There are no counters. Each slot of a buffer has one row. A token is coded when it arrives, and the newest ones are kept
in a ring too, with their slots. A slot is read exactly where the call itself writes it, where it is a sink, or where
the ring holds it and it is not sealed (`spec.sealed_tokens` of the slots before the first that the call writes); any
other as a latent. So going back, starting again at slot 0, chunks and gaps are right. Slots that were never written are
zeros, as they are in the buffer: which slots a query sees is told by the mask.

Letters: B batch, H query heads, G kv heads, S new tokens, T slots of a buffer, D head size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fhopt import ops
from fhopt.errors import FhoptError, Stale
from fhopt.latents import SideRows, StaticLatents, attend, rebuilt
from fhopt.passes.latent_buffers import Held, Places
from fhopt.spec import SidePlan, SitePlan, Tier
from fhopt.storage import Bases, StaticRows, StaticTokens, Store, Window, place_bases

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
        return rebuilt(keys, latents.key, latents), rebuilt(values, latents.value, latents)


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
    seen = ops.total_mask(query, query.new_zeros(()).expand(1, 1, read, 1), mask, is_causal)
    if seen is None:
        seen = torch.ones(1, read, dtype=torch.bool, device=query.device)
    if seen.shape[-1] == 1:
        seen = seen.expand(*seen.shape[:-1], read)
    unseen = seen.new_full((*seen.shape[:-1], tokens - read), False if seen.dtype == torch.bool else -math.inf)
    return torch.cat([seen, unseen], -1)


# --------------------------------------------------------------------------------------------------- between calls


class State:
    """What stands for one pair of buffers."""

    def __init__(self, held: Held, keys: Tensor, values: Tensor) -> None:
        self.held, self.values = held, weakref.ref(values)
        site, like = held.site, held.in_order(keys, values)
        self.slots = Slots(site.key, site.value, site.is_shared, held.places)
        self.slots.place(place_bases(site.key, like[0]), place_bases(site.value, like[1]))
        self.slots.start(*like)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, sinks and ring."""
        return sum(part.nbytes for part in self.slots.parts)

    def is_for(self, held: Held, values: Tensor) -> bool:
        """True when it stands for these values, in the same places and by the same plan."""
        alike = (held.places, held.key_axes, held.value_axes) == (
            self.held.places, self.held.key_axes, self.held.value_axes,
        )  # fmt: skip
        return alike and self.values() is values and _is_same(held.site, self.held.site)


_states = WeakTensorKeyDictionary()  # keys' buffer -> State


def state_of(keys: Tensor) -> State | None:
    """The state that stands for a buffer of keys, None when it still holds its tokens itself."""
    state: State | None = _states.get(keys)
    return state


def blank(held: Held, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Parts of `Slots` for such buffers, without tokens."""
    with torch.inference_mode(False), torch.no_grad():
        return State(held, keys, values).slots.parts


def parts(held: Held, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """What stands for these buffers, which are taken over when they come first or have new contents.

    Raises Stale for buffers that cannot be taken over, FhoptError when their tokens are lost.
    """
    for buffer in (keys, values):
        if reason := unfit(buffer):
            raise Stale(f"a buffer of {held.site.site.name} {reason}")
    with torch.inference_mode(False), torch.no_grad():
        state = state_of(keys)
        contents = {_content(held.site, buffer) for buffer in (keys, values)}
        if contents == {"released"}:
            return _known(state, held, values).slots.parts
        if "released" in contents:
            raise _lost(held.site, "of its two buffers only one was filled anew")
        if state is None or not state.is_for(held, values):
            state = _states[keys] = State(held, keys, values)
        if "tokens" in contents:
            state.slots.fill(*held.in_order(keys, values))
        else:
            state.slots.clear()
        release(keys)
        release(values)
        return state.slots.parts


def restore(tensors: Iterable[Any]) -> None:
    """Give buffers among these their memory back, with what their states kept of the tokens."""
    given = {id(x): x for x in tensors if isinstance(x, Tensor)}
    with torch.inference_mode(False), torch.no_grad():
        for keys in given.values():
            state = state_of(keys)
            if state is None or (values := state.values()) is None or not (is_released(keys) and is_released(values)):
                continue
            rebuilt = state.held.in_place(*state.slots.rebuild())
            for buffer, x in zip((keys, values), rebuilt, strict=True):
                whole = x.to(buffer.dtype).contiguous()
                buffer.set_(whole.untyped_storage(), 0, whole.shape, whole.stride())
            del _states[keys]


def unfit(buffer: Tensor) -> str:
    """Why the memory of a buffer cannot be given back, "" where it can."""
    if buffer.is_inference():
        return "was made in inference mode: nobody can tell when it changes"
    if buffer.requires_grad:
        return "needs a gradient"
    is_whole = is_released(buffer) or buffer.untyped_storage().nbytes() == buffer.nbytes
    return "" if is_whole and not buffer._is_view() else "has no memory of its own: it is a view of other tensors"


def release(buffer: Tensor) -> None:
    """Give the memory of a buffer back: its elements share a few numbers, which are NaN.

    All strides are 1. With strides of 0 eager writes of slices would raise, but Dynamo could not trace them either.
    """
    few = sum(buffer.shape) - buffer.dim() + 1
    buffer.set_(buffer.new_full((few,), math.nan).untyped_storage(), 0, buffer.shape, (1,) * buffer.dim())


def is_released(buffer: Tensor) -> bool:
    """True for a buffer that has given its memory back."""
    if buffer.layout is not torch.strided or buffer.is_nested or buffer.dim() < 2:
        return False
    return set(buffer.stride()) == {1} and buffer.untyped_storage().nbytes() < buffer.nbytes


def _content(site: SitePlan, buffer: Tensor) -> str:
    """ "released", "zeros" or "tokens". Raises FhoptError for what is neither."""
    gone = is_released(buffer)
    numbers = buffer.as_strided((sum(buffer.shape) - buffer.dim() + 1,), (1,)) if gone else buffer
    if not bool(numbers.any()):  # NaN is true
        return "zeros"
    nothing = numbers.isnan()
    if gone and bool(nothing.all()):
        return "released"
    if gone:
        raise _lost(site, "its buffer was written outside of a compiled graph")
    if bool(nothing.any()):
        raise _lost(site, "its buffer holds NaN, as a copy of a buffer does that gave its memory back")
    return "tokens"


def _known(state: State | None, held: Held, values: Tensor) -> State:
    if state is None:
        raise _lost(held.site, "its buffer is a copy of one that gave its memory back")
    if not state.is_for(held, values):
        raise _lost(held.site, "its buffers hold latents of another plan")
    return state


def _lost(site: SitePlan, reason: str) -> FhoptError:
    return FhoptError(
        f"{site.site.name}: the tokens in its cache are lost, {reason}. Start again with buffers of zeros "
        "(`buffer.zero_()`, of keys and of values), and compile everything that writes or reads them."
    )


def _is_same(a: SitePlan, b: SitePlan) -> bool:
    """True for the same plan of a site, also when it was loaded twice."""
    return a is b or (
        a.layout == b.layout
        and a.site.name == b.site.name
        and all(
            x.tiers == y.tiers and torch.equal(x.encode, y.encode) and torch.equal(x.decode, y.decode)
            for x, y in ((a.key, b.key), (a.value, b.value))
        )
    )
