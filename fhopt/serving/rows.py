"""Bytes of a token in the blocks of a serving engine, for one layer.

    LatentRows   [key latents | value latents]: quantized values and scales of every latent head, or unquantized
    WindowRows   [keys | values] of all kv heads: 8-bit with a scale per head, or unquantized
    FirstRows    one page per sequence: unquantized keys and values of its attention sinks, means in float32

Parts of a row are ordered by alignment, so that each can be loaded in place.

Letters: G kv heads, J latent heads, T tokens, D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.cache.quantized_rows import encoder_inputs
from fhopt.codegen.cpu import block_tables
from fhopt.ops import algebra, packing
from fhopt.plan.site_plan import SCALE_BYTES, SidePlan, SitePlan

MIN_ALIGNMENT = SCALE_BYTES  # row sizes in bytes are multiples of this
Packed = tuple[Tensor, Tensor | None]  # rows [1,J,T,bytes or R], scales [1,J,T]


@dataclass(frozen=True)
class RowPart:
    """A part of a row, from byte `start` on: `heads` times `numbers` elements of `dtype`."""

    start: int
    heads: int
    numbers: int
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """End byte of the part."""
        return self.start + self.heads * self.numbers * self.dtype.itemsize

    def read(self, rows: Tensor) -> Tensor:
        """Return the elements [T, heads, numbers] of rows uint8 [T, bytes], as a view."""
        return rows[:, self.start : self.stop].view(self.dtype).unflatten(1, (self.heads, self.numbers))

    def write(self, rows: Tensor, numbers: Tensor) -> None:
        """Write elements [T, heads, numbers] to rows uint8 [T, bytes]; also [T, heads] for one element per head."""
        place = self.read(rows)
        place.copy_(numbers.reshape(place.shape))


def _laid_out(wanted: Sequence[tuple[int, int, torch.dtype]]) -> tuple[list[RowPart], int]:
    """Lay out parts (heads, elements per head, dtype) in a row: (parts in the given order, bytes of the row).

    Heads of an even number of bytes come before others: GPUs load them in 16-bit words.
    """
    order = sorted(range(len(wanted)), key=lambda i: (-wanted[i][2].itemsize, wanted[i][1] % 2))
    parts: dict[int, RowPart] = {}
    start = 0
    for i in order:
        parts[i] = RowPart(start, *wanted[i])
        start = parts[i].stop
    unit = max([MIN_ALIGNMENT, *(dtype.itemsize for _, _, dtype in wanted)])
    return [parts[i] for i in range(len(wanted))], max(1, -(-start // unit)) * unit


class LatentRows:
    """Packed latents of a site; unquantized latents have dtype `dtype`."""

    def __init__(self, plan: SitePlan, dtype: torch.dtype) -> None:
        self.plan = plan
        self.sides = [plan.key] if plan.is_shared else [plan.key, plan.value]
        self.groups = [algebra.bit_groups(side) for side in self.sides]
        wanted = [numbers for side in self.sides for numbers in _numbers(side, dtype)]
        self.parts, self.size = _laid_out(wanted)

    def write(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """Encode keys [T,G,D] and values [T,G,E], float32, into rows uint8 [T, at least `size`]."""
        inputs = encoder_inputs(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], self.plan.is_shared)
        parts = iter(self.parts)
        for side, groups, (_, x) in zip(self.sides, self.groups, inputs, strict=True):
            latent = algebra.encode(x, side.encode)
            packed = torch.ops.fhopt.pack(latent, *groups) if side.tiers else (latent,)
            for numbers in packed:
                next(parts).write(rows, numbers[0].transpose(0, 1))

    def read(self, rows: Tensor) -> tuple[Packed, Packed]:
        """Return packed latents of keys and values in rows uint8 [T, bytes]; the same twice if they share a latent."""
        parts, packed = iter(self.parts), []
        for side in self.sides:
            latents = next(parts).read(rows).transpose(0, 1)[None]
            scale = next(parts).read(rows)[:, :, 0].t()[None] if side.tiers else None
            packed.append((latents, scale))
        return packed[0], packed[-1]


def _numbers(side: SidePlan, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
    """List the parts of one side: latents, and scales if they are quantized."""
    if not side.tiers:
        return [(side.groups, side.width, dtype)]
    return [(side.groups, side.row_bytes(), torch.uint8), (side.groups, 1, torch.float16)]


class WindowRows:
    """Tokens of the residual window in `bits` bits; 16: unquantized, in dtype `dtype`."""

    def __init__(self, plan: SitePlan, bits: int, dtype: torch.dtype) -> None:
        site, self.is_rounded = plan.site, bits == 8
        sizes = site.key_dim, site.value_dim
        wanted = [(site.kv_heads, size, torch.uint8 if self.is_rounded else dtype) for size in sizes]
        if self.is_rounded:
            wanted += [(site.kv_heads, 1, torch.float16)] * 2
        self.parts, self.size = _laid_out(wanted)

    def rows(self, keys: Tensor, values: Tensor) -> Tensor:
        """Make rows uint8 [T, size] from keys [T,G,D] and values [T,G,E]."""
        rows = torch.empty((len(keys), self.size), dtype=torch.uint8, device=keys.device)
        for i, x in enumerate((keys, values)):
            if self.is_rounded:
                codes, scales = self.parts[i], self.parts[2 + i]
                if not block_tables.round_window_rows(x, rows, codes.start, scales.start):
                    _round_into(x, codes.read(rows), scales.read(rows)[..., 0])
            else:
                self.parts[i].write(rows, x)
        return rows

    def read(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys [T,G,D] and values [T,G,E] in `dtype` from rows uint8 [T, bytes]."""
        numbers = [part.read(rows) for part in self.parts]
        if not self.is_rounded:
            return numbers[0].to(dtype), numbers[1].to(dtype)
        keys, values, *scales = numbers
        key, value = (packing.unround_rows(x, s[..., 0], dtype) for x, s in zip((keys, values), scales, strict=True))
        return key, value


