"""The evidence of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hand_plans import CODED, random_plan
from small_models import FittedModel

from fhopt.fitting import choices
from fhopt.fitting.fit_summary import Evidence, evidence_of
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import TIER_QUANTUM


def seen(llama: FittedModel, ratio: float = 4, **options: Any) -> tuple[LatentPlan, Evidence]:
    plan = llama.plan(ratio, **options)
    evidence = evidence_of(plan)
    assert evidence is not None
    return plan, evidence


def test_losses_of_the_sites_add_up_to_the_predicted_loss_of_the_plan(llama: FittedModel) -> None:
    plan, evidence = seen(llama)
    total = sum(evidence.nats(site.site.name) for site in plan.sites)
    assert total == pytest.approx(plan.provenance["predicted_nats"], rel=1e-3)  # stored with four digits


def test_bits_of_the_evidence_are_the_tiers_of_the_plan(llama: FittedModel) -> None:
    plan, evidence = seen(llama)
    for site in plan.sites:
        for side, kept in zip((site.key, site.value), evidence.sites[site.site.name], strict=True):
            widths = {t.bits: t.width for t in side.tiers}
            assert {b: TIER_QUANTUM * kept.bits.count(b) for b in set(kept.bits) - {0}} == widths


def test_the_spectrum_falls_and_uniform_two_bits_have_more_loss_than_a_plan_of_more_bits(llama: FittedModel) -> None:
    plan, evidence = seen(llama, ratio=3)
    for side in (side for sides in evidence.sites.values() for side in sides):
        assert list(side.spectrum) == sorted(side.spectrum, reverse=True)
    totals = [
        sum(getattr(s, of) for sides in evidence.sites.values() for s in sides) for of in ("nats", "sensitivity_nats")
    ]
    assert plan.ratio(2048) < 8 and totals[0] < totals[1]


def test_the_curve_holds_the_losses_of_plans_fitted_to_other_ratios(llama: FittedModel) -> None:
    _, evidence = seen(llama)
    sizes = {size.ratio: size for size in evidence.curve}
    assert list(sizes) == sorted(sizes) and {2.0, 4.0} <= set(sizes)
    for ratio in (2.0, 4.0):
        assert sizes[ratio].nats == pytest.approx(llama.plan(ratio).provenance["predicted_nats"], rel=1e-3)
        assert sizes[ratio].bytes_per_token == pytest.approx(llama.plan(ratio).exact_token_bytes() / ratio)


def test_evidence_survives_a_file_and_is_not_part_of_the_digest(llama: FittedModel, tmp_path: Path) -> None:
    plan, evidence = seen(llama)
    assert evidence_of(LatentPlan.load(plan.save(tmp_path / "plan"))) == evidence
    assert plan.with_provenance(evidence=None).digest() == plan.digest()


def test_gpu_plans_have_evidence_and_plans_without_measurements_have_none(llama: FittedModel) -> None:
    _, evidence = seen(llama, ratio=2, device="h100", tokens=8192)
    assert {b for sides in evidence.sites.values() for s in sides for b in s.bits} <= {0, *choices.GPU_BITS}
    assert evidence_of(random_plan("head", CODED)) is None
