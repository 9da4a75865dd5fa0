"""A decode step on an engine's blocks, batched over the sequences with one new token each.

In torch operations, as the fallback for the native code of `compiled_step` and the Triton kernels of `device_step`.

Rows of all sequences are gathered and padded to the longest sequence, with masks. Masks and slots are the same for all
layers: `AttendedRows` are made once per batch.

Letters: B sequences, H query heads, G kv heads, J latent heads, N open tokens, V packed latents, D head size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fhopt.attention.attend import attend_parts
from fhopt.attention.cache_view import SideRows
from fhopt.attention.operands import AttentionOperands, PartMasks
from fhopt.plan.window import ResidualWindow
from fhopt.serving.batch import Batch, SequenceBlocks
from fhopt.serving.layer_rows import Caches, LayerRows


class AttendedRows:
    """Rows that the queries of a decode step attend to.

    tokens [B]: batch index of each sequence's new token. quantized int64 [B]: tokens attended as latents. opened bool
    [B,1,1,N]: mask of attention sinks and window rows.
    """

    def __init__(self, batch: Batch, window: ResidualWindow) -> None:
        singles, device = batch.singles, batch.device
        self.tokens = torch.tensor([one.begin for one in singles], device=device)
        self.owners = torch.tensor([one.index for one in singles], device=device)
        at = torch.tensor([one.start for one in singles])  # positions of the queries
        counts = torch.tensor([window.quantized_tokens(one.start) for one in singles])
        self.most, self.sinks = int(counts.max()), window.sinks
        start = window.sinks + counts
        grid = start.unsqueeze(1) + torch.arange(max(1, int((at + 1 - start).max())))
        first = torch.arange(window.sinks).expand(len(singles), -1)
        seen = torch.cat([first, grid], 1) <= at.unsqueeze(1)
        self.opened = seen[:, None, None].to(device)
        self.positions = torch.minimum(grid, at.unsqueeze(1)).to(device)
        self.quantized = counts.to(device)
        self.absent = (torch.arange(self.most) >= counts.unsqueeze(1)).unsqueeze(1).to(device)  # [B, 1, V]
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        self._latents: tuple[Tensor, int] | None = None

    @staticmethod
    def of(batch: Batch, window: ResidualWindow) -> AttendedRows:
        """Return the step of a batch, made once for all layers."""
        if window not in batch.made:
            batch.made[window] = AttendedRows(batch, window)
        step: AttendedRows = batch.made[window]
        return step

    def window_places(self, blocks: SequenceBlocks) -> tuple[Tensor, Tensor]:
        """Return blocks and offsets of the window's rows, int64 [B,N] each."""
        if id(blocks) not in self._places:
            self._places[id(blocks)] = blocks.places(self.owners.unsqueeze(1), self.positions)
        return self._places[id(blocks)]

    def latent_blocks(self, blocks: SequenceBlocks) -> tuple[Tensor, int]:
        """Return the blocks [B,n] of packed latents, and the offset of the first row in the first block."""
        if self._latents is None:
            self._latents = blocks.span(self.owners, self.sinks, self.sinks + self.most)
        return self._latents


def attend_step(layer: LayerRows, caches: Caches, step: AttendedRows, query: Tensor) -> Tensor:
    """Attend with the queries [B,H,1,D] of a decode step: [B,H,1,E]."""
    pages = caches.first.cache[caches.first.blocks.table[step.owners, 0].long(), 0, 0]  # [B, bytes]
    key, value = _open_tokens(layer, caches, step, pages, query.dtype)
    means: tuple[Tensor | None, Tensor | None] = (None, None)
    if layer.means_from:
        key_mean, value_mean = layer.first_rows.read_means(pages)
        means = key_mean.unsqueeze(2), value_mean.unsqueeze(2)
    key_side, value_side = _sides(layer, caches, step, means)
    masks = PartMasks(exact=step.opened, lengths=step.quantized if step.most else None)
    return attend_parts(AttentionOperands(query, key, value, key_side, value_side, masks, layer.scale))


def _open_tokens(
    layer: LayerRows, caches: Caches, step: AttendedRows, pages: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return keys [B,G,N,D] and values [B,G,N,E] of attention sinks and residual window."""
    blocks, places = step.window_places(caches.window.blocks)
    rows = caches.window.cache[blocks, 0, places]  # [B, N, bytes]
    window = layer.window_rows.read(rows.flatten(0, 1), dtype)
    sinks = layer.first_rows.read_sinks(pages)
    count = len(blocks)
    parts = zip(sinks, window, strict=True)
    key, value = (torch.cat([s.to(dtype), w.unflatten(0, (count, -1)).transpose(1, 2)], 2) for s, w in parts)
    return key, value


def _sides(
    layer: LayerRows, caches: Caches, step: AttendedRows, means: tuple[Tensor | None, Tensor | None]
) -> tuple[SideRows, SideRows]:
    """Return packed latents [B,J,V,...] of all sequences; padding rows are 0."""
    blocks, first = step.latent_blocks(caches.latents.blocks)
    rows = caches.latents.cache[blocks, 0].flatten(1, 2)[:, first : first + step.most]  # [B, V, bytes]
    packed = layer.latent_rows.read(rows.reshape(-1, rows.shape[2]))
    sides = []
    for groups, (latents, scale), decode, mean in zip(layer.groups, packed, layer.decode, means, strict=True):
        z = latents[0].unflatten(1, (len(blocks), step.most)).transpose(0, 1)
        if scale is None or 16 in groups.bits:
            z = z.masked_fill(step.absent.unsqueeze(3), 0)
        if scale is not None:
            scale = scale[0].unflatten(1, (len(blocks), step.most)).transpose(0, 1).masked_fill(step.absent, 0)
        sides.append(SideRows(groups, z, scale, decode, mean=mean))
    return replace(sides[0], rotation=layer.rotation), sides[1]
