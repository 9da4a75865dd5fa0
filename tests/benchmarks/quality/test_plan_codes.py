"""Rows of plans with different codes, compared with the uniform one of the same size."""

from __future__ import annotations

from benchmarks.quality.plan_codes import rows_of


def test_a_plan_is_compared_with_the_uniform_one_of_its_size() -> None:
    rows = rows_of("law", {"uniform@8x": (0.002, 0.4), "trellis@8x": (0.001, 0.1), "trellis@12x": (0.004, 0.9)})
    found = {(row.case, row.impl, row.metric): (row.value, row.ratio) for row in rows}
    assert found["law@8x", "fhopt, trellis", "kl"] == (0.001, 2.0)
    assert found["law@8x", "fhopt, uniform", "kl"] == (0.002, 1.0)
    assert found["law@12x", "fhopt, trellis", "kl"] == (0.004, None)
    assert found["law@8x", "fhopt, trellis", "perplexity_increase_percent"] == (0.1, None)
