"""Joint quantization of all layers and heads of a token, with keys before RoPE.

    keys [L,B,G,N,D] of a block  ->  rotate back to position zero  ->  the codec  ->  rotate again  ->  the cache

A block leaves the recent window in every layer of a call before it is quantized, after the last layer. The call that
adds it still attends to it in full precision, as with `RoundTripLayer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from benchmarks.quality.methods.quantized_caches import BlockCodec, CacheShape, Schedule, replaced
from benchmarks.quality.methods.rotary_embedding import Rotary


class JointCodec(Protocol):
    """The quantizer of a method that codes all layers of a token jointly."""

    @property
    def family(self) -> str:
        """Name of the method."""

    @property
    def name(self) -> str:
        """Name of the method at this size."""

    def token_bytes(self, shape: CacheShape) -> float:
        """Return the bytes of one token, keys and values of all heads and layers."""

    def keys(self, x: Tensor) -> Tensor:
        """Return keys x [L,B,G,N,D], given before RoPE, quantized and dequantized."""

    def values(self, x: Tensor) -> Tensor:
        """Return values x [L,B,G,N,D], quantized and dequantized."""


class JointCache(Cache):  # type: ignore[misc]
    """A cache that quantizes a block in all layers at once; tokens are stored dequantized by the codec."""

    def __init__(self, codec: JointCodec, schedule: Schedule, layers: int, rotary: Rotary) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])
        self.codec, self.schedule, self.rotary = codec, schedule, rotary
        self.quantized = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D] to a layer; within the call, its tokens are attended to in full precision."""
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        until = self.schedule.quantized(updated[0].shape[2])
        if layer_idx == len(self.layers) - 1 and until > self.quantized:
            self._quantize(self.schedule.sinks + self.quantized, self.schedule.sinks + until)
            self.quantized = until
        return updated

    def _quantize(self, start: int, stop: int) -> None:
        keys, values = (
            torch.stack([getattr(layer, side)[:, :, start:stop].float() for layer in self.layers])
            for side in ("keys", "values")
        )
        positions = torch.arange(start, stop)
        keys = self.rotary.redo(self.codec.keys(self.rotary.undo(keys, positions)), positions)
        for layer, key, value in zip(self.layers, keys, self.codec.values(values), strict=True):
            layer.keys = replaced(layer.keys, start, stop, key)
            layer.values = replaced(layer.values, start, stop, value)


@dataclass(frozen=True)
class JointBlocks(BlockCodec):
    """A codec that quantizes all layers and heads of a token together."""

    codec: JointCodec

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache."""
        return JointCache(self.codec, self.schedule, CacheShape.of(model).layers, Rotary.of(model))

    def token_bytes(self, shape: CacheShape) -> float:
        """Return the bytes of one quantized token, keys and values of all heads and layers."""
        return self.codec.token_bytes(shape)
