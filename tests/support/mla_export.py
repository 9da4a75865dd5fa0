"""Models and plans that become checkpoints of multi-head latent attention."""

from __future__ import annotations

from typing import Any

from small_models import found

from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan, Tier


def sites_of(model: Any) -> list[AttentionSite]:
    return list(found(model)[1].sites.values())


def with_tiers(plan: LatentPlan, bits: int) -> LatentPlan:
    def quantized(side: SidePlan) -> SidePlan:
        return SidePlan(side.encode, side.decode, (Tier(bits, side.width, 0.1),))

    sites = tuple(SitePlan(s.site, s.layout, quantized(s.key), quantized(s.value)) for s in plan.sites)
    return LatentPlan(sites, plan.sinks, plan.recent, plan.block)
