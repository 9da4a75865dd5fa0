"""Bit groups, and latents packed by them."""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.plan.site_plan import SUPPORTED_BITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Tiers = tuple[list[int], list[int], list[float]]  # bits, widths, steps


def tiers(*pairs: tuple[int, int]) -> Tiers:
    """Bit groups of (bits, width), with steps that cover the range of the codes."""
    return [b for b, _ in pairs], [w for _, w in pairs], [5.3 / 2 ** min(b, 8) for b, _ in pairs]


ALONE = [tiers((bits, width)) for bits in SUPPORTED_BITS for width in (8, 24, 136)]
MIXED = [
    tiers((8, 64), (4, 64), (2, 64)),
    tiers((6, 16), (5, 24), (3, 40), (1, 8)),
    tiers((3, 8), (16, 8), (1, 24), (5, 8), (4, 24)),  # float16 starts at byte 3
    tiers((16, 16), (16, 8)),
    tiers(*((bits, 8) for bits in reversed(SUPPORTED_BITS))),
    tiers((5, 520), (16, 24), (2, 1144)),  # more than one chunk of words, and more than one round of sums
]


def latents(plan: Tiers, *shape: int) -> Tensor:
    """Random latents [*shape, R] of several sizes, some far outside the range of the codes."""
    sizes = 10.0 ** torch.empty(*shape, 1).uniform_(-4, 3)
    return torch.randn(*shape, sum(plan[1])) * sizes * (1 + 9 * (torch.rand(*shape, sum(plan[1])) < 0.02))


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).int()
