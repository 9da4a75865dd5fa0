"""Handmade plans for the plan store."""

from __future__ import annotations

from hand_plans import random_plan

from fhopt.plan.latent_plan import LatentPlan


def plan(number: int = 0, model: str = "a/model", fingerprint: str | None = None) -> LatentPlan:
    return random_plan("head", sinks=number).with_provenance(model=model, fingerprint=fingerprint)
