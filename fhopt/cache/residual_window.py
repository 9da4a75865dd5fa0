"""Attention sinks and residual window of one side, keys or values: exact, or the window rounded to 8 bits.

    ExactWindow     [ sinks | window ]  one part [B,G,N,D], as tokens came
    RoundedWindow   sinks [B,G,N,D], 8-bit values uint8 [B,G,M,D] and their scales [B,G,M] of the window
    StaticWindow    in fixed places: sinks [B,G,sinks+1,D], a ring [B,G,capacity+1,D] or its 8-bit values and scales

The last of the fixed places is for tokens that are not to be kept.

Letters: B batch, G kv heads, S new tokens, N and M tokens, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fhopt.cache.store import RoundedPart, Store
from fhopt.ops import packing, registry
from fhopt.plan.window import ResidualWindow

FEWEST, MOST = 8, 64  # places by which a window in 8 bits grows


def spare_places(quantized: int, block: int) -> int:
    """Return by how many places a window in 8 bits grows, so that most decode steps write one row and copy nothing.

    quantized: tokens before the window, of which they are a small share. block: tokens behind which it is made anew.
    """
    return min(max(quantized // 64, FEWEST), MOST, block)


class Window(Store):
    """Tokens that are not latents. `side` of `means`: from which a window in 8 bits holds differences."""

    means: Store | None = None
    side = 0

    @property
    def mean(self) -> Tensor | None:
        """Mean of the sequence, float32 [B,G,1,D]; None where the window holds tokens themselves."""
        return None if self.means is None else self.means.parts[self.side]


class ExactWindow(Window):
    """Attention sinks and residual window as they came, one part [B,G,N,D].

    spare: places by which a window in 8 bits grows.
    """

    spare = FEWEST

    def __init__(self, window: ResidualWindow) -> None:
        self.sinks = window.sinks

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        self.parts = (like[:, :, :0].clone(),)  # a view would keep the memory of `like`

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2])

    @property
    def rounded(self) -> int:
        """Tokens that are held in 8 bits."""
        return 0

    @property
    def sink_bytes(self) -> int:
        """Bytes of the attention sinks among `nbytes`."""
        return self.parts[0][:, :, : self.sinks].nbytes if self.parts else 0

    def read(self, *new: Tensor) -> Tensor:
        """Return the tokens, and `new` ones behind them."""
        return torch.cat([*self.parts, *new], 2) if new else self.parts[0]

    def oldest(self, count: int, new: Tensor) -> Tensor:
        """Return the first `count` tokens behind the sinks, of the window and of `new` ones behind it."""
        return self.read(new)[:, :, self.sinks : self.sinks + count]

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (tokens as they came, `new` ones behind; the rounded part of the window)."""
        return self.read(*new), None

    def keep(self, new: Tensor, quantized: int) -> None:
        """Hold new tokens too, without the `quantized` oldest of the window."""
        tokens = torch.cat([*self.parts, new], 2)
        if quantized:
            tokens = torch.cat([tokens[:, :, : self.sinks], tokens[:, :, self.sinks + quantized :]], 2)
        self.parts = (tokens,)

    def insert(self, dequantized: Tensor) -> None:
        """Put tokens between attention sinks and window."""
        (held,) = self.parts
        self.parts = (torch.cat([held[:, :, : self.sinks], dequantized.to(held.dtype), held[:, :, self.sinks :]], 2),)

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        self.parts = (self.parts[0][:, :, :count].clone(),)

    def take_sinks(self) -> Tensor:
        """Return the attention sinks, and hold the window alone from now on."""
        held, count = self.parts[0], self.sinks
        self.sinks = 0
        self.parts = (held[:, :, count:].clone(), *self.parts[1:])
        return held[:, :, :count]


class _InRoom(NamedTuple):
    """A window in 8 bits that grows. room: values and scales with spare places behind; the first `taken` are tokens."""

    sinks: Tensor
    room: tuple[Tensor, Tensor]
    taken: int


