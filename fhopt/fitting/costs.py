"""What the channels of candidate bases cost at each number of bits, as a measuring pass over text gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhopt.fitting.bases import CandidateBases

SideKey = tuple[str, str, int]  # site, layout, and which of the layout's bases


@dataclass(frozen=True, eq=False)
class SideCosts:
    """Costs of the channels of one basis: measuring adds to the tensors.

    sums: bits -> [J, R] float64, twice the nats that were measured, over `tokens` tokens (int64, no dimensions).
    """

    sums: Mapping[int, Tensor]
    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


Costs = Mapping[SideKey, SideCosts]


def empty_costs(bases: CandidateBases, levels: Iterable[int]) -> Costs:
    """Return costs of every candidate basis at each number of bits in `levels`, with nothing measured yet."""
    kept = tuple(levels)
    return {
        (site, layout, side): SideCosts({bits: torch.zeros_like(basis.variance) for bits in kept})
        for site, layouts in bases.items()
        for layout, sides in layouts.items()
        for side, basis in enumerate(sides)
    }
