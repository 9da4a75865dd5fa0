"""Attention on one cache layer in a decode step, and the segments around it, as one native call.

A step on a dynamic cache appends one row to spare slots of an 8-bit window and loads everything else unchanged. All
addresses are then constant: the step is prepared once (`LayerCall`) and runs until the spare slots are used up, until
a block of the window is full (the block is quantized after the step), or until other code changes the cache.

Letters: B sequences, H query heads, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any
from weakref import ref

from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.residual_window import RoundedWindow
from fhopt.codegen.cpu import graph_kernels
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.programs.native_step import CacheSide, DecodeSteps, LayerCall, SegmentCalls, Spent
from fhopt.ops import algebra
from fhopt.ops.cache_operands import CacheOperands

Room = tuple[Tensor, Tensor]  # slots of an 8-bit window: values and scales


@dataclass(frozen=True, eq=False)
class StepTensors:
    """Query [B,H,1,D], keys and values [B,G,1,D] that segments write; attention result [B,1,H,E] that they load."""

    query: Tensor
    keys: Tensor
    values: Tensor
    attended: Tensor


class CacheStep:
    """A prepared step of one cache layer. `left`: how many times it may run."""

    def __init__(
        self, layer: LatentLayer, step: LayerCall, rooms: tuple[Room, Room], left: int, threads: int,
        latents: Callable[[SideRows, SideRows], bytes] | None,
    ) -> None:  # fmt: skip
        """latents: returns the arguments of the packed-latents kernel; None if there are no latents."""
        self._step, self._rooms, self.left, self._threads = step, rooms, left, threads
        self._latents, self._has_more = latents, False  # quantized since the step was prepared
        self._windows: tuple[Any, Any] = layer.window_keys, layer.window_values
        self._count = self._windows[0].rounded  # tokens in the window
        self.quantized, self._stays = layer.quantized, _staying(layer)
        self.joined: tuple[list[CacheStep], DecodeSteps] | None = None  # steps that ran as one call with this one
        self._layer, self._is_open = ref(layer), False  # open: run, but its token is not committed to the cache

    def is_current(self, layer: LatentLayer, threads: int) -> bool:
        """Return whether the step may run: the cache layer is as this step left it."""
        return self.left > 0 and self._is_what_it_left(layer, threads)

    def _is_what_it_left(self, layer: LatentLayer, threads: int) -> bool:
        if threads != self._threads or layer.observer or self._is_open:
            return False
        return self._is_where_it_was(layer)

    def _is_where_it_was(self, layer: LatentLayer) -> bool:
        keys, values = self._windows
        if not (keys.is_in(self._rooms[0], self._count) and values.is_in(self._rooms[1], self._count)):
            return False
        if layer.quantized != self.quantized or layer.window_keys is not keys or layer.window_values is not values:
            return False
        return all(map(is_, _staying(layer), self._stays))

    def move(self, layer: LatentLayer, threads: int) -> bool:
        """Move the window to new slots and pick up a newly quantized block, if the rest is as this step left it.

        Returns False if the step must be prepared again.
        """
        if not self._is_what_it_left(layer, threads):
            return False
        if self._has_more:
            if self._latents is None:
                return False
            sides = layer._sides(0, layer.quantized)
            self._step.read_latents(self._latents(*sides), sides[0].turning)
            self._has_more = False
        room = _rooms(self._windows)
        self._step.move_window(room, self._count)
        for window, places in zip(self._windows, room, strict=True):
            window.take(places, 0)
        self._rooms, self.left = room, _left(layer, room)
        return True

    @property
    def layer(self) -> LatentLayer | None:
        """The cache layer; None if it was freed."""
        return self._layer()

    def finish(self) -> None:
        """Commit the step's token to the cache, after the step has run."""
        self._is_open = False
        self.left -= 1
        self._count += 1
        keys, values = self._windows
        keys.take_next()
        values.take_next()
        if self.left == 0:
            self._quantize()

    def _quantize(self) -> None:
        layer = self.layer
        if layer is None:
            return
        layer.quantize_full_blocks()
        if layer.quantized != self.quantized:
            self._has_more, self._rooms = True, _rooms(self._windows)
            self.quantized, self._stays, self._count = layer.quantized, _staying(layer), self._windows[0].rounded


def run_steps(steps: Sequence[CacheStep], calls: DecodeSteps) -> None:
    """Run the steps of several layers, and commit their tokens. calls: of `joined_steps`, for the same steps."""
    for step in steps:
        step._is_open = True
    calls.run(_timed.spent)
    for step in steps:
        step.finish()


def joined_steps(steps: Sequence[CacheStep]) -> DecodeSteps:
    """Return the native calls of several layers as one."""
    return DecodeSteps([step._step for step in steps])


class _Timed(threading.local):
    spent: Spent | None = None  # of the thread's innermost `timed_steps`


_timed = _Timed()


@contextmanager
def timed_steps() -> Iterator[Spent]:
    """Measure the seconds of this thread's steps inside the context; a nested context counts separately."""
    outer, spent = _timed.spent, Spent()
    _timed.spent = spent
    try:
        yield spent
    finally:
        _timed.spent = outer


def _staying(layer: LatentLayer) -> tuple[Any, ...]:
    """Return what a step does not change: packed latents, which only a quantized block extends, and means."""
    means = layer.means
    return layer.packed_keys.parts, layer.packed_values.parts, None if means is None else means.parts


