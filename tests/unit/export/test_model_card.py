"""The card of a rewritten model."""

from __future__ import annotations

from pathlib import Path

from rewritten_folders import written
from small_models import FittedModel

from fhopt.plan.quality_card import with_measured


def test_the_card_lists_provenance_loss_and_bytes(llama: FittedModel, tmp_path: Path) -> None:
    from fhopt.evaluation.statistics import Comparison

    plan = llama.plan(4).with_provenance(model="small", texts=["topics"], tokens=576)
    measured = Comparison(10.0, 10.1, 1.0, (0.5, 1.5), 0.01, None, 2047)
    written(tmp_path / "out", llama.model, plan, losses={"source": measured})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| source | 2,047 | 10.0000 | 10.1000 | +1.00% (+0.50 to +1.50) | 0.0100 |" in card
    assert plan.digest() in card and "topics (576 tokens)" in card
    assert f"| 8,192 | {plan.exact_token_bytes():,} | {plan.cache_bytes(8192) / 8192:,.0f} |" in card


def test_the_card_shows_measurements_recorded_in_the_plan(llama: FittedModel, tmp_path: Path) -> None:
    law = dict(tokens=1023, exact=5.0, plan=5.1, increase_percent=2.0, increase_percent_ci=None, kl=0.02)
    task = {"exact": {"items": 20, "rate": 0.9}, "plan": {"items": 20, "rate": 0.85}}
    plan = with_measured(llama.plan(4), {"law": law}, {"copy": task})
    written(tmp_path / "out", llama.model, plan, losses={})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| law | 1,023 | 5.0000 | 5.1000 | +2.00% | 0.0200 |" in text
    assert "| copy | 20 | 90.0% | 85.0% |" in text and "Not measured" not in text
