"""The card of a rewritten model."""

from __future__ import annotations

from pathlib import Path

from rewritten_folders import written
from small_models import Fitted


def test_the_card_tells_provenance_loss_and_bytes(llama: Fitted, tmp_path: Path) -> None:
    from fhopt.evaluation.statistics import Comparison

    plan = llama.plan(4).with_provenance(model="small", texts=["topics"], tokens=576)
    measured = Comparison(10.0, 10.1, 1.0, (0.5, 1.5), 0.01, None, 2047)
    written(tmp_path / "out", llama.model, plan, losses={"source": measured})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| source | 2,047 | 10.0000 | 10.1000 | +1.00 % (+0.50 to +1.50) | 0.0100 |" in card
    assert plan.digest() in card and "topics (576 tokens)" in card
    assert f"| 8,192 | {plan.exact_token_bytes():,} | {plan.cache_bytes(8192) / 8192:,.0f} |" in card
