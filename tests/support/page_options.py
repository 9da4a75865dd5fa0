"""Page options for short texts."""

from __future__ import annotations

import functools

import torch
from small_models import found, tiny_llama

from fhopt.fitting.fit_plan import exact_plan
from fhopt.plan.latent_plan import LatentPlan
from fhopt.refine.page_probes import LIFTS, Curves


def falling(cost: float, half: float, generator: torch.Generator) -> Curves:
    """Curves of a site that skips less weight and reads more, up to 70%, as the lift falls, in random steps."""
    steps = torch.rand(2, len(LIFTS), generator=generator, dtype=torch.float64)
    left, read = steps[0].flip(0).cumsum(0).flip(0) * half, steps[1].cumsum(0)
    return Curves(left=left, squares=left.square(), read=0.7 * read / read[-1], count=1, cost=cost)


@functools.cache
def _plan() -> LatentPlan:
    return exact_plan(found(tiny_llama())[1].sites.values(), recent=8, block=8)
