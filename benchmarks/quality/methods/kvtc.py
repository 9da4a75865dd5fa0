"""Coding of all keys, and all values, of a token in their principal components: KVTC (arXiv 2511.01815).

    keys of all layers and heads [P], before RoPE  ->  minus the mean, principal components  ->  groups of components
    of 2, 4 or 8 bits with a scale and a zero point, or 16-bit floats, or nothing  ->  DEFLATE (RFC 1951)

The P = L G D components are those of the calibration set. Dynamic programming splits them into groups of 16, 64, 256 or
1,024 and assigns bits to each, minimizing squared error at a budget. Bytes of a token, with groups of size g and n
bits, keys and values together:

    kvtc            sum of (g n + 32) / 8 over groups, g n / 8 for those of 16 bits
    kvtc-deflate    the same with quantized values compressed by DEFLATE, one stream per block of tokens; its ratio is
                    measured on the calibration set

The paper's abstract and descriptions of the method were used, not its body. It also has groups of one component and
randomized decompositions of a limited rank; it excludes 4 sinks and 128 recent tokens from the coder and from its
ratios. Here the full-precision tokens are those of the plans, and they are counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.methods.calibration_moments import TokenMoments, from_token_rows, token_rows
from benchmarks.quality.methods.quantized_caches import AsymmetricCodes, CacheShape, to_16_bits

UNIT = 16  # components in the smallest group
SIZES = (1, 4, 16, 64)  # units
WIDTHS = (2, 4, 8)  # bits of quantized values
EXACT = 16  # bits of unquantized values
SCALE_BITS = 32  # of a scale and a zero point
COST = 32  # bits: all costs are multiples
BLOCK = 64  # tokens per DEFLATE stream


@dataclass(frozen=True)
class Group:
    """Components `start` ... `start + size - 1`, with `bits` bits each."""

    start: int
    size: int
    bits: int

    @property
    def total_bits(self) -> int:
        """Bits per token, scale and zero point included."""
        return self.size * self.bits + (0 if self.bits == EXACT else SCALE_BITS)

    def of(self, components: Tensor) -> Tensor:
        """Return the components [..., P] that are in the group."""
        return components[..., self.start : self.start + self.size]


# --------------------------------------------------------------------------------------------------- coder


@dataclass(frozen=True, eq=False)
class TokenTransform:
    """The coder of keys or of values: a basis [P, C] of principal components, the mean [P], and their groups."""

    basis: Tensor
    mean: Tensor
    groups: Sequence[Group]

    @property
    def code_bytes(self) -> float:
        """Bytes of a token's quantized values and 16-bit floats."""
        return sum(group.size * group.bits for group in self.groups) / 8

    @property
    def token_bytes(self) -> float:
        """Bytes of a token, scales and zero points included."""
        return sum(group.total_bits for group in self.groups) / 8

    def __call__(self, rows: Tensor) -> Tensor:
        """Quantize and dequantize rows [..., P]."""
        basis, mean = self.basis.to(rows), self.mean.to(rows)
        components = (rows - mean) @ basis
        parts = [_dequantized(group.of(components), group.bits) for group in self.groups]
        used = torch.cat(parts, -1) if parts else components[..., :0]
        return used @ basis[:, : used.shape[-1]].mT + mean

    def packed(self, rows: Tensor) -> bytes:
        """Pack the quantized values and 16-bit floats of rows [N, P], component by component."""
        components = (rows - self.mean.to(rows)) @ self.basis.to(rows)
        return b"".join(_packed(group.of(components), group.bits) for group in self.groups)


def _dequantized(x: Tensor, bits: int) -> Tensor:
    return to_16_bits(x) if bits == EXACT else AsymmetricCodes.of(x, bits, -1).dequantized()


