"""Quantization of an LM head with bounds on its logits: the basis, the bit groups, the blocks.

    w - m = A^T w'      h.(w - m) = (A h).w' = h'.w'                m: mean of the rows, A: basis, both unquantized
    w' = w^ + e         |h'.e| <= |h'_1| |e_1| + |h'_2| |e_2|       w^: dequantized, 8 bits in the first bit group, 4 in
                                                                    the second

Any invertible A gives the same logits and a valid bound, which is proportional to |h'| |w'|. The product of the
expected squares is least if both have the same covariance: with M = E h h^T and S = E (w-m)(w-m)^T,

    A = S' M^(-1/2),   S' = L^(1/4) U^T,   M^(1/2) S M^(1/2) = U L U^T         |h'|^2 |w'|^2 -> (tr L^(1/2))^2

(the nuclear norm of M^(1/2) S^(1/2), instead of tr M tr S). On SmolLM2 that is 2.3 times less than in the model's
basis, and 4 bits exclude all but tens of 49,152 rows, instead of all but thousands. This is balanced realization from
control theory (Moore 1981). Within a bit group a random rotation equalizes the coordinates for uniform quantization.

Dimensions: V vocabulary, C width of the hidden states, R width of the basis, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.cpu.lm_head import BLOCK, Codes, head_block_bytes
from fhopt.lm_head.clustering import Clusters

CHUNK = 4096  # rows quantized at once
QUANTUM = 8  # coordinates of a bit group are a multiple of this
SHRINKAGE = 0.01  # of the moments of hidden states, towards their mean diagonal
WORTH_A_BASIS = 0.9  # use no basis if |h'| |w'| in it exceeds this share of that without one
CLIPS = {8: (1.0, 0.9), 4: (1.0, 0.9, 0.8, 0.7)}  # ends of the quantized range, relative to the largest magnitude


@dataclass(frozen=True)
class HeadBasis:
    """Basis of a head.

    transform: bfloat16 [R, C] or None; inverse: float64 [R, C], w' = inverse (w - m), of the rounded transform; lead:
    number of coordinates with 8 bits.
    """

    transform: Tensor | None
    inverse: Tensor | None
    rank: int
    lead: int

    def hidden(self, x: Tensor) -> Tensor:
        """Transform hidden states [..., C] to h' [..., R], float32."""
        return _padded(x.float(), self.rank) if self.transform is None else x.float() @ self.transform.float().T

    def rows(self, x: Tensor) -> Tensor:
        """Transform mean-subtracted rows [..., C] to w' [..., R], float64."""
        return _padded(x.double(), self.rank) if self.inverse is None else x.double() @ self.inverse.T


def _padded(x: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, rank - x.shape[-1]))


# --------------------------------------------------------------------------------------------------- basis


@dataclass(frozen=True)
class Balance:
    """A balanced basis.

    forward, backward: float64 [C, C], h' = forward h, w' = backward w, in descending order of the coordinates' energy;
    None if the model's own basis is almost as good. gain: |h'| |w'| relative to that without the basis.
    """

    forward: Tensor | None
    backward: Tensor | None
    gain: float


def balance(hidden: Tensor | None, rows: Tensor) -> Balance:
    """Compute the balanced basis from moments [C, C] (float64) of hidden states (None: unknown) and centered rows."""
    width = rows.shape[0]
    eye = torch.eye(width, dtype=torch.float64)
    rows = rows + 1e-6 * _scale(rows) * eye
    moment = eye if hidden is None else (1 - SHRINKAGE) * hidden + SHRINKAGE * _scale(hidden) * eye
    values, vectors = torch.linalg.eigh(moment)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    energy, directions = torch.linalg.eigh(root @ rows @ root)
    energy, directions = energy.flip(0).clamp_min(float(energy[-1]) * 1e-12), directions.flip(1)
    gain = float(energy.sqrt().sum() / (moment.trace() * rows.trace()).sqrt())
    if gain > WORTH_A_BASIS:
        return Balance(None, None, gain)
    quarter = energy.pow(0.25).unsqueeze(1)
    return Balance(quarter * (directions.T @ inverse), directions.T @ root / quarter, gain)


