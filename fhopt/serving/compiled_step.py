"""A decode step on an engine's blocks as one native call per layer (fhopt/codegen/cpu/block_tables.py).

Equivalent to `LayerCache.write` and `decode_step.attend_step`, which are the fallback without a compiler and the
reference in tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.codegen.block_layout import BlockLayout, SideLayout
from fhopt.codegen.cpu.block_tables import BlockAttention, Struct, attention_of, step_of, table_of
from fhopt.plan.site_plan import SidePlan, SitePlan
from fhopt.serving.batch import Batch, SequenceBlocks
from fhopt.serving.layer_rows import Caches, LayerRows
from fhopt.serving.rows import RowPart


class CompiledStep:
    """The decode step of one layer."""

    def __init__(self, layer: LayerRows, attention: BlockAttention) -> None:
        self.window, self.means_from, self._attention = layer.window, layer.means_from, attention
        self._writes, self._step = f"writes {self.window} {self.means_from}", f"step {self.window}"

    def serves(self, caches: Caches, query: Tensor) -> bool:
        """Return whether the step supports the sequences with one new token."""
        memory = caches.latents.cache, caches.window.cache, caches.first.cache
        return bool(caches.batch.singles) and self._attention.serves(query, *memory)

    def writes(self, batch: Batch) -> bool:
        """Return whether the step can write the new tokens, too.

        Requires that all sequences have one new token, after the attention sinks, and none completes its means with it.
        """
        made = batch.made
        if self._writes not in made:
            plain = all(one.start >= self.window.sinks for one in batch.singles)
            made[self._writes] = plain and not batch.several and not batch.gaining_means(self.means_from)
        return bool(made[self._writes])

    def __call__(
        self, caches: Caches, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, writes: bool
    ) -> None:
        """Write new tokens if `writes`, and attend with queries [T,H,D] of decoding sequences into `output` [T,H,E].

        keys [T,G,D], values [T,G,E]: of the batch's new tokens, and of padding that the engine may have added.
        """
        latents, window, first = caches.latents, caches.window, caches.first
        memory = latents.cache, window.cache, first.cache
        tables = _table(latents.blocks), _table(window.blocks), _table(first.blocks)
        self._attention(self._numbers(caches.batch), memory, tables, query, keys, values, output, writes)

    def _numbers(self, batch: Batch) -> Struct:
        made = batch.made
        if self._step not in made:
            quantized = self.window.quantized_tokens
            made[self._step] = step_of(
                [(one.begin, one.index, one.start, quantized(one.start)) for one in batch.singles]
            )
        numbers: Struct = made[self._step]
        return numbers


def _table(blocks: SequenceBlocks) -> Struct:
    if blocks.compiled is None:
        blocks.compiled = table_of(blocks.table, blocks.size)
    table: Struct = blocks.compiled
    return table


def compiled_step(layer: LayerRows, dtype: torch.dtype) -> CompiledStep | None:
    """Build the decode step of a layer for a model dtype; None if nothing can be compiled."""
    attention = attention_of(layout_of(layer, dtype))
    return None if attention is None else CompiledStep(layer, attention)


def layout_of(layer: LayerRows, dtype: torch.dtype) -> BlockLayout:
    """Return the layout of the rows of a layer's caches."""
    site, sides = layer.site.site, _sides(layer.site, layer)
    first_parts = [*layer.first_rows.sink_parts, *layer.first_rows.mean_parts]
    return BlockLayout(
        heads=site.heads, kv_heads=site.kv_heads, sizes=(site.key_dim, site.value_dim), dtype=dtype, scale=layer.scale,
        key=sides[0], value=sides[1], is_shared=layer.site.is_shared,
        window=layer.window, window_rows=_starts(layer.window_rows.parts), first_rows=_starts(first_parts),
        means_from=layer.means_from, rotation=layer.rotation,
    )  # fmt: skip


def _starts(parts: list[RowPart]) -> tuple[int, int, int, int]:
    """Return the start bytes of up to four parts of a row; 0 for missing parts."""
    first, second, third, fourth = [*(part.start for part in parts), 0, 0][:4]
    return first, second, third, fourth


def _sides(plan: SitePlan, layer: LayerRows) -> tuple[SideLayout, SideLayout]:
    parts = iter(layer.latent_rows.parts)
    found = []
    for side in layer.latent_rows.sides:
        latents = next(parts)
        scale = next(parts).start if side.tiers else 0
        found.append((side, latents.start, scale, latents.numbers * latents.dtype.itemsize))
    key, value = found[0], found[-1]
    return _side(plan.key, *key), _side(plan.value, *value)


def _side(own: SidePlan, stored: SidePlan, start: int, scale: int, size: int) -> SideLayout:
    """Return the layout of one side, whose latents are those of `stored`."""
    tiers = tuple((tier.bits, tier.width, tier.step) for tier in stored.tiers)
    return SideLayout(stored.encode, own.decode, tiers, size, start, scale)
