"""The rows of `make bench-serve`: the best of all turns, beside the exact engine."""

from __future__ import annotations

from typing import Any

from serving import rows_of


def turn(concurrency: float, speed: float, first: float) -> dict[str, Any]:
    return {"concurrency": concurrency, "cases": {"8 x 512": {"tokens_per_second": speed, "first_ms": first}}}


def test_the_best_turn_of_each_engine_counts() -> None:
    rows = rows_of({
        "exact": [turn(5.0, 10.0, 400.0), turn(5.0, 12.0, 300.0)],
        "fhopt@4x": [turn(19.0, 18.0, 450.0), turn(19.0, 15.0, 600.0)],
    })  # fmt: skip
    found = {(row.impl, row.metric): (row.value, row.ratio) for row in rows}
    assert found["fhopt@4x", "concurrency"] == (19.0, 3.8)
    assert found["fhopt@4x", "decode_tokens_per_second"] == (18.0, 1.5)
    assert found["fhopt@4x", "time_to_first_token_ms"] == (450.0, 300.0 / 450.0)
    assert found["exact", "decode_tokens_per_second"] == (12.0, 1.0)
    assert {row.case for row in rows if row.metric == "concurrency"} == {"8192 tokens"}
