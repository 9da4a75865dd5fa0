"""Rows of `make bench-serve`: the best of all rounds, compared with the engine without a plan."""

from __future__ import annotations

from typing import Any

from benchmarks.serving.plans_in_vllm import likelihood_rows, load_rows, rows_of


def turn(speed: float, first: float) -> dict[str, Any]:
    return {"8 x 512": {"tokens_per_second": speed, "first_ms": first}}


def test_the_best_round_of_each_engine_counts() -> None:
    results = {
        "exact": [turn(10.0, 400.0), turn(12.0, 300.0)],
        "fhopt@4x": [turn(18.0, 450.0), turn(15.0, 600.0)],
    }
    rows = rows_of(results, {"exact": 5.0, "fhopt@4x": 19.0})
    found = {(row.impl, row.metric): (row.value, row.ratio) for row in rows}
    assert found["fhopt@4x", "concurrency"] == (19.0, 3.8)
    assert found["fhopt@4x", "decode_tokens_per_second"] == (18.0, 1.5)
    assert found["fhopt@4x", "time_to_first_token_ms"] == (450.0, 300.0 / 450.0)
    assert found["exact", "decode_tokens_per_second"] == (12.0, 1.0)
    assert {row.case for row in rows if row.metric == "concurrency"} == {"8192 tokens"}


def test_a_likelihood_is_compared_with_that_of_the_own_cache() -> None:
    (row,) = likelihood_rows({"fhopt@4x": {"served": -2.02, "own": -2.0}})
    assert (row.impl, row.metric, row.value, row.baseline, row.ratio) == (
        "fhopt@4x", "log_likelihood_nats", -2.02, -2.0, 1.01,
    )  # fmt: skip


def test_under_load_more_requests_and_less_time_are_better() -> None:
    exact = {"requests_per_minute": 10.0, "mean_token_ms": 200.0}
    rows = load_rows({"exact": exact, "fhopt@4x": {"requests_per_minute": 15.0, "mean_token_ms": 400.0}})
    ratios = {row.metric: row.ratio for row in rows if row.impl == "fhopt@4x"}
    assert ratios == {"requests_per_minute": 1.5, "mean_token_ms": 0.5}
