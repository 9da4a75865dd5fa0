"""From the weight of a language-model head to codes with bounds: the basis, the tiers, the blocks.

    w - m = A^T w'      h.(w - m) = (A h).w' = h'.w'                m: mean of the rows, A: basis, both kept as they are
    w' = w^ + e         |h'.e| <= |h'_1| |e_1| + |h'_2| |e_2|       w^: codes, 8 bits in the first tier, 4 in the second

Any invertible A gives the same logits and a valid bound, and the bound is as small as |h'| |w'| is. Among all bases the
product of the expected squares is least where both have the same covariance: with M = E h h^T and S = E (w-m)(w-m)^T,

    A = S' M^(-1/2),   S' = L^(1/4) U^T,   M^(1/2) S M^(1/2) = U L U^T         |h'|^2 |w'|^2 -> (tr L^(1/2))^2

(the nuclear norm of M^(1/2) S^(1/2), in place of tr M tr S). On SmolLM2 that is 2.3 times less than in the basis of the
model, and 4 bits exclude all but some tens of 49,152 rows in place of all but thousands. It is balancing as of control
theory (Moore 1981). Within a tier a random rotation makes all coordinates alike, which is what uniform codes want.

Letters: V vocabulary, C width of the hidden states, R width of the basis, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.cpu.lm_head import BLOCK, Codes, block_bytes
from fhopt.lm_head.clustering import Clusters

CHUNK = 4096  # rows that are coded at once
QUANTUM = 8  # coordinates of a tier are a multiple of it
SHRINKAGE = 0.01  # of the moments of hidden states, towards their mean diagonal
WORTH_A_BASIS = 0.9  # |h'| |w'| in the basis, of that without one, above which none is used
CLIPS = {8: (1.0, 0.9), 4: (1.0, 0.9, 0.8, 0.7)}  # of the largest magnitude, as ends of the range of codes


@dataclass(frozen=True)
class Basis:
    """transform: bfloat16 [R, C] or None; inverse: float64 [R, C], w' = inverse (w - m); lead: coordinates of 8 bits.

    The inverse belongs to the transform as it was rounded.
    """

    transform: Tensor | None
    inverse: Tensor | None
    rank: int
    lead: int

    def hidden(self, x: Tensor) -> Tensor:
        """x [..., C] -> h' [..., R], float32."""
        return _padded(x.float(), self.rank) if self.transform is None else x.float() @ self.transform.float().T

    def rows(self, x: Tensor) -> Tensor:
        """x [..., C], rows less their mean -> w' [..., R], float64."""
        return _padded(x.double(), self.rank) if self.inverse is None else x.double() @ self.inverse.T


def _padded(x: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, rank - x.shape[-1]))


# --------------------------------------------------------------------------------------------------- basis


@dataclass(frozen=True)
class Balance:
    """What `balance` found. forward, backward: float64 [C, C], h' = forward h, w' = backward w, the coordinates of the
    largest products first; None where the model's own basis is nearly as good. gain: |h'| |w'| of that without."""

    forward: Tensor | None
    backward: Tensor | None
    gain: float


def balance(hidden: Tensor | None, rows: Tensor) -> Balance:
    """The balanced basis for second moments [C, C] (float64) of hidden states (None: unknown) and of centred rows."""
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
    """The mean of the diagonal; 1 for a moment of zeros."""
    return float(moment.diagonal().mean()) or 1.0


def tiered(found: Balance, width: int, lead: int, seed: int = 0) -> Basis:
    """The basis with its first `lead` coordinates (a multiple of 8; the rank: all of them) in 8 bits."""
    rank = math.ceil(width / QUANTUM) * QUANTUM
    lead = min(lead, rank)
    if found.forward is None:
        return Basis(None, None, rank, lead)
    generator = torch.Generator().manual_seed(seed)
    parts = [part for part in found.forward.split([min(lead, width), width - min(lead, width)]) if len(part)]
    turned = torch.cat([_rotation(len(part), generator) @ part for part in parts])
    transform = turned.to(torch.bfloat16)
    inverse = torch.linalg.inv(transform.double()).T.contiguous()
    extra = torch.zeros(rank - width, width)
    return Basis(torch.cat([transform, extra.bfloat16()]), torch.cat([inverse, extra.double()]), rank, lead)


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


# --------------------------------------------------------------------------------------------------- codes


@dataclass(frozen=True)
class Tier:
    """Rows [n, W] of one tier in codes: uint8 codes, scale bfloat16 [n], and norms [n] (float64) of error and value."""

    codes: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor


def code_rows(x: Tensor, bits: int) -> Tier:
    """x [n, W] (float64): value = scale (u - (2^b - 1)/2), of the clips that are tried the one that loses least."""
    top = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    levels, best = 2**bits, None
    for clip in CLIPS[bits]:
        scale = (top * (2 * clip / levels)).to(torch.bfloat16)
        s = scale.double().unsqueeze(1)
        codes = torch.floor(x * torch.where(s > 0, 1 / s, 0)).add_(levels // 2).clamp_(0, levels - 1)
        value = (codes - (levels - 1) / 2) * s
        tier = Tier(codes.to(torch.uint8), scale, (x - value).norm(dim=1), value.norm(dim=1))
        best = tier if best is None else _better(best, tier)
    assert best is not None
    return best


def _better(a: Tier, b: Tier) -> Tier:
    """Row by row what loses less."""
    first = a.error <= b.error
    codes = torch.where(first.unsqueeze(1), a.codes, b.codes)
    return Tier(
        codes, *(torch.where(first, *pair) for pair in ((a.scale, b.scale), (a.error, b.error), (a.norm, b.norm)))
    )


def rounded_up(x: Tensor) -> Tensor:
    """Norms as bfloat16 that are not below them, with room for the arithmetic of the kernel."""
    bits = (x * (1 + 1e-6)).float().nextafter(torch.tensor(math.inf)).view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def encode(weight: Tensor, basis: Basis, centre: Tensor, clusters: Clusters) -> Codes:
    """The codes of weight [V, C], rows less `centre` (float32 [C]), in the order of their clusters."""
    count = clusters.centroids.shape[0]
    blocks = math.ceil(int(torch.bincount(clusters.labels, minlength=count).max()) / BLOCK)
    order = slots(clusters.labels, count, blocks * BLOCK)
    packed = torch.empty(count * blocks, block_bytes(basis.rank, basis.lead), dtype=torch.uint8)
    centroids = clusters.centroids.to(torch.bfloat16)
    radii = torch.zeros(count, dtype=torch.float64)
    step = CHUNK // BLOCK * BLOCK
    for begin in range(0, len(order), step):
        part = order[begin : begin + step]
        rows = basis.rows(weight[part.clamp_min(0)].double() - centre.double())
        first, second = code_rows(rows[:, : basis.lead], 8), code_rows(rows[:, basis.lead :], 4)
        packed[begin // BLOCK : (begin + len(part)) // BLOCK] = _blocks(first, second, part)
        cluster = torch.arange(begin, begin + len(part)) // (blocks * BLOCK)
        apart = torch.where(part >= 0, (rows - centroids[cluster].double()).norm(dim=1), 0)
        radii.scatter_reduce_(0, cluster, apart, "amax")
    radii = (radii + 1e-5 * centroids.double().norm(dim=1)) * (1 + 1e-5)  # sums in float32 are within it
    norms = [float(part.double().norm(dim=1).max()) for part in weight.split(CHUNK)]
    transform_norm = float(basis.transform.double().norm()) if basis.transform is not None else math.sqrt(basis.rank)
    return Codes(
        packed, basis.transform, centre, centroids, radii.float(), basis.rank, basis.lead,
        weight.shape[0], transform_norm * (1 + 1e-6), max(norms) * (1 + 1e-6),
    )  # fmt: skip


def slots(labels: Tensor, count: int, size: int) -> Tensor:
    """Rows in the order of memory, int64 [count * size]: those of a cluster together, -1 where there is none."""
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    begins = torch.searchsorted(sorted_labels, torch.arange(count))
    out = torch.full((count * size,), -1)
    out[sorted_labels * size + torch.arange(len(order)) - begins[sorted_labels]] = order
    return out


def _blocks(first: Tier, second: Tier, rows: Tensor) -> Tensor:
    """Blocks of 16 rows as the kernel reads them (codegen/cpu/lm_head.py), uint8 [n / 16, bytes]."""
    count = len(rows) // BLOCK
    lead = _in_lanes(first.codes, count)
    low, high = second.codes.unflatten(1, (-1, 2, 4)).unbind(2)  # [n, groups, 4]
    rest = _in_lanes((low | high << 4).flatten(1), count)
    numbers = [first.scale, second.scale, *map(rounded_up, (first.error, second.error, first.norm, second.norm))]
    about = [_bytes(x, count) for x in numbers] + [_bytes(rows.to(torch.int32), count)]
    return torch.cat([lead, rest, *about], 1)


def _in_lanes(codes: Tensor, count: int) -> Tensor:
    """[16 count, W] -> [count, W/4, 16, 4], flat: four coordinates of each of 16 rows after the other."""
    return codes.view(count, BLOCK, -1, 4).transpose(1, 2).reshape(count, codes.shape[1] * BLOCK)


def _bytes(x: Tensor, count: int) -> Tensor:
    return x.contiguous().view(count, BLOCK).view(torch.uint8)


def decode(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes say: (rows int64 [n], values float64 [n, R], numbers float64 [n, 6] as in the blocks)."""
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
