"""Handmade plans, without statistics or a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.outcome import Outcome
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite, Rope
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan

CODED = (BitGroup(8, 8, 2 / 64), BitGroup(4, 8, 0.4))
SITE = AttentionSite(
    "layers.0", {}, "self", heads=4, kv_heads=2, key_dim=16, value_dim=8, scale=0.25, rope=None, key_norm=False,
    mask="causal", softcap=0.0, cache="cat", source="",
)  # fmt: skip


def random_plan(layout: str, tiers: tuple[BitGroup, ...] = (), **options: Any) -> LatentPlan:
    """Random 16-channel latents for `SITE`, one per head, in float64: every implementation rounds to the same codes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 4

    sizes = ((1, 2 * 24), (1, 0)) if layout == "input" else ((2, 16), (2, 8))
    sides = [
        SidePlan(random(heads, 16, read), random(2, dim, 16), tiers)
        for (heads, read), dim in zip(sizes, (16, 8), strict=True)
    ]
    return LatentPlan((SitePlan(SITE, layout, *sides),), **(dict(sinks=4, recent=8, block=8) | options))


def in_segments(plan: LatentPlan, segment: int = 64) -> LatentPlan:
    """Return the plan with keys encoded relative to segments, twelve of their channels rotated."""
    rope = Rope("half", 12, tuple(0.9 / 3**i for i in range(6)), offset=2)
    sites = tuple(replace(s, site=replace(s.site, rope=rope), segment=segment) for s in plan.sites)
    return replace(plan, sites=sites)


def shared_plan(outcome: Outcome, width: int, tiers: tuple[BitGroup, ...] = (), **options: Any) -> LatentPlan:
    """A plan with one latent of `width` channels per site: the principal directions of its example keys and values."""
    base = Evaluator(outcome.program)
    nodes = {n.name: n for n in outcome.program.graph.nodes}
    sites = []
    for name, site in outcome.sites.items():
        key, value = (base.value(nodes[name].args[i]).double() for i in (1, 2))
        rows = torch.cat([key, value], -1).transpose(1, 2).flatten(2).flatten(0, 1)  # [B*T, G*(D+E)]
        basis = torch.linalg.svd(rows, full_matrices=False).Vh[:width].float()  # [R, G*(D+E)]
        heads = basis.T.unflatten(0, (site.kv_heads, -1))  # [G, D+E, R]
        keys, values = heads.split((site.key_dim, site.value_dim), 1)
        sides = SidePlan(basis.unsqueeze(0), keys, tiers), SidePlan(basis[None, :, :0], values, tiers)
        sites.append(SitePlan(site, "input", *sides))
    return LatentPlan(tuple(sites), **(dict(sinks=4, recent=8, block=8) | options))
