"""Launch of the decode-step kernels on a serving engine's blocks (block_tables.py): views, addresses, grids.

Nothing here synchronizes with the device, so that a call may be captured in a CUDA graph.

Letters: B sequences, H query heads, G kv heads, J latent heads, M = H/G, D and E head size of keys and values, R latent
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fhopt.codegen.block_layout import BlockLayout, SideLayout
from fhopt.codegen.build import build_triton
from fhopt.codegen.cpu.packing import tier_table
from fhopt.codegen.gpu.block_tables import encode_blocks_kernel, join_kernel, write_kernel
from fhopt.codegen.gpu.encode_rows import BLOCK_D, BLOCK_G, BLOCK_T, CUDA_OPTIONS, OPTIONS
from fhopt.codegen.gpu.launch import Span
from fhopt.codegen.gpu.packing import device_table
from fhopt.codegen.gpu.prefill import padded
from fhopt.codegen.tiers import Tiers

JOINED, SUMMED = 64, 32  # of a program of `join_kernel`: output channels, and latent channels per iteration


class DeviceBlocks(NamedTuple):
    """A cache uint8 [blocks, 1, block size, bytes], and the blocks of each sequence, int32 [B, blocks]."""

    cache: Tensor
    table: Tensor


class StepBlocks(NamedTuple):
    """The blocks of a layer's three caches."""

    latents: DeviceBlocks
    window: DeviceBlocks
    first: DeviceBlocks


@dataclass(frozen=True, eq=False)
class _Views:
    """Views of the rows of a layer's caches, [blocks, heads, block size, elements], of keys and of values.

    Scales have no last dimension. None: the layer has none.
    """

    latents: tuple[Tensor, Tensor]
    latent_scales: tuple[Tensor | None, Tensor | None]
    window: tuple[Tensor, Tensor]
    window_scales: tuple[Tensor | None, Tensor | None]
    sinks: tuple[Tensor, Tensor]
    means: tuple[Tensor | None, Tensor | None]


