"""Reports of small and large models, some with hostile names, for tests of their display."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hand_plans import CODED, SITE, random_plan
from small_models import FittedModel
from torch import Tensor, nn

from fhopt.fitting.fit_summary import KEY, SIDES, Evidence, PlanSize, SideEvidence, side_evidence
from fhopt.inspection.facts import Missed, inspect_sites
from fhopt.inspection.html_report import HtmlReport, assemble, build_report
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan

HOSTILE = "<script>alert(1)</script>"
LINE = "</script><img src=x onerror=alert(2)> {{ 7*7 }} \"'\\"


def tiny_report(llama: FittedModel) -> tuple[HtmlReport, LatentPlan]:
    """Make a report end to end: a captured model, a fitted plan."""
    plan = llama.plan(4).with_provenance(model="tiny")
    return build_report(loaded(llama), plan), plan


def loaded(llama: FittedModel) -> LoadedModel:
    ids = torch.arange(1, 17).unsqueeze(0)
    return LoadedModel("tiny", llama.model, inputs=((), {"input_ids": ids, "use_cache": False}))


def synthetic_plan(sites: int) -> LatentPlan:
    """A plan of many equal sites, with the evidence that a fit would store."""
    one = random_plan("head", CODED)
    planned = tuple(
        replace(one.sites[0], site=replace(SITE, name=f"model.layers.{i}.self_attn", source="model.py:7"))
        for i in range(sites)
    )
    seen = {p.site.name: tuple(_side(side, i) for side in SIDES) for i, p in enumerate(planned)}
    curve = tuple(PlanSize(r, 2048 * sites / r, 1e-4 * r**2) for r in (2.0, 4.0, 8.0))
    provenance = {"model": "synthetic", "ratio": 4.0, "predicted_nats": 0.01, KEY: Evidence(seen, curve).as_json()}
    return replace(one, sites=planned, provenance=provenance)


def _side(side: str, index: int) -> SideEvidence:
    variance = torch.tensor([[2e-3 / (c + 1) * (1 + math.sin(index) ** 2) for c in range(16)]])
    costs = {b: [float(variance[0, 8 * i : 8 * i + 8].sum()) / 4**b for i in range(2)] for b in (0, 2, 4, 8)}
    return side_evidence(side, variance, costs, (8, 4))


def synthetic_report(sites: int) -> HtmlReport:
    plan = synthetic_plan(sites)
    return assemble(inspect_sites("synthetic", [p.site for p in plan.sites], plan), plan)


def hostile_report() -> HtmlReport:
    """A report in which every user-supplied string is an attack."""
    plan = synthetic_plan(3)
    attacks: dict[str, Any] = dict(
        projections=dict.fromkeys("qkvo", (f"{LINE}.{HOSTILE}.w",)), source=f"{LINE}:1", mask=LINE
    )
    sites = tuple(
        replace(p, site=replace(p.site, name=f"{HOSTILE}.{i}.{LINE}", **attacks)) for i, p in enumerate(plan.sites)
    )
    plan = replace(plan, sites=sites, provenance={"model": HOSTILE, LINE: LINE, "texts": [HOSTILE]})
    missed = [Missed("normalize", HOSTILE, f"{HOSTILE} {LINE}", f"{LINE}:3", LINE, LINE)]
    return assemble(inspect_sites(HOSTILE, [p.site for p in sites], plan, missed=missed), plan)


class SampleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.parts[n](x).view(1, -1, 4, 8).transpose(1, 2) for n in "qkv")
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.parts["o"](o.transpose(1, 2).reshape(x.shape))
        return y


class Hostile(nn.Module):
    """Its attention is in a module named like a script."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({HOSTILE: SampleBlock()})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[HOSTILE](x)
        return y


def hostile_model() -> LoadedModel:
    return LoadedModel(HOSTILE, Hostile().eval(), inputs=((torch.randn(1, 6, 32),), {}))
