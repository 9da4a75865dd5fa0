"""Results of other methods from an earlier run, next to newly measured plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import recording
from benchmarks.quality import former_results
from benchmarks.quality.comparison import contests, rows
from benchmarks.quality.measurement import COUNTED_AT, OURS, Implementation, QualityResult, QualityText
from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import TokenCosts

LENGTH = 256


def results(plan_loss: float) -> list[QualityResult]:
    """A plan and another method on two texts, with random token losses."""
    generator = torch.Generator().manual_seed(0)
    texts = [QualityText(name, torch.arange(LENGTH), True) for name in ("law", "chat")]
    exact = [2 + torch.rand(1, LENGTH, dtype=torch.float64, generator=generator) for _ in texts]
    found = []
    for name, family, size, loss in ((OURS, OURS, 8.0, plan_loss), ("kivi-2bit", "kivi", 6.0, 0.1)):
        result = QualityResult(Implementation(name, family, int(46080 * COUNTED_AT / size), size))
        for text, costs in zip(texts, exact, strict=True):
            noise = loss * torch.rand(1, LENGTH, dtype=torch.float64, generator=generator)
            result.costs[text] = TokenCosts(costs, costs + noise, noise)
        found.append(result)
    return found


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[QualityResult]:
    """Results of an earlier run, saved in a file."""
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    both = results(0.02)
    recording.write("quality-model", rows(both))
    return both


def test_they_equal_those_of_the_earlier_run(former: list[QualityResult]) -> None:
    plan, _ = results(0.01)
    (kept,) = former_results.kept_results("quality-model", [plan])
    assert (kept.impl.name, kept.impl.family, kept.impl.ratio) == ("kivi-2bit", "kivi", 6.0)
    assert kept.impl.bytes_held == pytest.approx(former[1].impl.bytes_held, abs=1)
    assert kept.mean.kl == pytest.approx(former[1].mean.kl)
    assert kept.mean.increase_percent == pytest.approx(former[1].mean.increase_percent)
    assert kept.worst[1].increase_percent_ci == pytest.approx(former[1].worst[1].increase_percent_ci)
    assert kept.worst[0].name == former[1].worst[0].name
    (contest,) = contests([plan, kept])
    assert contest.baseline is kept and contest.is_won


def test_combined_rows_equal_those_of_a_single_run(former: list[QualityResult]) -> None:
    plan, _ = results(0.02)
    found = rows([plan, *former_results.kept_results("quality-model", [plan])])
    for mine, other in zip(found, rows(former), strict=True):
        assert (mine.case, mine.impl, mine.metric) == (other.case, other.impl, other.metric)
        assert mine.value == pytest.approx(other.value, rel=1e-5)  # files have six digits
        assert mine.baseline == (other.baseline and pytest.approx(other.baseline, rel=1e-5))


def test_other_texts_and_another_model_are_refused(former: list[QualityResult], tmp_path: Path) -> None:
    plan, _ = results(0.01)
    path = tmp_path / "quality-model.json"
    file: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(file | {"rows": [row for row in file["rows"] if row["case"] != "chat@6x"]}))
    with pytest.raises(FhoptError, match=r"has no chat of kivi-2bit"):
        former_results.kept_results("quality-model", [plan])
    for row in file["rows"]:
        row["value"] *= 1.01 if row["metric"] == "perplexity" else 1
    path.write_text(json.dumps(file))
    with pytest.raises(FhoptError, match=r"the exact perplexity of law is .*without --kept"):
        former_results.kept_results("quality-model", [plan])
    with pytest.raises(FhoptError, match="has no other method"):
        former_results.kept_results("quality-none", [plan])