class TritonBlockAttention:
    """Cache writes and attention of decode steps on a layer's blocks, on one device (CPU: Triton's interpreter).

    Raises FhoptError for bit groups without a kernel.
    """

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self._latents, self._window, self._first = (build_triton(spec) for spec in layout.specs())
        sides = (layout.key, layout.value)
        self._encode = [side.encode.to(device, torch.float32).contiguous() for side in sides]
        self._decode = [side.decode.to(device, layout.dtype).contiguous() for side in sides]
        self._kept: tuple[object, _Views] | None = None

    def serves(self, query: Tensor, latents: Tensor, window: Tensor, first: Tensor) -> bool:
        """Return whether queries and caches have the type, device and alignment that the kernels require."""
        layout, number = self.layout, self.layout.dtype.itemsize
        units = (
            2 if layout.key.tiers and layout.value.tiers else max(2, number),
            2 if layout.window.bits == 8 else number,
            4 if layout.means_from else number,
        )
        caches = zip((latents, window, first), units, strict=True)
        aligned = all(n % unit == 0 for x, unit in caches for n in (x.data_ptr(), x.stride(0), x.stride(2)))
        return aligned and query.dtype == layout.dtype and query.device.type == self.device.type

    def __call__(
        self, lengths: Tensor, blocks: StepBlocks, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        writes: bool,
    ) -> None:  # fmt: skip
        """Write the new token of each sequence, if `writes`, and attend with its queries, into `output` [B,H,E].

        lengths: int32 [B], tokens per sequence with the new one; 0: no sequence. query [B,H,D], key [B,G,D], value
        [B,G,E]: dense in the last dimension.
        """
        if not len(lengths):
            return
        views = self._views(blocks)
        with torch.cuda.device_of(query):
            if writes:
                self._write(lengths, blocks, views, key, value)
            self._attend(lengths, blocks, views, query, output)

    # ---- views of the caches

    def _views(self, blocks: StepBlocks) -> _Views:
        """Return the views of the caches, created once for the same memory."""
        key = [(x.cache.data_ptr(), x.cache.shape, x.cache.stride()) for x in blocks]
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._made_views(*(x.cache for x in blocks))
        return self._kept[1]

    def _made_views(self, latents: Tensor, window: Tensor, first: Tensor) -> _Views:
        layout, (size, value_size) = self.layout, self.layout.sizes
        heads, rounded = layout.kv_heads, layout.window.bits == 8
        sides, sizes = (layout.key, layout.value), (size, value_size)
        number = torch.uint8 if rounded else layout.dtype
        opened = [_part(window, at, heads, n, number) for at, n in zip(layout.window_rows, sizes, strict=False)]
        halves = [
            _part(window, at, heads, 1, torch.float16)[..., 0] if rounded else None for at in layout.window_rows[2:]
        ]
        sinks = [self._sinks(first, at, n) for at, n in zip(layout.first_rows, sizes, strict=False)]
        means = [
            _part(first, at, heads, n, torch.float32) if layout.means_from else None
            for at, n in zip(layout.first_rows[2:], sizes, strict=True)
        ]
        return _Views(
            latents=_pair([self._latent(latents, side) for side in sides]),
            latent_scales=_pair([self._latent_scale(latents, side) for side in sides]),
            window=_pair(opened), window_scales=_pair(halves), sinks=_pair(sinks), means=_pair(means),
        )  # fmt: skip

    def _latent(self, cache: Tensor, side: SideLayout) -> Tensor:
        dtype = torch.uint8 if side.tiers else self.layout.dtype
        return _part(cache, side.start, side.encode.shape[0], side.bytes // dtype.itemsize, dtype)

    def _latent_scale(self, cache: Tensor, side: SideLayout) -> Tensor | None:
        return _part(cache, side.scale, side.encode.shape[0], 1, torch.float16)[..., 0] if side.tiers else None

    def _sinks(self, cache: Tensor, at: int, size: int) -> Tensor:
        """Return attention sinks [pages, G, sinks, size]; a page stores them in token order."""
        count, heads = self.layout.window.sinks, self.layout.kv_heads
        whole = _part(cache, at, 1, count * heads * size, self.layout.dtype)[:, 0, 0]
        return whole.unflatten(1, (count, heads, size)).transpose(1, 2)

    # ---- writing

    def _write(self, lengths: Tensor, blocks: StepBlocks, views: _Views, key: Tensor, value: Tensor) -> None:
        layout, count = self.layout, len(lengths)
        for side, x in enumerate((key, value)):
            window, scales, sinks, means = (
                views.window[side], views.window_scales[side], views.sinks[side], views.means[side],
            )  # fmt: skip
            write_kernel[count, layout.kv_heads](
                x, lengths, window, scales, sinks, means, blocks.window.table, blocks.first.table,
                layout.window.sinks, layout.means_from, layout.sizes[side],
                *x.stride()[:2], *window.stride()[:3], *_strides(scales, 3), *sinks.stride()[:3], *_strides(means, 2),
                blocks.window.table.stride(0), blocks.first.table.stride(0),
                PAGE=window.shape[2], BLOCK_T=BLOCK_T, BLOCK_D=padded(layout.sizes[side]),
            )  # fmt: skip
        if layout.is_shared:
            self._encode_side(0, lengths, blocks, views, (key, value))
        else:
            self._encode_side(0, lengths, blocks, views, (key,))
            self._encode_side(1, lengths, blocks, views, (value,))

    def _encode_side(
        self, side: int, lengths: Tensor, blocks: StepBlocks, views: _Views, inputs: tuple[Tensor, ...]
    ) -> None:
        """Encode new keys, values, or both if they share a latent, and pack them into their rows."""
        layout, basis, count = self.layout, self._encode[side], len(lengths)
        tiers = (layout.key, layout.value)[side].tiers
        bits, widths, steps = (tuple(x) for x in zip(*tiers, strict=True)) if tiers else ((), (), ())
        table = tier_table(bits, widths, steps) if tiers else None
        codes, scale = views.latents[side], views.latent_scales[side]
        tiles = triton.cdiv(count, BLOCK_T)
        numbers: list[Any] = []
        for i, x in enumerate((*inputs, None)[:2]):
            at = side + i
            known = (x, views.window[at], views.window_scales[at], views.means[at]) if x is not None else (None,) * 4
            size = layout.sizes[at] if x is not None else 0
            numbers += [*known, size, *_strides(x, 2), *_strides(known[1], 3), *_strides(known[2], 3)]
            numbers += _strides(known[3], 2)
        encode_blocks_kernel[tiles + (count if layout.means_from else 0), basis.shape[0]](
            *numbers, basis, codes, scale, None if table is None else device_table(bits, widths, steps, self.device),
            lengths, *(x.table for x in blocks),
            count, 0 if table is None else table.tier_count, _coded(tiers, basis.shape[1]),
            layout.kv_heads // basis.shape[0], layout.window.sinks, layout.means_from,
            *basis.stride()[:2], *codes.stride()[:3], *_strides(scale, 3), *(x.table.stride(0) for x in blocks),
            PAGE=codes.shape[2], WINDOW_PAGE=views.window[0].shape[2],
            BLOCK_T=BLOCK_T, BLOCK_G=BLOCK_G, BLOCK_D=BLOCK_D, **(OPTIONS if torch.version.hip else CUDA_OPTIONS),
        )  # fmt: skip

    # ---- attention

    def _attend(self, lengths: Tensor, blocks: StepBlocks, views: _Views, query: Tensor, output: Tensor) -> None:
        rule = self.layout.window
        numbers: dict[str, Any] = {"scale": self.layout.scale, "lengths": lengths}

        def span(kind: int, table: Tensor) -> dict[str, Any]:
            return numbers | {"span": Span(kind, rule, table)}

        single = query.unsqueeze(2)
        far = self._latents(
            self._absorbed(query), *_sides(views.latents, views.latent_scales), None,
            **span(Span.QUANTIZED, blocks.latents.table),
        )  # fmt: skip
        near = self._window(
            single, *_sides(views.window, views.window_scales), None, **span(Span.OPEN, blocks.window.table)
        )
        first: tuple[Tensor | None, Tensor | None] = (None, None)
        if rule.sinks:
            sinks = _sides(views.sinks, (None, None))
            first = self._first(single, *sinks, None, **span(Span.FIRST, blocks.first.table))
        self._join(far, near, first, views, blocks.first.table, query, output)

    def _absorbed(self, query: Tensor) -> Tensor:
        """Absorb the decoder of keys into queries [B,H,D]: [B,H,1,R]."""
        decode = self._decode[0]
        groups, _, width = decode.shape
        count, heads, size = query.shape
        grouped = query.reshape(count, groups, heads // groups, size).transpose(0, 1).reshape(groups, -1, size)
        absorbed = torch.bmm(grouped, decode).view(groups, count, heads // groups, width)  # [G, B, M, R]
        return absorbed.transpose(0, 1).reshape(count, heads, 1, width)

    def _join(
        self, far: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor], first: tuple[Tensor | None, Tensor | None],
        views: _Views, table: Tensor, query: Tensor, output: Tensor,
    ) -> None:  # fmt: skip
        layout, decode = self.layout, self._decode[1]
        shared = layout.heads // layout.kv_heads
        columns = min(JOINED, padded(layout.sizes[1]))
        join_kernel[len(query), layout.kv_heads, triton.cdiv(layout.sizes[1], columns)](
            *far, *near, *first, query, *views.means, table, decode, output, layout.scale,
            shared, *layout.sizes, decode.shape[2], *query.stride()[:2], *output.stride()[:2], *decode.stride()[:2],
            *_strides(views.means[0], 2), *_strides(views.means[1], 2), table.stride(0),
            BLOCK_M=padded(shared), BLOCK_D=BLOCK_D, BLOCK_E=columns, BLOCK_R=SUMMED,
        )  # fmt: skip


def _part(cache: Tensor, start: int, heads: int, numbers: int, dtype: torch.dtype) -> Tensor:
    """Return a view of a cache uint8 [blocks,1,size,bytes] as [blocks, heads, size, elements] of `dtype`."""
    rows = cache[:, 0, :, start : start + heads * numbers * dtype.itemsize]
    return rows.view(dtype).unflatten(2, (heads, numbers)).transpose(1, 2)


def _pair(x: list[Any]) -> tuple[Any, Any]:
    first, second = x
    return first, second


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Return the first strides of a tensor, or zeros without one."""
    return (0,) * count if x is None else x.stride()[:count]


def _sides(
    rows: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return keys, their scales, values, their scales, as `TritonKernel` takes them."""
    return rows[0], scales[0], rows[1], scales[1]


def _coded(tiers: Tiers, width: int) -> int:
    """Return the number of channels with fewer than 16 bits, at least 1; if latents are not quantized, all R."""
    return max(1, sum(w for bits, w, _ in tiers if bits < 16)) if tiers else width
