"""Measured cost of the channels of candidate bases at each bit width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhopt.fitting.bases import CandidateBases

SideKey = tuple[str, str, int]  # site, layout, and index of the layout's basis


@dataclass(frozen=True, eq=False)
class SideCosts:
    """Costs of the channels of one basis; measuring adds to the tensors in place.

    sums: bits -> [J, R] float64, twice the measured nats, summed over `tokens` tokens (int64 scalar).
    """

    sums: Mapping[int, Tensor]
    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


Costs = Mapping[SideKey, SideCosts]


def empty_costs(bases: CandidateBases, levels: Iterable[int]) -> Costs:
    """Return zero costs for every candidate basis at each bit width in `levels`."""
    kept = tuple(levels)
    return {
        (site, layout, side): SideCosts({bits: torch.zeros_like(basis.variance) for bits in kept})
        for site, layouts in bases.items()
        for layout, sides in layouts.items()
        for side, basis in enumerate(sides)
    }