def _scale(moment: Tensor) -> float:
    """Compute the mean of the diagonal; 1 for a moment of zeros."""
    return float(moment.diagonal().mean()) or 1.0


def with_bit_groups(balanced: Balance, width: int, lead: int, seed: int = 0) -> HeadBasis:
    """Build the basis with its first `lead` coordinates (a multiple of 8; the rank: all of them) in 8 bits."""
    rank = math.ceil(width / QUANTUM) * QUANTUM
    lead = min(lead, rank)
    if balanced.forward is None:
        return HeadBasis(None, None, rank, lead)
    generator = torch.Generator().manual_seed(seed)
    parts = [part for part in balanced.forward.split([min(lead, width), width - min(lead, width)]) if len(part)]
    rotated = torch.cat([_rotation(len(part), generator) @ part for part in parts])
    transform = rotated.to(torch.bfloat16)
    inverse = torch.linalg.inv(transform.double()).T.contiguous()
    extra = torch.zeros(rank - width, width)
    return HeadBasis(torch.cat([transform, extra.bfloat16()]), torch.cat([inverse, extra.double()]), rank, lead)


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


# --------------------------------------------------------------------------------------------------- quantization


@dataclass(frozen=True)
class QuantizedGroup:
    """One bit group of n rows: uint8 values [n, W], bfloat16 scale [n], and norms [n] (float64) of error and row."""

    values: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor


def quantize_rows(x: Tensor, bits: int) -> QuantizedGroup:
    """Quantize x [n, W] (float64) to u, x ~ scale (u - (2^b - 1)/2), with the clip of least error for each row."""
    top = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    levels, best = 2**bits, None
    for clip in CLIPS[bits]:
        scale = (top * (2 * clip / levels)).to(torch.bfloat16)
        s = scale.double().unsqueeze(1)
        quantized = torch.floor(x * torch.where(s > 0, 1 / s, 0)).add_(levels // 2).clamp_(0, levels - 1)
        value = (quantized - (levels - 1) / 2) * s
        group = QuantizedGroup(quantized.to(torch.uint8), scale, (x - value).norm(dim=1), value.norm(dim=1))
        best = group if best is None else _better(best, group)
    assert best is not None
    return best


def _better(a: QuantizedGroup, b: QuantizedGroup) -> QuantizedGroup:
    """Select for each row the group with the smaller error."""
    first = a.error <= b.error
    values = torch.where(first.unsqueeze(1), a.values, b.values)
    return QuantizedGroup(
        values, *(torch.where(first, *pair) for pair in ((a.scale, b.scale), (a.error, b.error), (a.norm, b.norm)))
    )


def rounded_up(x: Tensor) -> Tensor:
    """Round norms up to bfloat16, with a margin for the rounding errors of the kernel."""
    bits = (x * (1 + 1e-6)).float().nextafter(torch.tensor(math.inf)).view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def quantize_weight(weight: Tensor, basis: HeadBasis, centre: Tensor, clusters: Clusters) -> Codes:
    """Quantize weight [V, C] minus `centre` (float32 [C]), with rows in the order of the clusters."""
    count = clusters.centroids.shape[0]
    blocks = math.ceil(int(torch.bincount(clusters.labels, minlength=count).max()) / BLOCK)
    order = slots(clusters.labels, count, blocks * BLOCK)
    packed = torch.empty(count * blocks, head_block_bytes(basis.rank, basis.lead), dtype=torch.uint8)
    centroids = clusters.centroids.to(torch.bfloat16)
    radii = torch.zeros(count, dtype=torch.float64)
    step = CHUNK // BLOCK * BLOCK
    for begin in range(0, len(order), step):
        part = order[begin : begin + step]
        rows = basis.rows(weight[part.clamp_min(0)].double() - centre.double())
        first, second = quantize_rows(rows[:, : basis.lead], 8), quantize_rows(rows[:, basis.lead :], 4)
        packed[begin // BLOCK : (begin + len(part)) // BLOCK] = _blocks(first, second, part)
        cluster = torch.arange(begin, begin + len(part)) // (blocks * BLOCK)
        distance = torch.where(part >= 0, (rows - centroids[cluster].double()).norm(dim=1), 0)
        radii.scatter_reduce_(0, cluster, distance, "amax")
    radii = (radii + 1e-5 * centroids.double().norm(dim=1)) * (1 + 1e-5)  # covers the rounding errors of float32 sums
    norms = [float(part.double().norm(dim=1).max()) for part in weight.split(CHUNK)]
    transform_norm = float(basis.transform.double().norm()) if basis.transform is not None else math.sqrt(basis.rank)
    return Codes(
        packed, basis.transform, centre, centroids, radii.float(), basis.rank, basis.lead,
        weight.shape[0], transform_norm * (1 + 1e-6), max(norms) * (1 + 1e-6),
    )  # fmt: skip


def slots(labels: Tensor, count: int, size: int) -> Tensor:
    """Order rows by cluster, int64 [count * size]: `size` slots per cluster, -1 for an empty slot."""
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    begins = torch.searchsorted(sorted_labels, torch.arange(count))
    out = torch.full((count * size,), -1)
    out[sorted_labels * size + torch.arange(len(order)) - begins[sorted_labels]] = order
    return out


def _blocks(first: QuantizedGroup, second: QuantizedGroup, rows: Tensor) -> Tensor:
    """Pack blocks of 16 rows in the layout of the kernel (codegen/cpu/lm_head.py), uint8 [n / 16, bytes]."""
    count = len(rows) // BLOCK
    lead = _in_lanes(first.values, count)
    low, high = second.values.unflatten(1, (-1, 2, 4)).unbind(2)  # [n, groups, 4]
    rest = _in_lanes((low | high << 4).flatten(1), count)
    numbers = [first.scale, second.scale, *map(rounded_up, (first.error, second.error, first.norm, second.norm))]
    about = [_bytes(x, count) for x in numbers] + [_bytes(rows.to(torch.int32), count)]
    return torch.cat([lead, rest, *about], 1)


def _in_lanes(values: Tensor, count: int) -> Tensor:
    """Permute [16 count, W] to [count, W/4, 16, 4], flat: four coordinates of each of 16 rows in sequence."""
    return values.view(count, BLOCK, -1, 4).transpose(1, 2).reshape(count, values.shape[1] * BLOCK)


def _bytes(x: Tensor, count: int) -> Tensor:
    return x.contiguous().view(count, BLOCK).view(torch.uint8)


def dequantize(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantize all rows: (rows int64 [n], values float64 [n, R], scales and norms float64 [n, 6] of the blocks)."""
    rank, lead = codes.rank, codes.lead
    sizes = [BLOCK * lead, BLOCK * (rank - lead) // 2, BLOCK * 12, BLOCK * 4]
    first, rest, numbers, rows = codes.codes.split(sizes, 1)
    count = len(first)

    def out_of_lanes(x: Tensor) -> Tensor:
        return x.reshape(count, -1, BLOCK, 4).transpose(1, 2).flatten(2).flatten(0, 1)

    halves = out_of_lanes(rest).unflatten(1, (-1, 1, 4))
    second = torch.cat([halves & 15, halves >> 4], 2).flatten(1)
    table = numbers.contiguous().view(torch.bfloat16).view(count, 6, BLOCK).transpose(1, 2).flatten(0, 1).double()
    values = [
        (first_.double() - middle) * table[:, i : i + 1]
        for i, (first_, middle) in enumerate(((out_of_lanes(first), 127.5), (second, 7.5)))
    ]
    return rows.contiguous().view(torch.int32).flatten().long(), torch.cat(values, 1), table
