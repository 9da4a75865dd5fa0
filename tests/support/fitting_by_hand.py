"""Handmade bases and statistics for which the best plan is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hand_plans import SITE

from fhopt.fitting import fit_plan
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.statistics import SideStatistics, SiteStatistics
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import TIER_QUANTUM

MIXING = ("band", "freq", "head", "identity")
RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0)


def basis(groups: int, *chunks: float) -> Basis:
    """Identity on `groups` latent heads whose chunks of 8 channels have these variances."""
    width = TIER_QUANTUM * len(chunks)
    eye = torch.eye(width, dtype=torch.float64).expand(groups, width, width)
    variance = torch.tensor(chunks, dtype=torch.float64).repeat_interleave(TIER_QUANTUM).expand(groups, width)
    return Basis(eye, eye, variance)


def site(name: str) -> AttentionSite:
    return replace(SITE, name=name, value_dim=16)


def statistics(*names: str) -> dict[str, SiteStatistics]:
    """Zero statistics of sites with 2 kv heads of 16: unused if bases are passed."""
    zero = torch.zeros(1, 32, 32, dtype=torch.float64)
    return {n: SiteStatistics(site(n), SideStatistics(1, zero, zero), SideStatistics(1, zero, zero)) for n in names}


def spectrum(channels: int, groups: int, fall: float, seed: int) -> Basis:
    """A basis whose costs fall by a factor of `fall` over the channels, with some noise."""
    torch.manual_seed(seed)
    variance = fall ** (-torch.arange(channels, dtype=torch.float64) / channels) * (0.5 + torch.rand(channels))
    eye = torch.eye(channels, dtype=torch.float64).expand(groups, channels, channels)
    return Basis(eye, eye, variance.expand(groups, channels))


def wide(groups: int, channels: int, ratio: float, device: str | None = "h100", **options: Any) -> LatentPlan:
    """Fit two sites of 4 kv heads with `channels` channels per latent head."""
    names, dim = ("steep", "flat"), groups * channels // 4
    kept: dict[str, SiteStatistics] = {
        n: replace(s, site=replace(site(n), heads=4, kv_heads=4, key_dim=dim, value_dim=dim))
        for n, s in statistics(*names).items()
    }
    bases: CandidateBases = {
        n: {"band": (spectrum(channels, groups, fall, 0), spectrum(channels, groups, fall / 2, 1))}
        for n, fall in zip(names, (1000.0, 10.0), strict=True)
    }
    chosen: dict[str, Any] = dict(sinks=0, recent=1, block=1, tokens=100_000, layout="band") | options
    return fit_plan.fit_ratio(kept, bases=bases, ratio=ratio, device=device, **chosen)


def nats(plan: LatentPlan) -> float:
    return float(plan.provenance["predicted_nats"])
