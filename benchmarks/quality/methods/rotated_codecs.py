"""Quantization of keys and values after an orthogonal rotation of each head, and the bytes.

    x [B,G,N,D]  ->  x R  ->  a quantizer per token, or per block of 32 elements  ->  times R^T

Keys are rotated as stored in a cache, after RoPE. Bytes of a token's key and value in a head of D channels, with n bits
per channel:

    quarot         2 (D n / 8 + 4 D / g)    a 16-bit scale and zero point per group of g = min(128, D)
    q8_0, q4_0     2 D (n + 16 / 32) / 8    a 16-bit scale per block of 32; q4_0-hadamard has the same size
    turboquant     2 (D n / 8 + 2)          the norm of a token in 16 bits
    turboquant-ip  the same and 2           keys also have the norm of the residual after n - 1 bits
    oscar          2 (D n / 8 + 4)          a 16-bit scale and zero point per token

QuaRot: arXiv 2404.00456. TurboQuant: arXiv 2504.19874. OSCAR: arXiv 2605.17757 (its abstract, its project page and the
description in the authors' repository FutureMLS-Lab/OSCAR were used, not the body of the paper). q8_0 and q4_0: the
block formats of ggml; llama.cpp rotates heads of a multiple of 64 channels before it stores them so (its pull request
21038).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.quality.methods.orthogonal_matrices import gaussian, hadamard, random_rotation
from benchmarks.quality.methods.quantized_caches import NUMBER_BYTES, SMALLEST_SCALE, asymmetric, to_16_bits
from fhopt.errors import FhoptError

GROUP = 128  # of QuaRot
CLIP = 0.95  # of QuaRot
BLOCK = 32  # of ggml
KEY_CLIP, VALUE_CLIP = 0.96, 0.92  # of OSCAR
GRID = 100_001  # points at which the distribution of a coordinate is tabulated
ITERATIONS = 3000  # of Lloyd's algorithm: 4 bits then differ from the published distortion by less than 1%


# --------------------------------------------------------------------------------------------------- QuaRot, ggml


@dataclass(frozen=True)
class QuaRot:
    """A randomized Hadamard rotation, then a scale and a zero point per token (QuaRot, 3.1 and section 5).

    The minimum and maximum of a group are multiplied by 0.95, as in the paper's experiments.
    """

    bits: int
    family: str = "quarot"

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits}bit"

    def token_bytes(self, head_dim: int) -> float:
        """Return bytes of quantized values, and of a 16-bit scale and zero point per group."""
        return 2 * (head_dim * self.bits / 8 + 2 * NUMBER_BYTES * head_dim / _group(head_dim))

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D] by token."""
        rotation = hadamard(x.shape[-1], seed=0).to(x)
        grouped = (x @ rotation).unflatten(-1, (-1, _group(x.shape[-1])))  # [B, G, N, D/g, g]
        return asymmetric(grouped, self.bits, 4, CLIP).flatten(-2) @ rotation.mT

    value = key


def _group(head_dim: int) -> int:
    """Return the size of QuaRot's groups: 128, or the whole head if 128 does not divide it."""
    return GROUP if head_dim % GROUP == 0 else head_dim


@dataclass(frozen=True)
class GgmlBlocks:
    """q8_0 or q4_0 of ggml: blocks of 32 elements with a 16-bit scale; rotated: after a Hadamard rotation.

    A block that does not fit into a head continues in the next, as in llama.cpp, which quantizes the row of all heads.
    """

    bits: int
    rotated: bool = False

    @property
    def family(self) -> str:
        """Name of the format, and of the rotation."""
        return f"q{self.bits}_0" + ("-hadamard" if self.rotated else "")

    @property
    def name(self) -> str:
        """Name of the format: it has one size."""
        return self.family

    def token_bytes(self, head_dim: int) -> float:
        """Return the bytes of two rows of D elements."""
        return 2 * head_dim * (self.bits + 8 * NUMBER_BYTES / BLOCK) / 8

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D]. Raises FhoptError if 32 does not divide G D."""
        if x.shape[1] * x.shape[3] % BLOCK:
            raise FhoptError(
                f"{self.name} has blocks of {BLOCK} numbers, which do not divide {x.shape[1]} heads of {x.shape[3]} "
                "channels. Leave it out for this model (--baseline)."
            )
        rotation = hadamard(x.shape[-1]).to(x) if self.rotated else torch.eye(x.shape[-1]).to(x)
        rows = (x @ rotation).transpose(1, 2).flatten(2)  # [B, N, G D]
        blocks = rows.unflatten(2, (-1, BLOCK))
        rounded = (_q8_0(blocks) if self.bits == 8 else _q4_0(blocks)).reshape(rows.shape)
        return rounded.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2) @ rotation.mT

    value = key


def _q8_0(blocks: Tensor) -> Tensor:
    """Round blocks [..., 32] to -127 ... 127 times a scale, the largest magnitude / 127."""
    scale = to_16_bits(blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    return (blocks / scale).round().clamp(-127, 127) * scale


def _q4_0(blocks: Tensor) -> Tensor:
    """Round blocks [..., 32] to -8 ... 7 times a scale; -8 represents the value of largest magnitude."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = to_16_bits(largest / -8)
    scale = torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    return (blocks / scale + 8.5).floor().clamp(0, 15).sub(8) * scale


# --------------------------------------------------------------------------------------------------- TurboQuant