def _round_into(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Round x [T,G,D] to codes uint8 [T,G,D] and scale float16 [T,G], by torch operations."""
    packing.round_rows_into_reference(x.transpose(0, 1)[None], None, codes.transpose(0, 1)[None], scale.t()[None], 0)


class FirstRows:
    """Data of a sequence's first tokens: `sinks` attention sinks of dtype `dtype`, and means if the plan has them.

    A page is one row. Means are zero until computed.
    """

    def __init__(self, plan: SitePlan, sinks: int, has_means: bool, dtype: torch.dtype) -> None:
        site, self.sinks = plan.site, sinks
        sizes = site.key_dim, site.value_dim
        wanted = [(sinks, site.kv_heads * size, dtype) for size in sizes]
        wanted += [(site.kv_heads, size, torch.float32) for size in sizes] if has_means else []
        parts, self.size = _laid_out(wanted)
        self.sink_parts, self.mean_parts = parts[:2], parts[2:]
        self.heads = [(site.kv_heads, size) for size in sizes]

    def write_sinks(self, page: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys [T,G,D] and values [T,G,E] of sinks from `start` on to a page uint8 [1, bytes]."""
        for part, x in zip(self.sink_parts, (keys, values), strict=True):
            part.read(page)[0, start : start + len(x)] = x.flatten(1).to(part.dtype)

    def read_sinks(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sinks' keys [P,G,sinks,D] and values [P,G,sinks,E] of pages uint8 [P, bytes]."""
        parts = zip(self.sink_parts, self.heads, strict=True)
        key, value = (part.read(pages).unflatten(2, heads).transpose(1, 2) for part, heads in parts)
        return key, value

    def write_means(self, page: Tensor, means: Sequence[Tensor]) -> None:
        """Write means [G,D] and [G,E] to a page uint8 [1, bytes]."""
        for part, mean in zip(self.mean_parts, means, strict=True):
            part.read(page)[0] = mean

    def read_means(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return means [P,G,D] and [P,G,E] from pages uint8 [P, bytes]."""
        key, value = (part.read(pages) for part in self.mean_parts)
        return key, value
