"""The caches of one layer in a serving engine's blocks: writes of new tokens, and attention.

Letters: H query heads, G kv heads, T tokens, D and E head size of keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import CacheView, SideRows
from fhopt.ops.masks import additive, causal_mask
from fhopt.ops.prefill_attention import attend_on_cpu
from fhopt.serving.batch import Batch, QueryTile, Sequence, place_rows, split_queries
from fhopt.serving.compiled_step import compiled_step
from fhopt.serving.decode_step import AttendedRows, attend_step
from fhopt.serving.device_step import device_step
from fhopt.serving.layer_rows import Caches, LayerRows

FEW_QUERIES = 4  # maximum queries per tile with absorption; above it, keys and values are reconstructed


class BlockStepKernels(Protocol):
    """Kernels for cache writes and attention of sequences with one new token."""

    def serves(self, caches: Caches, query: Tensor) -> bool:
        """Return whether there are such sequences and the kernels support these tensors."""

    def writes(self, batch: Batch) -> bool:
        """Return whether the kernels can write the new tokens of a batch, too."""

    def __call__(
        self, caches: Caches, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, writes: bool
    ) -> None:
        """Write the new tokens if `writes`, and attend with queries [T,H,D] of these sequences into `output` [T,H,E].

        All tensors may be longer than the batch's tokens: an engine pads batches.
        """


class LayerCache(LayerRows):
    """Cache writes and attention of one layer. compiled: its decode step in kernels, if any."""

    compiled: BlockStepKernels | None = None

    def compile(self) -> None:
        """Build the decode step: one native call on CPU, Triton kernels on GPU.

        If that fails, steps run on torch operations, and the log says why.
        """
        self.compiled = compiled_step(self, self.dtype) if self.device.type == "cpu" else device_step(self, self.device)

    def write_and_attend(self, caches: Caches, query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """Write keys [T,G,D] and values [T,G,E] of the batch's new tokens; attend with their queries [T,H,D].

        Fills output [T,H,E]. All tensors may be longer than the batch's tokens; padding is ignored.
        """
        batch, step = caches.batch, self.compiled
        if step and step.writes(batch) and step.serves(caches, query):
            step(caches, query, keys, values, output, writes=True)
        else:
            count = batch.tokens
            rows = self.write(caches, keys[:count], values[:count])
            self.attend(caches, query[:count], rows, output[:count])

    # ---- writing

    def write(self, caches: Caches, keys: Tensor, values: Tensor) -> Tensor:
        """Write keys [T,G,D] and values [T,G,E] of the batch's new tokens to all caches.

        Returns their rows of the residual window, uint8 [T,bytes].
        """
        rows = self.window_rows.rows(keys, values)
        caches.window.blocks.write_new(caches.window.cache, rows)
        for one in caches.batch.sequences:
            if one.start == 0 and (self.window.sinks or self.means_from):
                caches.page(one).zero_()  # a reused block; there are no means yet
            if one.start < self.window.sinks:
                self._write_sinks(caches, one, keys, values)
        gaining = caches.batch.gaining_means(self.means_from)
        taken = [self._first_tokens(caches, one, rows) for one in gaining]
        for one, (first_keys, first_values) in zip(gaining, taken, strict=True):
            self._write_means(caches, one, first_keys, first_values)
        for one, first in zip(gaining, taken, strict=True):
            behind = slice(max(one.begin, one.begin + self.means_from - one.start), one.end)
            whole = [torch.cat([x, y[behind].float()]) for x, y in zip(first, (keys, values), strict=True)]
            places = torch.arange(self.window.sinks, one.stop, device=keys.device)
            owners = torch.full_like(places, one.index)
            self._write_latents(caches, owners, places, *whole)
        self._write_encoded(caches, keys, values)
        return rows

    def _write_sinks(self, caches: Caches, one: Sequence, keys: Tensor, values: Tensor) -> None:
        new = slice(one.begin, min(one.end, one.begin + self.window.sinks - one.start))
        self.first_rows.write_sinks(caches.page(one), one.start, keys[new], values[new])

    def _first_tokens(self, caches: Caches, one: Sequence, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 keys and values of the tokens that the means cover, as stored in the residual window."""
        old, new = min(one.start, self.means_from), max(one.start, self.window.sinks)
        parts = [rows[one.begin + new - one.start : one.begin + self.means_from - one.start]]
        if old > self.window.sinks:
            parts.insert(0, caches.window.read(one, self.window.sinks, old)[:, : rows.shape[1]])
        return self.window_rows.read(torch.cat(parts), torch.float32)

    def _write_means(self, caches: Caches, one: Sequence, keys: Tensor, values: Tensor) -> None:
        self.first_rows.write_means(caches.page(one), (keys.mean(0), values.mean(0)))

    def _write_encoded(self, caches: Caches, keys: Tensor, values: Tensor) -> None:
        """Write packed latents of new tokens of sequences that already had means or need none."""
        batch = caches.batch
        chosen = batch.encoded(self.means_from)
        owners, positions = batch.owners, batch.positions
        if chosen is not None:
            keys, values, owners, positions = keys[chosen], values[chosen], owners[chosen], positions[chosen]
        if len(owners):
            self._write_latents(caches, owners, positions, keys.float(), values.float())

    def _write_latents(self, caches: Caches, owners: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.rotation is not None:
            keys = self.rotation.relative(keys.transpose(0, 1)[None], positions - self.window.sinks)[0].transpose(0, 1)
        if self.means_from:
            blocks = caches.first.blocks.table[:, 0].long()
            key_mean, value_mean = self.first_rows.read_means(caches.first.cache[blocks, 0, 0])
            keys, values = keys - key_mean[owners], values - value_mean[owners]
        rows = torch.empty((len(keys), self.latent_rows.size), dtype=torch.uint8, device=keys.device)
        self.latent_rows.write(keys, values, rows)
        blocks, offsets = caches.latents.blocks.places(owners, positions)
        place_rows(caches.latents.cache, blocks, offsets, rows)

    # ---- attention

    def attend(self, caches: Caches, query: Tensor, rows: Tensor, output: Tensor) -> None:
        """Attend with the queries [T,H,D] of the batch's new tokens into `output` [T,H,E].

        rows uint8 [T,bytes]: of the new tokens, as returned by `write`.
        """
        batch = caches.batch
        if self.compiled and self.compiled.serves(caches, query):
            self.compiled(caches, query, query, query, output, writes=False)
        elif batch.singles:
            step = AttendedRows.of(batch, self.window)
            out = attend_step(self, caches, step, query[step.tokens].unsqueeze(2))
            output[step.tokens] = out[:, :, 0].to(output.dtype)
        for one in batch.several:
            reader = _Reader(self, caches, one, rows[one.begin : one.end], query.dtype)
            attended = reader.attend_at_once(query[one.begin : one.end].transpose(0, 1)[None])
            if attended is not None:
                output[one.begin : one.end] = attended[0].transpose(0, 1).to(output.dtype)
                continue
            for tile in split_queries(self.window, one.start, one.stop):
                new = slice(one.begin + tile.start - one.start, one.begin + tile.stop - one.start)
                out = reader.attend(tile, query[new].transpose(0, 1)[None])
                output[new] = out[0].transpose(0, 1).to(output.dtype)


class _Reader:
    """Attention of one prefilling sequence, with inputs loaded once for all of its tiles.

    Later tiles attend to more tokens as latents. One buffer for all tiles holds the reconstructed keys and values,
    which overwrite those of the residual window used by earlier tiles.
    """

    def __init__(self, layer: LayerCache, caches: Caches, one: Sequence, rows: Tensor, dtype: torch.dtype) -> None:
        self.layer, self.one, self.dtype, self.made = layer, one, dtype, caches.batch.made
        self.start = layer.window.sinks + layer.window.quantized_tokens(one.start)  # the window's first token
        self.quantized = layer.window.quantized_tokens(one.stop - 1)
        page = caches.page(one)
        self.sinks = layer.first_rows.read_sinks(page)
        self.means: tuple[Tensor | None, Tensor | None] = (None, None)
        if layer.means_from:
            key_mean, value_mean = layer.first_rows.read_means(page)
            self.means = key_mean.unsqueeze(2), value_mean.unsqueeze(2)
        self.open = self._window(caches, rows)
        self.sides = self._sides(caches) if self.quantized else None
        self._placed = layer.window.quantized_tokens(one.start)  # reconstructed tokens in `_whole`

    def _window(self, caches: Caches, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [1,G,N,D] and values of the residual window from `start` on, followed by new tokens."""
        one, codec, parts = self.one, self.layer.window_rows, []
        if one.start > self.start:
            parts.append(caches.window.read(one, self.start, one.start)[:, : codec.size])
        parts.append(rows[max(0, self.start - one.start) :])
        key, value = codec.read(torch.cat(parts) if len(parts) > 1 else parts[0], self.dtype)
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]

    def _sides(self, caches: Caches) -> tuple[SideRows, SideRows]:
        sinks = self.layer.window.sinks
        rows = caches.latents.read(self.one, sinks, sinks + self.quantized)
        packed = self.layer.latent_rows.read(rows)
        parts = zip(self.layer.groups, packed, self.layer.decode, self.means, strict=True)
        key, value = (SideRows(groups, *latents, decode, mean=mean) for groups, latents, decode, mean in parts)
        return replace(key, rotation=self.layer.rotation), value

    def attend(self, tile: QueryTile, query: Tensor) -> Tensor:
        """Attend with the queries [1,H,S,D] of a tile: [1,H,S,E]."""
        if not tile.quantized or self.sides is None or query.shape[2] > FEW_QUERIES:
            return self._plain(tile, query)
        sinks = min(self.layer.window.sinks, tile.stop)
        opened = slice(self.layer.window.sinks + tile.quantized - self.start, max(0, tile.stop - self.start))
        parts = zip(self.sinks, self.open, strict=True)
        keys, values = (torch.cat([x[:, :, :sinks], w[:, :, opened]], 2) for x, w in parts)
        key, value = (_first(side, tile.quantized) for side in self.sides)
        latents = CacheView(key, value, sinks, tile.quantized)
        return attend(query, keys, values, latents, None, scale=self.layer.scale)

    def attend_at_once(self, query: Tensor) -> Tensor | None:
        """Attend with all new queries [1,H,S,D] of the sequence: [1,H,S,E]; None if there is no CPU kernel for it.

        Each query has two spans: of first tokens and reconstructed latents, and of the residual window.
        """
        near, far = self._spans()
        numbers = {"scale": self.layer.scale, "softcap": 0.0}
        opened = attend_on_cpu("open_attention", query, *self.open, None, spans=near, **numbers)
        behind = opened and attend_on_cpu("open_attention", query, *self._behind_sinks, None, spans=far, **numbers)
        if opened is None or behind is None:
            return None
        (out, lse), (other, other_lse) = opened, behind
        return out.lerp_(other, torch.sigmoid(other_lse - lse).unsqueeze(-1))  # each query sees a key in one of them

    def _spans(self) -> tuple[Tensor, Tensor]:
        """Return the spans of each query, int64 [S,2]: in `open`, and in `_behind_sinks`."""
        key = "spans", self.layer.window, self.one.start, self.one.stop
        if key not in self.made:
            sinks, at = self.layer.window.sinks, torch.arange(self.one.start, self.one.stop)
            far = torch.where(at < sinks, at + 1, sinks + self.layer.window.quantized_tokens(at))
            near = torch.stack([sinks + self.layer.window.quantized_tokens(at), at + 1], -1) - self.start
            self.made[key] = near.contiguous(), torch.stack([torch.zeros_like(far), far], -1)
        spans: tuple[Tensor, Tensor] = self.made[key]
        return spans

    @cached_property
    def _behind_sinks(self) -> tuple[Tensor, Tensor]:
        """Keys [1,G,T,D] and values of the first tokens, followed by all packed latents."""
        parts = zip(self.sinks, self._far, strict=True)
        key, value = (torch.cat([first[:, :, : self.one.stop].to(self.dtype), far], 2) for first, far in parts)
        return key, value

    @cached_property
    def _far(self) -> tuple[Tensor, Tensor]:
        """Keys [1,G,V,D] and values of all packed latents."""
        if self.sides is None:
            return self.open[0][:, :, :0], self.open[1][:, :, :0]
        key, value = (side.reconstruct().to(self.dtype) for side in self.sides)
        return key, value

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        """Keys [1,G,T,D] and values of all tokens, as the first tile uses them."""
        sinks = min(self.layer.window.sinks, self.one.stop)
        parts = zip(self.sinks, self._far, self.open, strict=True)
        key, value = (
            torch.cat([first[:, :, :sinks].to(self.dtype), far[:, :, : self._placed], near], 2)
            for first, far, near in parts
        )
        return key, value

    def _plain(self, tile: QueryTile, query: Tensor) -> Tensor:
        """Attend to keys and values of all tokens, some of them reconstructed from latents."""
        sinks, (key, value) = self.layer.window.sinks, self._whole
        if tile.quantized > self._placed:
            for whole, far in zip((key, value), self._far, strict=True):
                whole[:, :, sinks + self._placed : sinks + tile.quantized] = far[:, :, self._placed : tile.quantized]
            self._placed = tile.quantized
        heads, groups, count = query.shape[1], key.shape[1], query.shape[2]
        key, value = key[:, :, : tile.stop], value[:, :, : tile.stop]
        grouped = query.reshape(1, groups, heads // groups * count, -1)  # [1, G, H/G*S, D]
        mask = self._mask(count, heads // groups)[:, -tile.stop :] if count > 1 else None
        out = F.scaled_dot_product_attention(grouped, key, value, mask, scale=self.layer.scale)
        return out.view(1, heads, count, -1)

    def _mask(self, count: int, shared: int) -> Tensor:
        """Return an additive causal mask for the last `count` tokens and `shared` query heads, [shared * count, T]."""
        key = "mask", count, shared, self.one.stop, self.dtype
        if key not in self.made:
            causal = additive(causal_mask(count, self.one.stop, self.open[0].device), self.dtype)
            assert causal is not None
            self.made[key] = causal.repeat(shared, 1)
        mask: Tensor = self.made[key]
        return mask


def _first(side: SideRows, count: int) -> SideRows:
    """Return the first `count` packed latents of a side."""
    if side.rows.shape[2] == count:
        return side
    return side.part(0, count)
