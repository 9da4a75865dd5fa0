"""A decode step on an engine's blocks in Triton kernels (fhopt/codegen/gpu/block_tables.py), on a GPU.

If every sequence has one new token, nothing is copied to the host: lengths and block tables are in engine memory that
is updated before each step, so that a CUDA graph can record it. Equivalent to `LayerCache.write` and
`decode_step.attend_step`, which are the fallback without kernels and the reference in tests. In a batch with prefill,
kernels run attention of the decoding sequences, and torch operations write.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.serving.batch import Batch
from fhopt.serving.compiled_step import layout_of
from fhopt.serving.layer_rows import Caches, LayerRows
from fhopt.system import has_triton

if TYPE_CHECKING:
    from fhopt.codegen.gpu.block_launch import StepBlocks, TritonBlockAttention

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DeviceStep:
    """The decode step of one layer."""

    def __init__(self, attention: TritonBlockAttention) -> None:
        self._attention = attention

    def serves(self, caches: Caches, query: Tensor) -> bool:
        """Return whether the step supports the sequences with one new token."""
        batch, held = caches.batch, (caches.latents, caches.window, caches.first)
        tables = all(one.blocks.table.dtype == torch.int32 and one.blocks.table.stride(1) == 1 for one in held)
        some = batch.is_step or bool(batch.singles)
        return some and tables and self._attention.serves(query, *(one.cache for one in held))

    def writes(self, batch: Batch) -> bool:
        """Return whether the step can write the new tokens, too: all sequences have one."""
        return batch.is_step

    def __call__(
        self, caches: Caches, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, writes: bool
    ) -> None:
        """Write new tokens if `writes`, and attend with queries [T,H,D] of decoding sequences into `output` [T,H,E].

        keys [T,G,D], values [T,G,E]: of the batch's new tokens, and of padding that the engine may have added.
        """
        batch = caches.batch
        if batch.is_step:
            count = batch.tokens
            query, keys, values, output = (x[:count] for x in (query, keys, values, output))
            tables = [one.blocks.table[:count] for one in (caches.latents, caches.window, caches.first)]
            blocks = self._blocks(caches, tables)
            self._attention(batch.lengths_there[:count], blocks, query, keys, values, output, writes)
            return
        assert not writes, "torch operations write where a sequence has several new tokens"
        singles = self._singles(caches)
        part = query.new_empty((len(singles.tokens), *output.shape[1:]), dtype=output.dtype)
        blocks = self._blocks(caches, singles.tables)
        self._attention(singles.lengths, blocks, query[singles.tokens], query, query, part, writes=False)
        output[singles.tokens] = part

    @staticmethod
    def _blocks(caches: Caches, tables: list[Tensor]) -> StepBlocks:
        from fhopt.codegen.gpu.block_launch import DeviceBlocks, StepBlocks

        held = caches.latents.cache, caches.window.cache, caches.first.cache
        return StepBlocks(*(DeviceBlocks(cache, table) for cache, table in zip(held, tables, strict=True)))

    @staticmethod
    def _singles(caches: Caches) -> _Singles:
        """Return the decoding sequences of a mixed batch, cached for layers that share blocks."""
        batch, held = caches.batch, (caches.latents, caches.window, caches.first)
        key = "singles", *(id(one.blocks) for one in held)
        if key not in batch.made:
            rows = torch.tensor([(one.begin, one.index) for one in batch.singles], device=batch.device)
            tokens, owners = rows.unbind(1)
            tables = [one.blocks.table[owners] for one in held]
            batch.made[key] = _Singles(tokens, batch.lengths_there[owners], tables)
        singles: _Singles = batch.made[key]
        return singles


class _Singles(NamedTuple):
    """Decoding sequences: batch indices of their tokens, int64, lengths int32, rows of the three block tables."""

    tokens: Tensor
    lengths: Tensor
    tables: list[Tensor]


def device_step(layer: LayerRows, device: torch.device) -> DeviceStep | None:
    """Build the decode step of a layer on a GPU; None, with a warning, if there are no kernels for it."""
    reason = _objection(layer, device)
    if not reason:
        from fhopt.codegen.gpu.block_launch import TritonBlockAttention  # deferred: importing Triton takes a second

        try:
            return DeviceStep(TritonBlockAttention(layout_of(layer, layer.dtype), device))
        except FhoptError as error:
            reason = str(error)
    log.warning("%s: decode steps run on torch operations, slower: %s", layer.site.site.name, reason)
    return None


def _objection(layer: LayerRows, device: torch.device) -> str:
    """Return why a layer has no kernels on a device; empty if it has."""
    if device.type != "cuda":
        return f"kernels exist only for CUDA and ROCm, not for {device.type}."
    if not has_triton():
        return "Triton is not installed. Install it with: pip install 'triton>=3.6'."
    if layer.rotation is not None:
        return "GPU kernels do not support segments. Refit with --segment 0."
    if layer.dtype not in DTYPES:
        return f"no kernel supports {layer.dtype}; expected one of {', '.join(map(str, DTYPES))}."
    return ""
