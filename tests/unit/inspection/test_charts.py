"""Charts of a report."""

from __future__ import annotations

import pytest

from fhopt.inspection import charts

vl_convert = pytest.importorskip("vl_convert", reason="the extra report is not installed: pip install 'fhopt[report]'")


@pytest.mark.parametrize("name", sorted(charts.all_charts()))
def test_vega_lite_draws_every_chart(name: str) -> None:
    row = {"site": "a", "index": "0", "side": "keys", "kind": "plan", "label": "4x", "chosen": True, "cache": "plan",
           "bound": "memory", "chunk": 0, "channel": 0, "bits": 4, "ratio": 4.0, "exact": 9, "bytes": 5.0,
           "bytes_per_token": 5.0, "nats": 1e-3, "exponent": -3.0, "floor": -4.0, "value": 1.0, "intensity": 3.0,
           "tflops": 2.0, "seconds": 1e-3}  # fmt: skip
    spec = charts.all_charts()[name]
    schema = "https://vega.github.io/schema/vega-lite/v6.json"
    whole = spec | {
        "$schema": schema,
        "width": 560,
        "datasets": {rows: [row, row] for rows in (name, "roof", "points")},
    }
    svg = vl_convert.vegalite_to_svg(whole)
    assert svg.count("aria-roledescription") > 3
