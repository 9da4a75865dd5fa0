"""Small floating-point formats for keys and values, and their bytes.

Bytes of a token's key and value in a head of D channels, with b tokens per block:

    fp8      2 (D + 4 / b)                  e4m3: sign, 4 bits of exponent, 3 of mantissa; up to 448
    nvfp4    2 (D / 2 + D / 16 + 4 / b)     e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; an e4m3 scale per 16 channels

Both have a 32-bit scale per head and block of tokens, where a serving engine has one per tensor or head, calibrated in
advance. Formats: OCP 8-bit floating point 1.0; NVFP4 as described by NVIDIA (its block scale is e4m3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_BLOCK = 16  # channels per scale
SCALE_BYTES = 4
SMALLEST = 2.0**-100


@dataclass(frozen=True)
class Fp8:
    """e4m3, with a scale per head and block of tokens."""

    block: int = 64
    family: str = "fp8"

    @property
    def name(self) -> str:
        """Family: it has one size."""
        return self.family

    def token_bytes(self, head_dim: int) -> float:
        """Return the bytes of two rows of D elements, and a token's share of two scales."""
        return 2 * (head_dim + SCALE_BYTES / self.block)

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D] in blocks of tokens; N is a multiple of the block."""
        blocks = x.unflatten(2, (-1, self.block))  # [B, G, N/b, b, D]
        scale = _largest(blocks, (3, 4)) / LARGEST_E4M3
        return (e4m3(blocks / scale) * scale).flatten(2, 3)

    value = key


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 in blocks of 16 channels with an e4m3 scale, and a scale per head and block of tokens."""

    block: int = 64
    family: str = "nvfp4"

    @property
    def name(self) -> str:
        """Family: it has one size."""
        return self.family

    def token_bytes(self, head_dim: int) -> float:
        """Return the bytes of two rows of D elements, of their scales, and a token's share of two scales."""
        return 2 * (head_dim / 2 + head_dim / NVFP4_BLOCK + SCALE_BYTES / self.block)

    def key(self, x: Tensor, layer: int) -> Tensor:
        """Quantize and dequantize x [B,G,N,D] in blocks of tokens; N is a multiple of the block, D one of 16."""
        blocks = x.unflatten(2, (-1, self.block)).unflatten(4, (-1, NVFP4_BLOCK))  # [B, G, N/b, b, D/16, 16]
        outer = _largest(blocks, (3, 4, 5)) / (LARGEST_E4M3 * LARGEST_E2M1)
        scale = e4m3(_largest(blocks, (5,)) / LARGEST_E2M1 / outer).clamp_min(2.0**-9) * outer  # 2^-9: smallest e4m3
        return (e2m1(blocks / scale) * scale).flatten(4).flatten(2, 3)

    value = key


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.abs().amax(dims, keepdim=True).clamp_min(SMALLEST)


def e4m3(x: Tensor) -> Tensor:
    """Round values to e4m3, those beyond its range to +-448."""
    return x.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).to(x.dtype)


def e2m1(x: Tensor) -> Tensor:
    """Round values to the nearest e2m1, those beyond its range to +-6."""
    levels = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
    return levels[torch.bucketize(x.abs(), (levels[1:] + levels[:-1]) / 2)] * x.sign()
