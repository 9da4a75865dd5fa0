"""Attention sinks and residual window of keys or of values: exact, or with the window rounded to 8 bits.

    ExactWindow     [ sinks | window ]  one part [B,G,N,D], unquantized
    RoundedWindow   sinks [B,G,N,D]; 8-bit values uint8 [B,G,M,D] and scales [B,G,M] of the window
    StaticWindow    in fixed slots: sinks [B,G,sinks+1,D]; a ring [B,G,capacity+1,D] or its 8-bit values and scales

The last slot of a static part takes tokens to discard.

Letters: B batch, G kv heads, S new tokens, N and M tokens, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fhopt.cache.store import RoundedPart, Store
from fhopt.ops import packing, registry
from fhopt.plan.window import ResidualWindow

MIN_GROWTH_TOKENS, MAX_GROWTH_TOKENS = 8, 64  # minimum and maximum growth increment of an 8-bit window


def spare_places(quantized: int, block: int) -> int:
    """Return the growth increment of an 8-bit window, chosen so that most decode steps append in place.

    quantized: tokens before the window; the increment is a small fraction of them. block: tokens after which the window
    is rebuilt anyway.
    """
    return min(max(quantized // 64, MIN_GROWTH_TOKENS), MAX_GROWTH_TOKENS, block)


class Window(Store):
    """Tokens that are not latents. `side`: index into `means`, which an 8-bit window subtracts."""

    means: Store | None = None
    side = 0

    @property
    def mean(self) -> Tensor | None:
        """Mean of the sequence, float32 [B,G,1,D]; None if the window holds tokens themselves."""
        return None if self.means is None else self.means.parts[self.side]


class ExactWindow(Window):
    """Attention sinks and residual window, unquantized, in one part [B,G,N,D].

    spare: growth increment of an 8-bit window.
    """

    spare = MIN_GROWTH_TOKENS

    def __init__(self, window: ResidualWindow) -> None:
        self.sinks = window.sinks

    def start(self, like: Tensor) -> None:
        """Start empty, with the shape and dtype of `like`."""
        self.parts = (like[:, :, :0].clone(),)  # a view would keep the memory of `like` alive

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self.parts[0].shape[2])

    @property
    def rounded(self) -> int:
        """Number of tokens in 8 bits."""
        return 0

    @property
    def sink_bytes(self) -> int:
        """Bytes of the attention sinks within `nbytes`."""
        return self.parts[0][:, :, : self.sinks].nbytes if self.parts else 0

    def read(self, *new: Tensor) -> Tensor:
        """Return the tokens, followed by `new` ones."""
        return torch.cat([*self.parts, *new], 2) if new else self.parts[0]

    def oldest(self, count: int, new: Tensor) -> Tensor:
        """Return the first `count` tokens after the sinks, from the window followed by `new` tokens."""
        return self.read(new)[:, :, self.sinks : self.sinks + count]

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (exact tokens, followed by `new` ones; the 8-bit part of the window)."""
        return self.read(*new), None

    def keep(self, new: Tensor, quantized: int) -> None:
        """Append new tokens and remove the `quantized` oldest ones of the window."""
        tokens = torch.cat([*self.parts, new], 2)
        if quantized:
            tokens = torch.cat([tokens[:, :, : self.sinks], tokens[:, :, self.sinks + quantized :]], 2)
        self.parts = (tokens,)

    def insert(self, dequantized: Tensor) -> None:
        """Insert tokens between attention sinks and window."""
        (held,) = self.parts
        self.parts = (torch.cat([held[:, :, : self.sinks], dequantized.to(held.dtype), held[:, :, self.sinks :]], 2),)

    def crop(self, count: int) -> None:
        """Truncate to the first `count` tokens."""
        self.parts = (self.parts[0][:, :, :count].clone(),)

    def take_sinks(self) -> Tensor:
        """Remove and return the attention sinks; the layer has none afterwards."""
        held, count = self.parts[0], self.sinks
        self.sinks = 0
        self.parts = (held[:, :, count:].clone(), *self.parts[1:])
        return held[:, :, :count]


class _InRoom(NamedTuple):
    """A dynamic 8-bit window. room: values and scales with spare slots; the first `taken` slots hold tokens."""

    sinks: Tensor
    room: tuple[Tensor, Tensor]
    taken: int