@dataclass(frozen=True)
class TurboQuant:
    """A random rotation, then Lloyd-Max codebooks for the coordinates of a unit vector (TurboQuant, algorithm 1).

    The norm of each token is stored in 16 bits. With half a bit, as in 3.5, one half of the rotated coordinates has one
    more bit than the other; the paper gives it to detected outlier channels. inner_product: keys have one bit less,
    plus the sign of each element of a Gaussian projection of the residual, with its norm (algorithm 2, from QJL): their
    dot products with queries are then unbiased.
    """

    bits: float
    inner_product: bool = False

    @property
    def family(self) -> str:
        """Name of the method and its variant."""
        return "turboquant" + ("-ip" if self.inner_product else "")

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits:g}bit"

    def token_bytes(self, head_dim: int) -> float:
        """Return bytes of quantized values and norms, of key and value."""
        return 2 * (head_dim * self.bits / 8 + NUMBER_BYTES) + NUMBER_BYTES * self.inner_product

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize keys x [B,G,N,D] by token."""
        return self._with_signs(x) if self.inner_product else self.value(x, layer)

    def value(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D] by token, minimizing squared error."""
        return _round_directions(x, self.bits)

    def _with_signs(self, x: Tensor) -> Tensor:
        """Quantize keys to one bit less, plus an unbiased residual estimate: (sqrt(pi / 2) / D) |r| S^T sign(S r)."""
        size = x.shape[-1]
        near = _round_directions(x, self.bits - 1)
        projection = gaussian(size, seed=1).to(x)
        left = x - near
        signs = torch.where(left @ projection.mT < 0, -1.0, 1.0).to(x)
        norm = to_16_bits(left.norm(dim=-1, keepdim=True))
        return near + math.sqrt(math.pi / 2) / size * norm * (signs @ projection)


def _round_directions(x: Tensor, bits: float) -> Tensor:
    """Round the directions of x [..., D] in a rotated basis to `bits` bits per coordinate; norms to 16 bits."""
    size = x.shape[-1]
    rotation = random_rotation(size).to(x)
    norm = x.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_SCALE)
    few, many = (x / norm @ rotation).split(_split(size, bits), -1)
    parts = [_nearest(few, size, math.floor(bits)), _nearest(many, size, math.ceil(bits))]
    return torch.cat(parts, -1) @ rotation.mT * to_16_bits(norm)


def _split(size: int, bits: float) -> list[int]:
    """Return how many of `size` coordinates have the lower and the higher integer number of bits."""
    many = round(size * (bits - math.floor(bits)))
    return [size - many, many]


def _nearest(x: Tensor, size: int, bits: int) -> Tensor:
    if not x.shape[-1]:
        return x
    book = code_book(size, bits).to(x)
    return book[torch.bucketize(x.contiguous(), (book[1:] + book[:-1]) / 2)]


@cache
def code_book(size: int, bits: int) -> Tensor:
    """Return the 2^bits Lloyd-Max centroids, ascending, float64, of a coordinate of a unit vector in R^size.

    Its density is proportional to (1 - t^2)^((size - 3) / 2) (TurboQuant, lemma 1; the code book is its equation 4).
    """
    reach = min(1.0, 8 / math.sqrt(size))  # negligible density beyond 8 standard deviations
    t = torch.linspace(-reach, reach, GRID, dtype=torch.float64)
    density = (1 - t.square()).clamp_min(1e-30) ** ((size - 3) / 2)
    mass, moment = (torch.cat([t.new_zeros(1), f.cumsum(0)]) for f in (density, density * t))
    uniform = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    book = t[torch.searchsorted(mass[1:] / mass[-1], uniform)]  # the quantiles
    for _ in range(ITERATIONS):
        edges = torch.searchsorted(t, (book[1:] + book[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), GRID)])
        book = moment[edges].diff() / mass[edges].diff()
    return book


# --------------------------------------------------------------------------------------------------- OSCAR


@dataclass(frozen=True, eq=False)
class Oscar:
    """A rotation per head from attention statistics, then 2 bits with a scale and zero point per token.

    rotations: of keys and values [G, D, D], per layer; `oscar` computes them. Values beyond the 96% (keys) or 92%
    (values) quantile of the magnitudes of a token are clipped, the settings of the authors' repository.
    """

    rotations: Sequence[tuple[Tensor, Tensor]]
    bits: int = 2
    family: str = "oscar"

    @property
    def name(self) -> str:
        """Family and bits."""
        return f"{self.family}-{self.bits}bit"

    def token_bytes(self, head_dim: int) -> float:
        """Return bytes of quantized values, and of a 16-bit scale and zero point, of key and value."""
        return 2 * (head_dim * self.bits / 8 + 2 * NUMBER_BYTES)

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize keys x [B,G,N,D] by token."""
        return self._rounded(x, self.rotations[layer][0], KEY_CLIP)

    def value(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize values x [B,G,N,D] by token."""
        return self._rounded(x, self.rotations[layer][1], VALUE_CLIP)

    def _rounded(self, x: Tensor, rotation: Tensor, clip: float) -> Tensor:
        rotation = rotation.to(x)
        rotated = x @ rotation
        ordered = rotated.abs().sort(-1).values
        most = ordered[..., [min(int(clip * x.shape[-1]), x.shape[-1] - 1)]]
        return asymmetric(rotated.clamp(-most, most), self.bits, 3) @ rotation.mT


def oscar(moments: Sequence[tuple[Tensor, Tensor]]) -> Oscar:
    """Return rotations U H from second moments [G, D, D] of queries and of values weighted by attention, per layer.

    U are eigenvectors and H is a Hadamard matrix. One rotation per kv head, as the authors recommend since pull request
    20 of their repository. Their permutation of the result distributes channels over groups; here a token is one group.
    """
    return Oscar([(_mixed(queries), _mixed(values)) for queries, values in moments])


def _mixed(moment: Tensor) -> Tensor:
    vectors = torch.linalg.eigh(moment.double())[1].flip(-1)
    return (vectors @ hadamard(moment.shape[-1])).float()
