"""Latents instead of the K/V buffers of a user's module: state of compiled graphs between calls.

    register_buffer("k_cache", zeros(B, G, T, D))     the buffer    a few NaN, viewed as [B,G,T,D]
                                                ->    its state     [ sinks | ring | a packed latent per slot ]

The state of a pair of buffers (keys, values) is looked up by tensor identity: all graphs of a module share it, and it
is freed with the tensors. Tokens already in the buffers are quantized at first use; then the buffer memory is released.
Code that loads the buffers outside of a compiled graph gets NaN. A write there is detected and rejected by the next
call of a graph; until then, uncompiled code that loads what it wrote gets wrong values. `buffer.zero_()` drops all
tokens; `restore` brings the memory back.

There are no counters. Each buffer slot has one packed latent. A token is quantized on arrival, and the newest ones are
also stored in a ring with their slots. A slot is attended exactly if the call itself writes it, if it is an attention
sink, or if it is in the ring and not quantized (`ResidualWindow.quantized_tokens` of the slots before the first one
that the call writes); otherwise as a latent. So going back, restarting at slot 0, chunked prefill and gaps are correct.
Slots that were never written are zeros, as in the buffer: the mask says which slots a query sees.

Letters: B batch, H query heads, G kv heads, S new tokens, T slots of a buffer, D head size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fhopt.cache.buffer_slots import BufferSlots, attend_buffered
from fhopt.cache.store import place_bases
from fhopt.errors import FhoptError, Stale
from fhopt.plan.module_buffer import BufferPair
from fhopt.plan.site_plan import SitePlan

# --------------------------------------------------------------------------------------------------- between calls


class BufferState:
    """State that replaces one pair of buffers."""

    def __init__(self, held: BufferPair, keys: Tensor, values: Tensor) -> None:
        self.held, self.values = held, weakref.ref(values)
        site, like = held.site, held.in_order(keys, values)
        self.slots = BufferSlots(site.key, site.value, site.is_shared, held.places)
        self.slots.place(place_bases(site.key, like[0]), place_bases(site.value, like[1]))
        self.slots.start(*like)

    @property
    def nbytes(self) -> int:
        """Bytes of quantized values, scales, sinks and ring."""
        return sum(part.nbytes for part in self.slots.parts)

    def is_for(self, held: BufferPair, values: Tensor) -> bool:
        """Return whether the state is for these values, with the same slots and plan."""
        alike = (held.places, held.key_axes, held.value_axes) == (
            self.held.places, self.held.key_axes, self.held.value_axes,
        )  # fmt: skip
        return alike and self.values() is values and _is_same(held.site, self.held.site)


_states = WeakTensorKeyDictionary()  # keys' buffer -> State


def state_of(keys: Tensor) -> BufferState | None:
    """Return the state that replaces a buffer of keys; None if the buffer holds its tokens itself."""
    state: BufferState | None = _states.get(keys)
    return state


def blank(held: BufferPair, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return parts of `BufferSlots` for such buffers, without tokens."""
    with torch.inference_mode(False), torch.no_grad():
        return BufferState(held, keys, values).slots.parts


def parts(held: BufferPair, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return the parts that replace these buffers, taking the buffers over if they or their contents are new.

    Raises Stale for buffers that cannot be taken over, FhoptError if their tokens are lost.
    """
    for buffer in (keys, values):
        if reason := why_kept(buffer):
            raise Stale(f"a buffer of {held.site.site.name} {reason}")
    with torch.inference_mode(False), torch.no_grad():
        state = state_of(keys)
        contents = {_content(held.site, buffer) for buffer in (keys, values)}
        if contents == {"released"}:
            return _known(state, held, values).slots.parts
        if "released" in contents:
            raise _lost(held.site, "only one of its two buffers was refilled")
        if state is None or not state.is_for(held, values):
            state = _states[keys] = BufferState(held, keys, values)
        if "tokens" in contents:
            state.slots.fill(*held.in_order(keys, values))
        else:
            state.slots.clear()
        release(keys)
        release(values)
        return state.slots.parts


def restore(tensors: Iterable[Any]) -> None:
    """Bring back the memory of the buffers among `tensors`, with the tokens of their states."""
    distinct = {id(x): x for x in tensors if isinstance(x, Tensor)}
    with torch.inference_mode(False), torch.no_grad():
        for keys in distinct.values():
            state = state_of(keys)
            if state is None or (values := state.values()) is None or not (is_released(keys) and is_released(values)):
                continue
            reconstructed = state.held.in_place(*state.slots.reconstruct())
            for buffer, x in zip((keys, values), reconstructed, strict=True):
                whole = x.to(buffer.dtype).contiguous()
                buffer.set_(whole.untyped_storage(), 0, whole.shape, whole.stride())
            del _states[keys]


def why_kept(buffer: Tensor) -> str:
    """Return why the memory of a buffer cannot be released; "" if it can."""
    if buffer.is_inference():
        return "was created in inference mode, where torch does not count changes"
    if buffer.requires_grad:
        return "needs a gradient"
    is_whole = is_released(buffer) or buffer.untyped_storage().nbytes() == buffer.nbytes
    return "" if is_whole and not buffer._is_view() else "is a view of other tensors"


def release(buffer: Tensor) -> None:
    """Release the memory of a buffer: its elements alias a few NaN values.

    All strides are 1. With strides of 0 eager slice writes would raise, but Dynamo could not trace them.
    """
    few = sum(buffer.shape) - buffer.dim() + 1
    buffer.set_(buffer.new_full((few,), math.nan).untyped_storage(), 0, buffer.shape, (1,) * buffer.dim())


def is_released(buffer: Tensor) -> bool:
    """Return whether the memory of a buffer is released."""
    if buffer.layout is not torch.strided or buffer.is_nested or buffer.dim() < 2:
        return False
    return set(buffer.stride()) == {1} and buffer.untyped_storage().nbytes() < buffer.nbytes


def _content(site: SitePlan, buffer: Tensor) -> str:
    """Return the contents of a buffer: "released", "zeros" or "tokens". Raises FhoptError for anything else."""
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
        raise _lost(site, "its buffer holds NaN, like a copy of a buffer whose memory was released")
    return "tokens"


def _known(state: BufferState | None, held: BufferPair, values: Tensor) -> BufferState:
    if state is None:
        raise _lost(held.site, "its buffer is a copy of one whose memory was released")
    if not state.is_for(held, values):
        raise _lost(held.site, "its buffers hold latents of another plan")
    return state


def _lost(site: SitePlan, reason: str) -> FhoptError:
    return FhoptError(
        f"{site.site.name}: the tokens in its cache are lost: {reason}. Start again with zeroed key and value "
        "buffers (`buffer.zero_()`), and compile everything that writes or reads them."
    )


def _is_same(a: SitePlan, b: SitePlan) -> bool:
    """Return whether two site plans are equal, even if loaded separately."""
    return a is b or (
        a.layout == b.layout
        and a.site.name == b.site.name
        and all(
            x.tiers == y.tiers and torch.equal(x.encode, y.encode) and torch.equal(x.decode, y.decode)
            for x, y in ((a.key, b.key), (a.value, b.value))
        )
    )


class BufferKeeper:
    """Implementation of latent buffers for `fhopt.passes.rewrite.latent_buffers`."""

    attend_buffered = staticmethod(attend_buffered)
    why_kept = staticmethod(why_kept)
    is_released = staticmethod(is_released)
    blank = staticmethod(blank)
    parts = staticmethod(parts)
