"""Attention on one cache layer, and the segments before and after it, as one native call, bound to addresses.

Letters: B sequences, H query heads, G kv heads, N exact tokens, M tokens of the window, D head size, R latent
width.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fhopt.codegen.cpu.calls.caches import (
    CacheAppend,
    CacheAttention,
    CacheMean,
    CachePart,
    LayerStep,
    SpentSeconds,
    Turning,
    basis_of,
)
from fhopt.codegen.cpu.calls.kernels import TYPES, Attention, Rows
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.programs.program import SegmentCall, functions, run_of

SegmentCalls = tuple[SegmentCall | None, SegmentCall | None]  # before and after attention
SegmentPhases = tuple[Tensor, Tensor, int]  # see `SegmentRotation.of_tokens`


@dataclass(frozen=True, eq=False)
class CacheSide:
    """Keys or values of a cache: the inputs of a decode step other than packed latents, and the slot of its token.

    tokens [B,G,1,D]: where the program writes the new ones. opened [B,G,N,D]: full-precision tokens, and one slot after
    them; both dense. codes uint8 [B,G,M,D] and scale float16 [B,G,M]: of an 8-bit window with `at` used slots. decode
    [G,D,R], mean float32 [B,G,1,D] or None: see `fhopt.attention.cache_view.SideRows`.
    """

    tokens: Tensor
    opened: Tensor
    codes: Tensor
    scale: Tensor
    at: int
    decode: Tensor
    mean: Tensor | None

    def place(self) -> CacheAppend:
        """Return where the new tokens are, and where they go."""
        return CacheAppend(
            tokens=self.tokens.data_ptr(), heads=self.tokens.shape[1], width=self.tokens.shape[3],
            opened=self.opened.data_ptr(), open_tokens=self.opened.shape[2], codes=self.codes.data_ptr(),
            code_strides=self.codes.stride()[:3], scale=self.scale.data_ptr(), scale_strides=self.scale.stride(),
            at=self.at,
        )  # fmt: skip


class LayerCall:
    """A segment, attention on one cache layer and a last segment as one call, bound to addresses.

    All its tensors must stay alive and in place as long as the step is run. The step counts the window's tokens itself.
    The segment before it writes query, keys and values to `query` and the sides' `tokens`.
    """

    def __init__(
        self, calls: SegmentCalls, threads: int, query: Tensor, attended: Tensor,
        sides: tuple[CacheSide, CacheSide], parts: Sequence[tuple[LibraryKernel, bytes] | None], scale: float,
        turning: SegmentPhases | None = None,
    ) -> None:  # fmt: skip
        keys, values = sides
        bases = [side.decode.contiguous() for side in sides]
        self._kept, self._sides, self._turning = (calls, query, attended, bases), list(sides), turning
        latents, window, exact = map(_part, parts)
        self._window_kernel = None if parts[1] is None else parts[1][0]
        batch, heads, queries, head_size = query.shape
        attention = CacheAttention(
            batch=batch, heads=heads, queries=queries, head_size=head_size, value_size=values.tokens.shape[3],
            scale=scale, query=_NOWHERE, latents=latents, window=window, opened=exact, encode=basis_of(bases[0]),
            decode=basis_of(bases[1]), key_mean=_mean(keys.mean, heads), value_mean=_mean(values.mean, heads),
            turn=_turn(turning), output=0,
        )  # fmt: skip
        self._step = LayerStep(
            before=run_of(calls[0], threads), after=run_of(calls[1], threads),
            type=TYPES[query.dtype], query=query.data_ptr(), attended=attended.data_ptr(),
            attention=attention, sides=(keys.place(), values.place()),
        )  # fmt: skip
        self.address = ctypes.addressof(self._step)

    def move_window(self, places: Sequence[tuple[Tensor, Tensor]], at: int) -> None:
        """Relocate the window: codes and scale of keys and of values, with `at` used slots."""
        assert self._window_kernel is not None, "there is a window"
        self._sides = [
            replace(side, codes=codes, scale=scale, at=at)
            for side, (codes, scale) in zip(self._sides, places, strict=True)
        ]
        call = self._step.attention.window.call
        call.tokens = at
        self._window_kernel.read(call, *places)
        self._step.sides = tuple(side.place() for side in self._sides)

    def read_latents(self, arguments: bytes, turning: SegmentPhases | None) -> None:
        """Switch to other latents with the same kernel. arguments, turning: in the form passed at construction."""
        self._step.attention.latents.call = Attention.from_buffer_copy(arguments)
        self._step.attention.turn = _turn(turning)
        self._turning = turning


class Spent:
    """Seconds that decode steps took in native code. total: of all parts; layers: number of steps."""

    def __init__(self) -> None:
        self.seconds = SpentSeconds(0.0, 0.0)
        self.total, self.layers = 0.0, 0

    @property
    def linear(self) -> float:
        """Return the seconds in matmuls with weights."""
        return self.seconds.linear

    @property
    def attention(self) -> float:
        """Return the seconds in attention on the cache, including the write of the new token."""
        return self.seconds.attention


class DecodeSteps:
    """Steps to run in sequence: each may use results of earlier ones."""

    def __init__(self, steps: Sequence[LayerCall]) -> None:
        compiled = functions()
        assert compiled is not None
        self._run, self._steps, self._count = compiled.run_decode_steps, tuple(steps), len(steps)
        self._addresses = (ctypes.c_void_p * len(steps))(*[step.address for step in steps])

    def run(self, spent: Spent | None = None) -> None:
        """Run all of them. spent: accumulates their seconds."""
        if spent is None:
            self._run(self._addresses, self._count, None)
            return
        start = time.perf_counter()
        self._run(self._addresses, self._count, ctypes.addressof(spent.seconds))
        spent.total += time.perf_counter() - start
        spent.layers += self._count


_NOWHERE = Rows(0, 0, 0, 0)  # where C++ has the query as floats


def _part(part: tuple[LibraryKernel, bytes] | None) -> CachePart:
    """Return a kernel and its arguments."""
    if part is None:
        return CachePart(0, Attention.from_buffer_copy(bytes(ctypes.sizeof(Attention))))
    return CachePart(run=part[0].address, call=Attention.from_buffer_copy(part[1]))


def _turn(turning: SegmentPhases | None) -> Turning:
    if turning is None:
        return Turning(0, 0, 0, 0, 0)
    pairs, phases, segment = turning
    of_each = phases.stride(0) if phases.dim() == 4 else 0
    return Turning(pairs.data_ptr(), phases.data_ptr(), pairs.shape[1], segment, of_each)


def _mean(mean: Tensor | None, heads: int) -> CacheMean:
    if mean is None:
        return CacheMean(0, 0, 0, 0, 0)
    sequence, head = mean.stride()[:2]
    return CacheMean(mean.data_ptr(), sequence, head, heads // mean.shape[1], mean.shape[3])
