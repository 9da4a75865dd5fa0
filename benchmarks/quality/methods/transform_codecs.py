"""Quantization of keys and values in bases fitted to the calibration set, and the bytes.

    low-rank    a token's key and value in a head: 2 (2 r)          r 16-bit coordinates, nothing else
    aatc        a token: 2 (L G D n / 8 + 2 L G / h)                n bits per channel on average, a 16-bit scale per
                                                                    group of h heads of a layer

Low-rank caches: ASVD (arXiv 2312.05821) and Palu (2407.21118); here the plain form, one rank for all heads, bases from
second moments.

AATC, attention-aware transform coding: arXiv 2608.14191. Its abstract and summaries of it were used, not its body; so
this is the plain form of their description. The whitened decomposition of the key and value projections of a group of
heads has the eigenvectors of the covariance of keys, before RoPE, and of values as its basis (the Karhunen-Loeve
transform). A channel u of it with variance s has the expected effect on the output of attention w s:

    keys      w = sum over channels c of u_c^2 E[q_c^2 sum_i a_i^2 |(v_i - o) W_O|^2] scale^2
    values    w = u^T E[sum_i a_i^2 W_O W_O^T] u

and reverse water-filling gives it max(0, log2(w s / level) / 2) bits, rounded, with one level for all layers, keys and
values. A token is divided by its largest magnitude in units of the calibrated deviations, and rounded uniformly. A
rotation that depends on their distance separates a query and a key: both channels of a RoPE pair have their mean
weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.methods.calibration_moments import AttentionMoments, TokenMoments
from benchmarks.quality.methods.quantized_caches import NUMBER_BYTES, SMALLEST_SCALE, CacheShape, Schedule, to_16_bits

MAX_BITS = 8  # per channel
HEADS = 4  # max per group
BISECTIONS = 100
TINY = 1e-30


# --------------------------------------------------------------------------------------------------- low rank


@dataclass(frozen=True, eq=False)
class LowRank:
    """The coordinates of keys and values in orthonormal bases [G, D, r], two per layer."""

    bases: Sequence[tuple[Tensor, Tensor]]
    family: str = "low-rank"

    @property
    def rank(self) -> int:
        """Rank of the bases, the same in all heads."""
        return self.bases[0][0].shape[2]

    @property
    def name(self) -> str:
        """Family and rank."""
        return f"{self.family}-{self.rank}"

    def token_bytes(self, head_dim: int) -> float:
        """Return the bytes of r coordinates of the key and r of the value."""
        return 2 * self.rank * NUMBER_BYTES

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Project keys onto the span of the key basis."""
        return _project(x, self.bases[layer][0])

    def value(self, x: Tensor, layer: int) -> Tensor:
        """Project values onto the span of the value basis."""
        return _project(x, self.bases[layer][1])


def _project(x: Tensor, basis: Tensor) -> Tensor:
    basis = basis.to(x)
    return x @ basis @ basis.mT


def low_rank(moments: Sequence[tuple[Tensor, Tensor]], rank: int) -> LowRank:
    """Return the bases with the most energy: the leading eigenvectors of each head's second moment."""
    return LowRank([(_leading(key, rank), _leading(value, rank)) for key, value in moments])


