"""A decoder layer's decode step with attention on a cache in one call of machine code, where nothing else must be done.

Most steps of a cache that grows write one row into spare places of a window in 8 bits and read the rest as it is.
Then everything has an address that stays: the step is prepared once (`DecodeStep`) and run until the spare places are
taken, a block is to be quantized, or somebody else has changed the cache. These steps are ordinary calls.

Letters: B sequences, H query heads, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.residual_window import RoundedWindow
from fhopt.codegen.cpu import graph_kernels
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.layers.decode_step import CacheSide, DecodeStep
from fhopt.codegen.layers.program import LayerProgram
from fhopt.ops import algebra


@dataclass(frozen=True, eq=False)
class StepTensors:
    """Where a program leaves query [B,H,1,D], keys and values [B,G,1,D], and reads attention's result [B,1,H,E]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    attended: Tensor


class CacheStep:
    """A prepared step of one layer of a cache; `left`: how many times it may be run."""

    def __init__(self, layer: LatentLayer, step: DecodeStep, rooms: tuple[Any, Any], left: int, threads: int) -> None:
        self._step, self._rooms, self.left, self._threads = step, rooms, left, threads
        self._held = _parts(layer)
        self._quantized = layer.quantized

    def is_current(self, layer: LatentLayer, threads: int) -> bool:
        """Return whether the step may be run: the layer of the cache is what this step left."""
        if self.left <= 0 or threads != self._threads or layer.quantized != self._quantized or layer.observer:
            return False
        return all(x is y for x, y in zip(_parts(layer), self._held, strict=True))

    def __call__(self, layer: LatentLayer) -> None:
        """Run the step; the cache holds its token then."""
        self._step()
        self.left -= 1
        layer.window_keys.take(self._rooms[0], 1)  # type: ignore[attr-defined]
        layer.window_values.take(self._rooms[1], 1)  # type: ignore[attr-defined]
        self._held = _parts(layer)


def _parts(layer: LatentLayer) -> tuple[Any, ...]:
    means = layer.means
    packed = layer.packed_keys.parts, layer.packed_values.parts
    return layer.window_keys.parts, layer.window_values.parts, *packed, None if means is None else means.parts


def prepare_step(
    layer: Any, program: LayerProgram, address: int, tensors: StepTensors, options: dict[str, Any], threads: int
) -> CacheStep | None:
    """Prepare steps of a layer of a cache; None where they are ordinary calls.

    address: of the program's externals, among which are the `tensors`. options: `scale` and `softcap`.
    """
    if type(layer) is not LatentLayer or not _is_plain(layer, tensors):
        return None
    room = [window.room(1) for window in (layer.window_keys, layer.window_values)]  # type: ignore[attr-defined]
    left = _left(layer, room[0])
    if left <= 0:
        return None
    key, value = layer._sides(
        0, layer.quantized, *[w.for_attention()[1] for w in (layer.window_keys, layer.window_values)]
    )
    opened = [_opened(w.parts[0]) for w in (layer.window_keys, layer.window_values)]
    kernels = graph_kernels.cache_kernels(
        (tensors.query, *opened, key.rows, key.scale, key.decode, value.rows, value.scale, value.decode,
         *(key.window or ()), *(value.window or ()), *(None,) * 6),
        algebra.group_options(key.bit_groups, value.bit_groups) | options,
    )  # fmt: skip
    if kernels is None:
        return None
    sides = tuple(
        CacheSide(new, exact, places[0], places[1], side.rounded, side.decode, side.mean)
        for new, exact, places, side in zip((tensors.keys, tensors.values), opened, room, (key, value), strict=True)
    )
    parts = _calls(kernels, tensors.query, key, value, room, opened, options)
    scale = options["scale"]
    pair: Any = sides
    step = DecodeStep(program, address, threads, tensors.query, tensors.attended, pair, parts, scale, key.turning)
    for window, places in zip((layer.window_keys, layer.window_values), room, strict=True):
        window.take(places, 0)  # type: ignore[attr-defined]
    return CacheStep(layer, step, (room[0], room[1]), left, threads)


def _is_plain(layer: LatentLayer, tensors: StepTensors) -> bool:
    """Return whether a step does no more than to append to a window in 8 bits, behind all attention sinks."""
    if not layer.packed_keys.parts or not layer.packed_values.parts:  # an ordinary call makes them, of no tokens
        return False
    if not layer.is_initialized or not layer.absorb or layer.sketches is not None or layer.observer is not None:
        return False
    windows = layer.window_keys, layer.window_values
    if not all(
        isinstance(w, RoundedWindow) and w.parts[1].shape[2] and w.parts[0].shape[2] == w.sinks for w in windows
    ):
        return False
    sinks = layer.window_keys.parts[0]
    fits = sinks.dtype == tensors.keys.dtype and sinks.is_cpu
    return fits and (*sinks.shape[:2], sinks.shape[3]) == (*tensors.keys.shape[:2], tensors.keys.shape[3])


def _left(layer: LatentLayer, room: tuple[Tensor, Tensor]) -> int:
    """Return how many tokens can be written before places are taken or a block is to be quantized."""
    held, window = layer.window_keys.count, layer.window
    spare = room[0].shape[2] - layer.window_keys.parts[1].shape[2]
    return next((n for n in range(spare) if window.quantized_tokens(held + n + 1)), spare)


def _opened(sinks: Tensor) -> Tensor:
    """Return exact tokens [B,G,N,D] with a place behind them, dense."""
    room = sinks.new_empty((*sinks.shape[:2], sinks.shape[2] + 1, sinks.shape[3]))
    room[:, :, :-1].copy_(sinks)
    return room


def _calls(
    kernels: tuple[LibraryKernel | None, ...], query: Tensor, key: SideRows, value: SideRows,
    room: list[tuple[Tensor, Tensor]], opened: list[Tensor], options: dict[str, Any],
) -> list[tuple[LibraryKernel, bytes] | None]:  # fmt: skip
    """Return kernel and arguments of latents, window and open tokens; None for a part without tokens."""
    latents, window, exact = kernels
    assert latents is not None and window is not None and exact is not None
    scale, softcap = options["scale"], options["softcap"]
    calls: list[tuple[LibraryKernel, bytes] | None] = [None]
    if key.rows.shape[2]:
        absorbed = query.new_empty((*query.shape[:3], key.decode.shape[2]))
        call = latents.prepared(
            absorbed, key.rows, key.scale, value.rows, value.scale, None, None, None, 0, scale, softcap
        )
        calls[0] = (latents, call.arguments)
    count = key.rounded
    (keys, key_scale), (values, value_scale) = ([part[:, :, :count] for part in places] for places in room)
    call = window.prepared(query, keys, key_scale, values, value_scale, None, None, None, 0, scale, softcap)
    calls.append((window, call.arguments))
    call = exact.prepared(query, opened[0], None, opened[1], None, None, None, None, 0, scale, softcap)
    return [*calls, (exact, call.arguments)]


def result_tensors(program: LayerProgram, result: tuple[torch.Size, torch.dtype]) -> StepTensors:
    """Return tensors for what a program writes before attention, and for attention's result."""
    query, keys, values = (torch.empty(s.shape, dtype=s.dtype) for s in program.segments[0].stored)
    return StepTensors(query, keys, values, torch.empty(result[0], dtype=result[1]))