class RoundedWindow(ExactWindow):
    """Exact attention sinks and an 8-bit window: sinks [B,G,N,D], values uint8 [B,G,M,D], scales [B,G,M]."""

    # The parts as set, or what they are built from. Replaced atomically and not changed by loads, so that another
    # thread may query the size of a growing cache.
    _state: tuple[Tensor, ...] | _InRoom = ()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Sinks, window values, window scales; built on access, which most decode steps avoid."""
        state = self._state
        if not isinstance(state, _InRoom):
            return state
        return state.sinks, *[part.narrow(2, 0, state.taken) for part in state.room]

    @parts.setter
    def parts(self, parts: tuple[Tensor, ...]) -> None:
        self._state = parts

    def start(self, like: Tensor) -> None:
        """Start empty, with the shape and dtype of `like`."""
        nothing = like[:, :, :0].clone()
        self.parts = (nothing, *packing.round_rows(nothing))

    @property
    def count(self) -> int:
        """Number of tokens."""
        state = self._state
        if isinstance(state, _InRoom):
            return int(state.sinks.shape[2]) + state.taken
        return int(state[0].shape[2] + state[1].shape[2])

    @property
    def rounded(self) -> int:
        """Number of tokens in the window, all in 8 bits."""
        state = self._state
        return state.taken if isinstance(state, _InRoom) else int(state[1].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """Return the tokens, followed by unquantized `new` ones, in the dtype of the sinks."""
        sinks, values, scale = self.parts
        return torch.cat([sinks, self._exact(values, scale, sinks.dtype), *new], 2)

    def _exact(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize tokens of the window."""
        if self.mean is None:
            return packing.unround_rows(values, scale, dtype)
        return (packing.unround_rows(values, scale, torch.float32) + self.mean).to(dtype)

    def oldest(self, count: int, new: Tensor) -> Tensor:
        """Return the first `count` tokens after the sinks."""
        rounded = self.oldest_rounded(count)
        return super().oldest(count, new) if rounded is None else self._exact(*rounded, self.parts[0].dtype)

    def oldest_rounded(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Return values and scales of the first `count` tokens after the sinks; None if not all are in the window."""
        sinks, values, scale = self.parts
        if sinks.shape[2] < self.sinks or count > values.shape[2]:
            return None
        return values[:, :, :count], scale[:, :, :count]

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (sinks, followed by `new` tokens; values and scales of the window)."""
        sinks, values, scale = self.parts
        return (torch.cat([sinks, *new], 2) if new else sinks), (values, scale)

    def keep(self, new: Tensor, quantized: int) -> None:
        """Append new tokens and remove the `quantized` oldest of the window; only tokens that stay are rounded."""
        if not quantized and self._append(new):
            return
        sinks, values, scale = self.parts
        if not new.shape[2] and quantized <= values.shape[2] and sinks.shape[2] >= self.sinks:
            room = _with_spare(values[:, :, quantized:], self.spare), _with_spare(scale[:, :, quantized:], self.spare)
            self._state = _InRoom(sinks, room, values.shape[2] - quantized)
            return
        staying = new[:, :, max(0, self.sinks + quantized - self.count) :]
        more_values, more_scale = packing.round_rows(_less(staying, self.mean))
        if sinks.shape[2] < self.sinks:  # the window is empty
            sinks = torch.cat([sinks, new], 2)[:, :, : self.sinks].clone()
        values = torch.cat([values[:, :, quantized:], more_values], 2)
        self.parts = (sinks, values, _joined([scale[:, :, quantized:], more_scale]))

    def _append(self, new: Tensor) -> bool:
        """Round a few new tokens into spare slots by a native kernel; False without a kernel, slots, or all sinks.

        Slots of held tokens never change, so earlier views of the window stay valid.
        """
        more = new.shape[2]
        kernel = registry.kernel_of("round_rows_into", new.device.type)
        has_sinks = self.count - self.rounded >= self.sinks
        if kernel is None or more > self.spare or not has_sinks or torch.compiler.is_compiling():
            return False
        room = self.room(more)
        if not kernel(new.detach(), self.mean, *room, self.rounded):
            return False
        self.take(room, more)
        return True

    def room(self, more: int) -> tuple[Tensor, Tensor]:
        """Return values and scales of the window with at least `more` spare slots."""
        state = self._state
        if isinstance(state, _InRoom) and all(state.taken + more <= part.shape[2] for part in state.room):
            return state.room
        _, values, scale = self.parts
        return _with_spare(values, self.spare), _with_spare(scale, self.spare)

    def take(self, room: tuple[Tensor, Tensor], more: int) -> None:
        """Commit `more` tokens that were written to spare slots of `room`."""
        state = self._state
        sinks = state.sinks if isinstance(state, _InRoom) else state[0]
        self._state = _InRoom(sinks, room, self.rounded + more)

    def take_next(self) -> None:
        """Commit the next token, written to the room that `take` set."""
        state = self._state
        assert isinstance(state, _InRoom)
        # Called twice per layer and token: the class's constructor would be a Python call.
        self._state = tuple.__new__(_InRoom, (state.sinks, state.room, state.taken + 1))

    def is_in(self, room: tuple[Tensor, Tensor], count: int) -> bool:
        """Return whether the window is the first `count` tokens of `room`."""
        state = self._state
        return isinstance(state, _InRoom) and state.room is room and state.taken == count

    def insert(self, dequantized: Tensor) -> None:
        """Insert tokens between attention sinks and window, rounded."""
        sinks, *window = self.parts
        more = packing.round_rows(_less(dequantized, self.mean))
        self.parts = (sinks, *[_joined([new, old]) for new, old in zip(more, window, strict=True)])

    def crop(self, count: int) -> None:
        """Truncate to the first `count` tokens."""
        sinks, *window = self.parts
        rest = max(0, count - self.sinks)
        self.parts = (sinks[:, :, :count].clone(), *[part[:, :, :rest].clone() for part in window])


def _with_spare(part: Tensor, spare: int) -> Tensor:
    """Copy values [B,G,M,D] or scales [B,G,M] to a tensor with `spare` more slots."""
    count = part.shape[2]
    room = part.new_empty((*part.shape[:2], count + spare, *part.shape[3:]))
    room.narrow(2, 0, count).copy_(part)
    return room


def _less(tokens: Tensor, mean: Tensor | None) -> Tensor:
    return tokens if mean is None else tokens - mean


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate values or scales along tokens; as integers, since CPU autocast cannot concatenate float16."""
    if parts[0].dtype != torch.float16:
        return torch.cat(parts, 2)
    return torch.cat([part.contiguous().view(torch.int16) for part in parts], 2).view(torch.float16)


def growing_windows(window: ResidualWindow) -> tuple[ExactWindow, ExactWindow]:
    """Make the dynamic windows of keys and of values, exact or rounded according to `window`."""
    kind = ExactWindow if window.bits == 16 else RoundedWindow
    return kind(window), kind(window)


# --------------------------------------------------------------------------------------------------- static stores


class StaticWindow(Window):
    """Attention sinks and residual window in fixed slots, the window as a ring (see the module docstring)."""

    def __init__(self, window: ResidualWindow) -> None:
        self.window = window

    def start(self, like: Tensor) -> None:
        """Allocate the slots, with the shape and dtype of `like`."""
        counts = self.window.sinks, self.window.capacity
        blank = [like.new_zeros((*like.shape[:2], count + 1, like.shape[3])) for count in counts]
        self.parts = tuple(blank) if self.window.bits == 16 else (blank[0], *packing.round_rows(blank[1]))

    @property
    def sink_bytes(self) -> int:
        """Bytes of the attention sinks within `nbytes`."""
        return self.parts[0].nbytes if self.parts else 0

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (exact tokens, followed by `new` ones; the 8-bit part of the ring).

        Exact tokens are the sinks, and the ring if it is not rounded.
        """
        sinks, *ring = [part[:, :, :-1] for part in self.parts]
        if self.window.bits == 16:
            return torch.cat([sinks, *ring, *new], 2), None
        return torch.cat([sinks, *new], 2), (ring[0], ring[1])

    def write(self, tokens: Tensor, sink_places: Tensor, ring_places: Tensor) -> None:
        """Write tokens [B,G,S,D] to slots [S]; tokens without a slot go to the last one."""
        window = (tokens,) if self.window.bits == 16 else packing.round_rows(_less(tokens, self.mean))
        self.parts[0].index_copy_(2, sink_places, tokens)
        for part, new in zip(self.parts[1:], window, strict=True):
            part.index_copy_(2, ring_places, new)
