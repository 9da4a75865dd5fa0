"""A layer's decode step as one native call: its layer program, and attention on one cache, bound to addresses.

Letters: B sequences, H query heads, G kv heads, N exact tokens, M tokens of the window, D head size, R latent
width.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fhopt.codegen.cpu.attention import ARGUMENTS
from fhopt.codegen.cpu.launch import ADDRESSES_AT, TOKENS_AT, LibraryKernel
from fhopt.codegen.layers.instructions import TYPES
from fhopt.codegen.layers.program import LayerProgram, functions, packed_run

_SIDE = struct.Struct("@PqqPqP3qP3qq")


Turning = tuple[Tensor, Tensor, int]  # see `SegmentRotation.of_tokens`


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

    def packed(self) -> bytes:
        """Return the C++ struct `Append`."""
        return _SIDE.pack(
            self.tokens.data_ptr(), self.tokens.shape[1], self.tokens.shape[3], self.opened.data_ptr(),
            self.opened.shape[2], self.codes.data_ptr(), *self.codes.stride()[:3], self.scale.data_ptr(),
            *self.scale.stride(), self.at,
        )  # fmt: skip


class DecodeStep:
    """A layer's decode step as one call: its layer program, and attention on one cache, bound to addresses.

    All its tensors must stay alive and in place as long as the step is run. The step counts the window's tokens itself.
    The program writes query, keys and values to `query` and the sides' `tokens`.
    """

    def __init__(
        self, program: LayerProgram, address: int, threads: int, query: Tensor, attended: Tensor,
        sides: tuple[CacheSide, CacheSide], parts: Sequence[tuple[LibraryKernel, bytes] | None], scale: float,
        turning: Turning | None = None,
    ) -> None:  # fmt: skip
        keys, values = sides
        self._bases = [_basis(side.decode) for side in sides]
        means = [_mean(side.mean, query.shape[1]) for side in sides]
        sizes = (*query.shape, values.tokens.shape[3])
        self._kept, self._sides, self._turning = (program, query, attended), list(sides), turning
        latents, window, exact = map(_part, parts)
        self._window_kernel = None if parts[1] is None else parts[1][0]
        before = b"".join([
            packed_run(program, 0, address, threads), packed_run(program, 1, address, threads),
            struct.pack("@qPP", TYPES.index(query.dtype), query.data_ptr(), attended.data_ptr()),
            struct.pack("@5qd4q", *sizes, scale, 0, 0, 0, 0),
        ])  # fmt: skip
        between = b"".join([exact, *[packed for _, packed in self._bases], *means])
        turn = _turn(turning) + struct.pack("@P", 0)
        packed = before + latents + window + between + turn + keys.packed() + values.packed()
        self._struct = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self._struct)
        self._latents_at, self._window_at = len(before), len(before) + len(latents)
        self._turn_at = self._window_at + len(window) + len(between)
        self._sides_at = self._turn_at + len(turn)

    def move_window(self, places: Sequence[tuple[Tensor, Tensor]], at: int) -> None:
        """Relocate the window: codes and scale of keys and of values, with `at` used slots."""
        assert self._window_kernel is not None, "there is a window"
        moved = [
            replace(side, codes=codes, scale=scale, at=at)
            for side, (codes, scale) in zip(self._sides, places, strict=True)
        ]
        call = self._window_at + _KERNEL.size
        self._write(call + TOKENS_AT, struct.pack("@q", at))
        self._write(call + ADDRESSES_AT, self._window_kernel.addresses(*places[0], *places[1]))
        self._write(self._sides_at, b"".join([side.packed() for side in moved]))
        self._sides = moved

    def read_latents(self, arguments: bytes, turning: Turning | None) -> None:
        """Switch to other latents with the same kernel. arguments, turning: in the form passed at construction."""
        self._write(self._latents_at + _KERNEL.size, arguments)
        self._write(self._turn_at, _turn(turning))
        self._turning = turning

    def _write(self, at: int, packed: bytes) -> None:
        ctypes.memmove(self.address + at, packed, len(packed))


class Spent:
    """Seconds that decode steps took in native code. total: of all parts; layers: number of steps."""

    def __init__(self) -> None:
        self.parts = (ctypes.c_double * 2)()  # the C++ struct `Spent`
        self.total, self.layers = 0.0, 0

    @property
    def linear(self) -> float:
        """Return the seconds in matmuls with weights."""
        return self.parts[0]

    @property
    def attention(self) -> float:
        """Return the seconds in attention on the cache, including the write of the new token."""
        return self.parts[1]


class DecodeSteps:
    """Steps to run in sequence: each may use results of earlier ones."""

    def __init__(self, steps: Sequence[DecodeStep]) -> None:
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
        self._run(self._addresses, self._count, ctypes.addressof(spent.parts))
        spent.total += time.perf_counter() - start
        spent.layers += self._count


_KERNEL = struct.Struct("@P")
_NO_PART = bytes(_KERNEL.size + struct.calcsize(ARGUMENTS))


def _part(part: tuple[LibraryKernel, bytes] | None) -> bytes:
    """Return the C++ struct `CachePart` of a kernel and its arguments."""
    return _NO_PART if part is None else _KERNEL.pack(part[0].address) + part[1]


def _basis(decode: Tensor) -> tuple[Tensor, bytes]:
    """Return the tensor that a `CacheBasis` points to, and that struct."""
    dense = decode.contiguous() if decode.dtype in TYPES[:2] else decode.float()
    return dense, struct.pack("@P4q", dense.data_ptr(), dense.dtype == torch.bfloat16, *dense.shape)


def _turn(turning: Turning | None) -> bytes:
    """Return the C++ struct `Turning`."""
    if turning is None:
        return bytes(40)
    pairs, phases, segment = turning
    of_each = phases.stride(0) if phases.dim() == 4 else 0
    return struct.pack("@2P3q", pairs.data_ptr(), phases.data_ptr(), pairs.shape[1], segment, of_each)


def _mean(mean: Tensor | None, heads: int) -> bytes:
    """Return the C++ struct `CacheMean`."""
    if mean is None:
        return bytes(40)
    return struct.pack("@P4q", mean.data_ptr(), *mean.stride()[:2], heads // mean.shape[1], mean.shape[3])
