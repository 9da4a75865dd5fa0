"""Orthogonal matrices that spread a head's outlier channels before quantization.

A Hadamard matrix needs a power of two. A head of another size D is rotated in blocks of p, the largest power of two
that divides D: 80 channels are five blocks of 16, and an odd D is not rotated at all.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int, seed: int | None = None) -> Tensor:
    """Return an orthogonal matrix [D, D] of Hadamard blocks, float64; with a seed its rows have random signs.

    Sylvester's construction, H_2n = [[H_n, H_n], [H_n, -H_n]], and random signs as in QuaRot (arXiv 2404.00456, 3.1).
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    matrix = torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))
    return matrix if seed is None else _signs(size, seed)[:, None] * matrix


def _signs(size: int, seed: int) -> Tensor:
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return 2.0 * drawn.double() - 1


@cache
def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a uniformly random orthogonal matrix [D, D], float64: Q of the QR decomposition of a Gaussian matrix."""
    q, r = torch.linalg.qr(gaussian(size, seed))
    return q * r.diagonal().sign()  # makes it uniform: the decomposition itself prefers some signs


@cache
def gaussian(size: int, seed: int) -> Tensor:
    """Return a matrix [D, D] of independent standard normal values, float64."""
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