class RoundedWindow(ExactWindow):
    """Exact attention sinks and a window of 8 bits: sinks [B,G,N,D], values uint8 [B,G,M,D], scales [B,G,M]."""

    # The parts as they were set, or what they are made of. It is replaced as a whole, and reading changes nothing, so
    # that another thread may ask for the size of a cache that grows.
    _state: tuple[Tensor, ...] | _InRoom = ()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Sinks, values of the window, their scales: made when somebody reads them, which most decode steps do not."""
        state = self._state
        if not isinstance(state, _InRoom):
            return state
        return state.sinks, *[part.narrow(2, 0, state.taken) for part in state.room]

    @parts.setter
    def parts(self, parts: tuple[Tensor, ...]) -> None:
        self._state = parts

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        nothing = like[:, :, :0].clone()
        self.parts = (nothing, *packing.round_rows(nothing))

    @property
    def count(self) -> int:
        """Tokens."""
        state = self._state
        if isinstance(state, _InRoom):
            return int(state.sinks.shape[2]) + state.taken
        return int(state[0].shape[2] + state[1].shape[2])

    @property
    def rounded(self) -> int:
        """Tokens of the window, all of which are held in 8 bits."""
        state = self._state
        return state.taken if isinstance(state, _InRoom) else int(state[1].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """Return the tokens, and `new` ones behind them exactly as they came, in the dtype of the sinks."""
        sinks, values, scale = self.parts
        return torch.cat([sinks, self._exact(values, scale, sinks.dtype), *new], 2)

    def _exact(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return tokens of the window."""
        if self.mean is None:
            return packing.unround_rows(values, scale, dtype)
        return (packing.unround_rows(values, scale, torch.float32) + self.mean).to(dtype)

    def oldest(self, count: int, new: Tensor) -> Tensor:
        """Return the first `count` tokens behind the sinks; the others of the window stay as they are."""
        rounded = self.oldest_rounded(count)
        return super().oldest(count, new) if rounded is None else self._exact(*rounded, self.parts[0].dtype)

    def oldest_rounded(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Return values and scales of the first `count` tokens behind the sinks; None where they are not all held."""
        sinks, values, scale = self.parts
        if sinks.shape[2] < self.sinks or count > values.shape[2]:
            return None
        return values[:, :, :count], scale[:, :, :count]

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (sinks, `new` tokens behind; values and scales of the window)."""
        sinks, values, scale = self.parts
        return (torch.cat([sinks, *new], 2) if new else sinks), (values, scale)

    def keep(self, new: Tensor, quantized: int) -> None:
        """Hold new tokens too, without the `quantized` oldest of the window; only tokens that stay are rounded."""
        if not quantized and self._append(new):
            return
        sinks, values, scale = self.parts
        if not new.shape[2] and quantized <= values.shape[2] and sinks.shape[2] >= self.sinks:
            room = _with_spare(values[:, :, quantized:], self.spare), _with_spare(scale[:, :, quantized:], self.spare)
            self._state = _InRoom(sinks, room, values.shape[2] - quantized)
            return
        staying = new[:, :, max(0, self.sinks + quantized - self.count) :]
        more_values, more_scale = packing.round_rows(_less(staying, self.mean))
        if sinks.shape[2] < self.sinks:  # and the window is empty
            sinks = torch.cat([sinks, new], 2)[:, :, : self.sinks].clone()
        values = torch.cat([values[:, :, quantized:], more_values], 2)
        self.parts = (sinks, values, _joined([scale[:, :, quantized:], more_scale]))

    def _append(self, new: Tensor) -> bool:
        """Round a few new tokens into spare places, by machine code; False where there is none, or sinks are missing.

        Places up to the tokens held never change: what was read of the window stays as it was.
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
        """Return values and scales with `more` spare places behind those of the window."""
        state = self._state
        if isinstance(state, _InRoom) and all(state.taken + more <= part.shape[2] for part in state.room):
            return state.room
        _, values, scale = self.parts
        return _with_spare(values, self.spare), _with_spare(scale, self.spare)

    def take(self, room: tuple[Tensor, Tensor], more: int) -> None:
        """Hold `more` tokens that were written into spare places of `room`."""
        state = self._state
        sinks = state.sinks if isinstance(state, _InRoom) else state[0]
        self._state = _InRoom(sinks, room, self.rounded + more)

    def take_next(self) -> None:
        """Hold the token that was written behind those that `take` put into a room."""
        state = self._state
        assert isinstance(state, _InRoom)
        # Two for each layer and token: the class itself would call a function in Python.
        self._state = tuple.__new__(_InRoom, (state.sinks, state.room, state.taken + 1))

    def is_in(self, room: tuple[Tensor, Tensor], count: int) -> bool:
        """Return whether the window is the first `count` tokens of `room`."""
        state = self._state
        return isinstance(state, _InRoom) and state.room is room and state.taken == count

    def insert(self, dequantized: Tensor) -> None:
        """Put tokens between attention sinks and window, rounded."""
        sinks, *window = self.parts
        more = packing.round_rows(_less(dequantized, self.mean))
        self.parts = (sinks, *[_joined([new, old]) for new, old in zip(more, window, strict=True)])

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        sinks, *window = self.parts
        rest = max(0, count - self.sinks)
        self.parts = (sinks[:, :, :count].clone(), *[part[:, :, :rest].clone() for part in window])


def _with_spare(part: Tensor, spare: int) -> Tensor:
    """Copy values [B,G,M,D] or scales [B,G,M] to the front of a tensor with `spare` places behind."""
    count = part.shape[2]
    room = part.new_empty((*part.shape[:2], count + spare, *part.shape[3:]))
    room.narrow(2, 0, count).copy_(part)
    return room


def _less(tokens: Tensor, mean: Tensor | None) -> Tensor:
    return tokens if mean is None else tokens - mean


def _joined(parts: list[Tensor]) -> Tensor:
    """Join values or scales along tokens; as integers, since autocast on a CPU cannot join float16."""
    if parts[0].dtype != torch.float16:
        return torch.cat(parts, 2)
    return torch.cat([part.contiguous().view(torch.int16) for part in parts], 2).view(torch.float16)


def growing_windows(window: ResidualWindow) -> tuple[ExactWindow, ExactWindow]:
    """Return the stores of keys and of values that grow, exact or rounded as `window` says."""
    kind = ExactWindow if window.bits == 16 else RoundedWindow
    return kind(window), kind(window)


# --------------------------------------------------------------------------------------------------- static stores


class StaticWindow(Window):
    """Attention sinks and residual window in fixed places, the window as a ring (see the module docstring)."""

    def __init__(self, window: ResidualWindow) -> None:
        self.window = window

    def start(self, like: Tensor) -> None:
        """Reserve the places, of the shape and dtype of `like`."""
        counts = self.window.sinks, self.window.capacity
        blank = [like.new_zeros((*like.shape[:2], count + 1, like.shape[3])) for count in counts]
        self.parts = tuple(blank) if self.window.bits == 16 else (blank[0], *packing.round_rows(blank[1]))

    @property
    def sink_bytes(self) -> int:
        """Bytes of the attention sinks among `nbytes`."""
        return self.parts[0].nbytes if self.parts else 0

    def for_attention(self, *new: Tensor) -> tuple[Tensor, RoundedPart]:
        """Return (tokens as they came, `new` ones behind; the rounded part of the ring).

        Tokens as they came stand in the places of the sinks and, where the ring is not rounded, of the ring.
        """
        sinks, *ring = [part[:, :, :-1] for part in self.parts]
        if self.window.bits == 16:
            return torch.cat([sinks, *ring, *new], 2), None
        return torch.cat([sinks, *new], 2), (ring[0], ring[1])

    def write(self, tokens: Tensor, sink_places: Tensor, ring_places: Tensor) -> None:
        """Put tokens [B,G,S,D] into their places [S], the last place for those that have none."""
        window = (tokens,) if self.window.bits == 16 else packing.round_rows(_less(tokens, self.mean))
        self.parts[0].index_copy_(2, sink_places, tokens)
        for part, new in zip(self.parts[1:], window, strict=True):
            part.index_copy_(2, ring_places, new)
