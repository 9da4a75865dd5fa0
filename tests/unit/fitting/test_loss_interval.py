"""From KL on held-out text to an interval, which contains the measured KL of real models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fhopt.fitting.loss_interval import LossCheck, checks_of, loss_interval

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
CALIBRATING = ("topics", "source", "docstrings", "mixture")
PREDICTED = {  # predicted nats of the measured plans, by model and ratio
    "Qwen2.5-Coder-1.5B-Instruct": {"4x": 8.241e-5, "8x": 9.055e-4},
    "Qwen2.5-Coder-0.5B-Instruct": {"4x": 1.552e-4, "8x": 1.886e-3},
    "SmolLM2-135M-Instruct": {"4x": 1.685e-4, "5.3x": 3.980e-4, "8x": 1.702e-3, "12x": 6.006e-3},
}


def measured(model: str) -> dict[str, dict[str, float]]:
    """KL by ratio and text."""
    losses: dict[str, dict[str, float]] = {}
    for row in json.loads((RESULTS / f"quality-{model}.json").read_text(encoding="utf-8"))["rows"]:
        if row["impl"] == "fhopt" and row["metric"] == "kl":
            text, ratio = row["case"].split("@")
            losses.setdefault(ratio, {})[text] = row["value"]
    return losses


@pytest.mark.parametrize("model", PREDICTED)
def test_measured_losses_of_other_domains_are_in_the_interval(model: str) -> None:
    """Columns of numbers may lose less, and Chinese at 12x more; predicted costs alone are up to 10x too low."""
    losses, predicted = measured(model), PREDICTED[model]
    checks = [
        LossCheck(text, (predicted["4x"], predicted["8x"]), (losses["4x"][text], losses["8x"][text]))
        for text in CALIBRATING
    ]
    for ratio, costs in predicted.items():
        _, least, most = loss_interval(checks, costs)
        others = {text: loss for text, loss in losses[ratio].items() if text not in CALIBRATING}
        assert len(others) >= 9
        beyond = {text: loss / most for text, loss in others.items() if loss > 1.01 * most}
        assert beyond.keys() <= ({"zh.txt"} if ratio == "12x" else set()) and max(beyond.values(), default=0) < 1.1
        assert {text for text, loss in others.items() if loss < least} <= {"numbers.txt"}
        assert most / least == pytest.approx(9, rel=0.2)
    assert max(losses["4x"].values()) > 2 * predicted["4x"]


@pytest.mark.parametrize(
    ("predicted", "loss"), [(1.0, 5.0), (3.0, 9.0), (2.0, 7.0), (4.0, 11.0), (0.5, 4.0), (0.0, 3.0)]
)
def test_losses_are_interpolated_linearly_between_measured_ones(predicted: float, loss: float) -> None:
    check = LossCheck("text", (1.0, 3.0), (5.0, 9.0))
    assert check.at(predicted) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("check", "predicted", "loss"),
    [
        (LossCheck("text", (1.0,), (5.0,)), 2.0, 10.0),  # with one size: proportional, but never less
        (LossCheck("text", (1.0,), (5.0,)), 0.5, 5.0),
        (LossCheck("text", (1.0, 3.0), (1.0, 9.0)), 0.5, 0.5),  # a line that would fall below zero
        (LossCheck("text", (1.0, 3.0), (5.0, 4.0)), 9.0, 5.0),  # and a falling line
    ],
)
def test_no_loss_is_below_the_measured_minimum(check: LossCheck, predicted: float, loss: float) -> None:
    assert check.at(predicted) == pytest.approx(loss)


def test_texts_that_differ_much_widen_the_interval() -> None:
    alike = [LossCheck(name, (1.0,), (2.0,)) for name in "abc"]
    apart = [LossCheck(name, (1.0,), (loss,)) for name, loss in zip("abc", (0.2, 2.0, 20.0), strict=True)]
    (mean, least, most), wider = loss_interval(alike, 1.0), loss_interval(apart, 1.0)
    assert mean == pytest.approx(2) and wider[0] == pytest.approx(2)
    assert wider[1] < least < mean < most < wider[2]
    assert math.isfinite(loss_interval([LossCheck("exact", (0.0,), (0.0,))], 0.0)[2])


def test_checks_survive_json() -> None:
    checks = (LossCheck("topics", (1e-4, 1e-3), (2e-4, 1.5e-3)),)
    assert checks_of(json.loads(json.dumps([check.as_json() for check in checks]))) == checks