def _leading(moment: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(moment)[1][..., -rank:].float()


def rank_for(ratio: float, shape: CacheShape, schedule: Schedule, tokens: int) -> int:
    """Return the smallest rank whose cache is not smaller than that of `ratio`, at `tokens` tokens."""
    quantized = schedule.quantized(tokens)
    left = tokens / ratio - (tokens - quantized)  # in full-precision tokens
    return min(shape.head_dim, max(1, math.ceil(shape.head_dim * left / quantized)))


# --------------------------------------------------------------------------------------------------- AATC


@dataclass(frozen=True, eq=False)
class ChannelTransform:
    """A basis [C, C] for the C = h D channels of h heads of a layer, with the mean [C] of its inputs.

    deviation, weight: [C] of its channels. bits: [C], integers, zero for dropped channels.
    """

    basis: Tensor
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bits: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize rows x [..., C]."""
        basis, mean, deviation = self.basis.to(x), self.mean.to(x), self.deviation.to(x)
        latent = (x - mean) @ basis / deviation
        kept = (self.bits > 0).to(x.device)
        scale = to_16_bits((latent * kept).abs().amax(-1, keepdim=True)).clamp_min(SMALLEST_SCALE)
        levels = 2.0 ** self.bits.to(x)
        codes = ((latent / scale + 1) / 2 * levels).floor().clamp_min(0).minimum(levels - 1)
        rounded = ((codes + 0.5) / levels * 2 - 1) * scale * kept
        return rounded * deviation @ basis.mT + mean


@dataclass(frozen=True, eq=False)
class Aatc:
    """Attention-aware transform coding, with a transform per group of h heads of each layer: [L][G / h]."""

    key_transforms: Sequence[Sequence[ChannelTransform]]
    value_transforms: Sequence[Sequence[ChannelTransform]]
    target: float
    family: str = "aatc"

    @property
    def name(self) -> str:
        """Family and average bits per channel."""
        return f"{self.family}-{self.target:g}bit"

    def token_bytes(self, shape: CacheShape) -> float:
        """Return bytes of quantized values and of a 16-bit scale per group of heads, of keys and values."""
        transforms = [t for side in (self.key_transforms, self.value_transforms) for layer in side for t in layer]
        return sum(float(t.bits.sum()) / 8 + NUMBER_BYTES for t in transforms)

    def keys(self, x: Tensor) -> Tensor:
        """Quantize and dequantize keys x [L,B,G,N,D], given before RoPE."""
        return _transformed(x, self.key_transforms)

    def values(self, x: Tensor) -> Tensor:
        """Quantize and dequantize values x [L,B,G,N,D]."""
        return _transformed(x, self.value_transforms)


def _transformed(x: Tensor, transforms: Sequence[Sequence[ChannelTransform]]) -> Tensor:
    layers = []
    for heads, own in zip(x, transforms, strict=True):  # heads [B, G, N, D]
        parts = heads.chunk(len(own), 1)
        rounded = [t(part.transpose(1, 2).flatten(2)) for t, part in zip(own, parts, strict=True)]
        size = parts[0].shape[1]
        layers.append(torch.cat([rows.unflatten(2, (size, -1)).transpose(1, 2) for rows in rounded], 1))
    return torch.stack(layers)


def aatc(
    moments: tuple[TokenMoments, TokenMoments], attention: Sequence[AttentionMoments], shape: CacheShape, bits: float,
    rotary_size: int = 0,
) -> Aatc:  # fmt: skip
    """Fit the transforms to calibrated moments and allocate `bits` bits per channel on average, over keys and values.

    rotary_size: number of rotated channels per key head, half-split; 0 for a model without RoPE.
    """
    weights = [torch.diag_embed(_pair_mean(layer.key_weights, rotary_size)) for layer in attention]
    keys = _fitted(moments[0], weights, shape)
    values = _fitted(moments[1], [layer.value_weights for layer in attention], shape)
    everything = [t for side in (keys, values) for layer in side for t in layer]
    level = water_level(torch.cat([t.weight * t.deviation.square() for t in everything]), bits)
    keys, values = ([[_with_bits(t, level) for t in layer] for layer in side] for side in (keys, values))
    return Aatc(keys, values, bits)


def _pair_mean(weights: Tensor, rotary_size: int) -> Tensor:
    """Give both channels of each RoPE pair of weights [G, D] their mean."""
    turned, rest = weights[:, :rotary_size], weights[:, rotary_size:]
    pairs = turned.unflatten(1, (2, -1)).mean(1) if rotary_size else turned
    return torch.cat([pairs, pairs, rest], 1)


def _fitted(moments: TokenMoments, weights: Sequence[Tensor], shape: CacheShape) -> list[list[ChannelTransform]]:
    """Return transforms without bits, from the covariance of each group of heads and weights [G, D, D] of a layer."""
    heads = max(h for h in range(1, HEADS + 1) if shape.kv_heads % h == 0)
    size = heads * shape.head_dim
    covariances = [part[:, i * size : (i + 1) * size] for i, part in enumerate(moments.covariance.split(size))]
    transforms = [
        _transform(covariance, mean, torch.block_diag(*weight))
        for covariance, mean, weight in zip(
            covariances, moments.mean.split(size), torch.cat(list(weights)).split(heads), strict=True
        )
    ]
    each = shape.kv_heads // heads
    return [transforms[i : i + each] for i in range(0, len(transforms), each)]


def _transform(covariance: Tensor, mean: Tensor, weight: Tensor) -> ChannelTransform:
    variances, basis = torch.linalg.eigh(covariance)
    weights = (basis * (weight.to(basis) @ basis)).sum(0)
    deviation = variances.clamp_min(TINY).sqrt()
    return ChannelTransform(basis.float(), mean.float(), deviation, weights, torch.zeros_like(variances))


def _with_bits(transform: ChannelTransform, level: float) -> ChannelTransform:
    bits = water_bits(transform.weight * transform.deviation.square(), level)
    return ChannelTransform(transform.basis, transform.mean, transform.deviation, transform.weight, bits)


def water_bits(energies: Tensor, level: float) -> Tensor:
    """Return the integer bits of channels with `energies` [C] above a water level: round(log2(energy / level) / 2)."""
    return (energies.double().clamp_min(TINY) / level).log2().div(2).round().clamp(0, MAX_BITS)


def water_level(energies: Tensor, bits: float) -> float:
    """Return the lowest level, by bisection, at which channels with `energies` [C] have at most `bits` on average."""
    low, high = math.log2(TINY) - 4 * MAX_BITS, math.log2(float(energies.max()) + TINY) + 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(water_bits(energies, 2**middle).mean()) > bits else (low, middle)
    return float(2**high)
