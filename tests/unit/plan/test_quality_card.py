"""Quality cards: measurements of `fhopt eval`, stored in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stored_plans import plan

from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import quality_card, with_measured


def text(kl: float) -> dict[str, Any]:
    return {
        "tokens": 100, "exact": 9.0, "plan": 9.1, "increase_percent": 1.1, "increase_percent_ci": (0.5, 1.7), "kl": kl,
        "kl_ci": None,
    }  # fmt: skip


TASK = {"exact": {"items": 4, "rate": 0.75, "hits": 3}, "plan": {"items": 4, "rate": 0.5, "hits": 2}}


def test_a_card_stores_measurements_and_names_the_worst(tmp_path: Path) -> None:
    measured = with_measured(plan(1), {"law": text(0.02), "code": text(0.01)}, {"copy": TASK})
    measured.save(tmp_path / "plan")
    found = quality_card(LatentPlan.load(tmp_path / "plan"))
    assert {(t.name, t.kl, t.increase_percent_ci) for t in found.texts} == {
        ("law", 0.02, (0.5, 1.7)),
        ("code", 0.01, (0.5, 1.7)),
    }
    assert found.worst is not None and found.worst.name == "law"
    assert [(t.name, t.items, t.exact, t.plan) for t in found.tasks] == [("copy", 4, 75.0, 50.0)]
    assert measured.digest() == plan(1).digest()


def test_a_new_measurement_replaces_the_old_one() -> None:
    once = with_measured(plan(1), {"law": text(0.02), "code": text(0.01)}, {})
    again = quality_card(with_measured(once, {"law": text(0.005)}, {"copy": TASK}))
    assert {t.name: t.kl for t in again.texts} == {"law": 0.005, "code": 0.01} and len(again.tasks) == 1


def test_without_a_plan_nothing_is_recorded_and_a_plan_without_a_card_has_an_empty_one() -> None:
    alone = with_measured(plan(1), {"law": {"tokens": 5, "exact": 9.0}}, {"copy": {**TASK, "plan": None}})
    for found in (quality_card(alone), quality_card(plan(1))):
        assert found.texts == () == found.tasks and found.worst is None