def _packed(x: Tensor, bits: int) -> bytes:
    if bits == EXACT:
        return x.T.to(torch.float16).cpu().contiguous().numpy().tobytes()
    codes = AsymmetricCodes.of(x, bits, -1).codes.T.reshape(-1).to(torch.uint8).cpu().numpy()
    together = np.pad(codes, (0, -len(codes) % (8 // bits))).reshape(-1, 8 // bits)
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    return (together << shifts).sum(1, dtype=np.uint8).tobytes()


@dataclass(frozen=True, eq=False)
class Kvtc:
    """The coders of keys and values at `bits` bits per channel, everything but DEFLATE counted.

    shares: compressed size by DEFLATE as a share of the packed bytes of keys and values; None without DEFLATE.
    """

    key_transform: TokenTransform
    value_transform: TokenTransform
    bits: float
    shares: tuple[float, float] | None = None

    @property
    def family(self) -> str:
        """Name of the method, with or without its entropy coder."""
        return "kvtc" if self.shares is None else "kvtc-deflate"

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits:g}bit"

    def token_bytes(self, shape: CacheShape) -> float:
        """Return the bytes per token, keys and values of all layers."""
        sides = zip((self.key_transform, self.value_transform), self.shares or (1.0, 1.0), strict=True)
        return sum(side.token_bytes - (1 - share) * side.code_bytes for side, share in sides)

    def keys(self, x: Tensor) -> Tensor:
        """Quantize and dequantize keys x [L,B,G,N,D], given before RoPE."""
        return from_token_rows(self.key_transform(token_rows(x)), x.shape[0], x.shape[2])

    def values(self, x: Tensor) -> Tensor:
        """Quantize and dequantize values x [L,B,G,N,D]."""
        return from_token_rows(self.value_transform(token_rows(x)), x.shape[0], x.shape[2])

    def deflated(self, samples: tuple[Tensor, Tensor]) -> Kvtc:
        """Return the same coders with DEFLATE, whose shares are measured on keys and values [N, P]."""
        keys, values = (
            deflate_share([side.packed(rows) for rows in sample.split(BLOCK)])
            for side, sample in zip((self.key_transform, self.value_transform), samples, strict=True)
        )
        return Kvtc(self.key_transform, self.value_transform, self.bits, (keys, values))


def deflate_share(streams: Sequence[bytes]) -> float:
    """Return the compressed size by DEFLATE of separate `streams`, as a share of the original; at most 1."""
    plain = sum(len(stream) for stream in streams)
    return min(1.0, sum(len(zlib.compress(stream, 9, -15)) for stream in streams) / plain) if plain else 1.0


# --------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of tokens: basis [P, P] of decreasing variances [P], and the sample [N, P] in it."""

    basis: Tensor
    mean: Tensor
    variances: Tensor
    sample: Tensor

    @staticmethod
    def of(moments: TokenMoments) -> Components:
        """Decompose the covariance, in float32."""
        variances, basis = torch.linalg.eigh(moments.covariance.float())
        basis, mean = basis.flip(1), moments.mean.float()
        return Components(basis, mean, variances.flip(0).clamp_min(0), (moments.sample - mean) @ basis)

    def transform(self, bits: float) -> TokenTransform:
        """Return the coder with at most `bits` bits per channel, including scales and zero points."""
        groups = allocate(self.variances, self.sample, int(bits * len(self.mean)))
        used = sum(group.size for group in groups)
        return TokenTransform(self.basis[:, :used].clone(), self.mean, groups)


def kvtc(keys: Components, values: Components, bits: float) -> Kvtc:
    """Return the coders of keys and values with `bits` bits per channel each."""
    return Kvtc(keys.transform(bits), values.transform(bits), bits)


def allocate(variances: Tensor, sample: Tensor, budget: int) -> list[Group]:
    """Split components into groups with bits: minimal squared error within `budget` bits, by dynamic programming.

    variances: [P], decreasing. sample: [N, P], tokens, for the ranges of groups: n bits make an error of
    range^2 / (12 (2^n - 1)^2) per value. Components after the last group are dropped.
    """
    units, most = len(variances) // UNIT, budget // COST
    options = _options(sample[:, : units * UNIT], units)
    best = np.full((units + 1, most + 1), np.inf)
    best[0] = 0
    chosen = np.full((units + 1, most + 1), -1, dtype=np.int16)
    for start in range(units):
        for number, (width, cost, _, errors) in enumerate(options):
            if start + width > units or cost > most:
                continue
            total = best[start, : most + 1 - cost] + errors[start]
            better = total < best[start + width, cost:]
            best[start + width, cost:][better] = total[better]
            chosen[start + width, cost:][better] = number
    energies = variances.double().numpy()
    left = np.array([energies[end * UNIT :].sum() for end in range(units + 1)])
    return _traced(int((best[:, most] + left).argmin()), most, chosen, options)


Option = tuple[int, int, int, np.ndarray]  # units, cost, bits, error by first unit


def _options(sample: Tensor, units: int) -> list[Option]:
    """Return the candidate groups: widths in units, costs in COST bits, bits, and errors for each first unit."""
    grouped = sample.unflatten(1, (units, UNIT))
    least, most = grouped.amin(2), grouped.amax(2)  # [N, units]
    options: list[Option] = [(1, UNIT * EXACT // COST, EXACT, np.zeros(units))]
    for width in (size for size in SIZES if size <= units):
        span = most.unfold(1, width, 1).amax(2) - least.unfold(1, width, 1).amin(2)
        square = span.double().square().mean(0).numpy()
        for bits in WIDTHS:
            cost = (width * UNIT * bits + SCALE_BITS) // COST
            options.append((width, cost, bits, width * UNIT * square / (12 * (2**bits - 1) ** 2)))
    return options


def _traced(end: int, most: int, chosen: np.ndarray, options: Sequence[Option]) -> list[Group]:
    groups: list[Group] = []
    while end:
        width, cost, bits, _ = options[chosen[end, most]]
        end, most = end - width, most - cost
        groups.insert(0, Group(end * UNIT, width * UNIT, bits))
    return groups