def prepare_step(
    layer: Any, calls: SegmentCalls, tensors: StepTensors, options: dict[str, Any], threads: int
) -> CacheStep | None:
    """Prepare steps of a cache layer; None if they need ordinary calls.

    calls: the segments before and after attention; `tensors` are among their externals. options: `scale`, `softcap`.
    """
    if type(layer) is not LatentLayer or not _is_plain(layer, tensors):
        return None
    windows: Any = (layer.window_keys, layer.window_values)
    room = _rooms(windows)
    left = _left(layer, room)
    key, value = layer._sides(0, layer.quantized, *[w.for_attention()[1] for w in windows])
    opened = [_opened(w.parts[0]) for w in windows]
    assert key.window is not None and value.window is not None, "the windows are in 8 bits"
    kernels = graph_kernels.cache_kernels(
        CacheOperands(
            tensors.query, opened[0], opened[1], key.rows, key.scale, key.decode, value.rows, value.scale,
            value.decode, *key.window, *value.window,
        ),
        algebra.group_options(key.bit_groups, value.bit_groups) | options,
    )  # fmt: skip
    if kernels is None:
        return None
    sides = tuple(
        CacheSide(new, exact, places[0], places[1], side.rounded, side.decode, side.mean)
        for new, exact, places, side in zip((tensors.keys, tensors.values), opened, room, (key, value), strict=True)
    )
    parts = _calls(kernels, tensors.query, key, value, room, opened, options)
    latents = None if parts[0] is None else partial(_latents_call, parts[0][0], tensors.query, options)
    scale = options["scale"]
    pair: Any = sides
    step = LayerCall(calls, threads, tensors.query, tensors.attended, pair, parts, scale, key.turning)
    for window, places in zip(windows, room, strict=True):
        window.take(places, 0)
    return CacheStep(layer, step, room, left, threads, latents)


def _rooms(windows: tuple[Any, Any]) -> tuple[Room, Room]:
    return windows[0].room(1), windows[1].room(1)


def _is_plain(layer: LatentLayer, tensors: StepTensors) -> bool:
    """Return whether a step only appends to an 8-bit window, after all attention sinks."""
    if not layer.packed_keys.parts or not layer.packed_values.parts:  # an ordinary call creates these, empty
        return False
    if not layer.is_initialized or not layer.absorb or layer.sketches is not None or layer.observer is not None:
        return False
    windows = layer.window_keys, layer.window_values
    if not all(isinstance(w, RoundedWindow) and w.rounded and w.count - w.rounded == w.sinks for w in windows):
        return False
    sinks = layer.window_keys.parts[0]
    fits = sinks.dtype == tensors.keys.dtype and sinks.is_cpu
    return fits and (*sinks.shape[:2], sinks.shape[3]) == (*tensors.keys.shape[:2], tensors.keys.shape[3])


def _left(layer: LatentLayer, rooms: tuple[Room, Room]) -> int:
    """Return how many tokens can be appended until the slots are used up or a block is full."""
    held, window = layer.window_keys.count, layer.window
    windows: tuple[Any, Any] = layer.window_keys, layer.window_values
    spare = min(room[0].shape[2] - window.rounded for room, window in zip(rooms, windows, strict=True))
    return next((n for n in range(1, spare) if window.quantized_tokens(held + n)), spare)


def _opened(sinks: Tensor) -> Tensor:
    """Return exact tokens [B,G,N,D] with one free slot at the end, contiguous."""
    room = sinks.new_empty((*sinks.shape[:2], sinks.shape[2] + 1, sinks.shape[3]))
    room[:, :, :-1].copy_(sinks)
    return room


def _calls(
    kernels: tuple[LibraryKernel | None, ...], query: Tensor, key: SideRows, value: SideRows,
    room: tuple[Room, Room], opened: list[Tensor], options: dict[str, Any],
) -> list[tuple[LibraryKernel, bytes] | None]:  # fmt: skip
    """Return kernel and arguments for latents, window and full-precision tokens; None for a part without tokens."""
    latents, window, exact = kernels
    assert latents is not None and window is not None and exact is not None
    scale, softcap = options["scale"], options["softcap"]
    calls: list[tuple[LibraryKernel, bytes] | None] = [None]
    if key.rows.shape[2]:
        calls[0] = (latents, _latents_call(latents, query, options, key, value))
    (keys, key_scale), (values, value_scale) = ([part[:, :, : key.rounded] for part in places] for places in room)
    call = window.prepared(query, keys, key_scale, values, value_scale, None, None, None, 0, scale, softcap)
    calls.append((window, call.arguments))
    call = exact.prepared(query, opened[0], None, opened[1], None, None, None, None, 0, scale, softcap)
    return [*calls, (exact, call.arguments)]


def _latents_call(
    kernel: LibraryKernel, query: Tensor, options: dict[str, Any], key: SideRows, value: SideRows
) -> bytes:
    """Return the arguments of the packed-latents kernel. query: the layer's, before absorption."""
    absorbed = query.new_empty((*query.shape[:3], key.decode.shape[2]))
    call = kernel.prepared(
        absorbed, key.rows, key.scale, value.rows, value.scale, None, None, None, 0, options["scale"],
        options["softcap"],
    )  # fmt: skip
    return call.arguments
