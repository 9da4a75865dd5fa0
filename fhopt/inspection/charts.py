"""Charts of a report as Vega-Lite specifications.

Each names its data (`{"name": ROWS}`), which the page fills in from the report's own JSON, so a chart shows no value
that is not in the JSON. The page sets colors, fonts and width.

Vega-Lite: Satyanarayan et al. 2017, A Grammar of Interactive Graphics.
"""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]
HEIGHT = 220
_FIT = {"type": "fit-x", "contains": "padding"}
_SIDES = {"domain": ["keys", "values", "keys and values"], "range": ["#6366f1", "#14b8a6", "#f59e0b"]}
_CACHES = {"domain": ["exact", "plan"], "range": ["#ef4444", "#14b8a6"]}


def _spec(rows: str, **parts: Any) -> Spec:
    return {"data": {"name": rows}, "width": "container", "height": HEIGHT, "autosize": _FIT, **parts}


def _quantity(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _site_axis() -> Spec:
    axis = {"labelOverlap": True, "labelAngle": 0}
    return {"field": "index", "type": "ordinal", "title": "site", "sort": None, "axis": axis}


def _side_colour() -> Spec:
    return {"field": "side", "type": "nominal", "title": None, "scale": _SIDES, "legend": {"orient": "top"}}


def _ticks(form: str) -> Spec:
    """Return the ticks of a logarithmic axis, without a grid, which would be too dense."""
    return {"format": form, "grid": False, "tickCount": 5}


def _log() -> Spec:
    return {"type": "log", "nice": False}


def size() -> Spec:
    """Chart bytes per quantized token of each site, keys and values stacked. Rows: site, index, side, bytes, exact."""
    return _spec(
        "size",
        mark={"type": "bar"},
        encoding={
            "x": _site_axis(),
            "y": _quantity("bytes", "bytes per quantized token", stack=True),
            "color": _side_colour(),
            "tooltip": _tips(site="site", side="side", bytes="bytes", exact="exact, both sides"),
        },
    )


def sensitivity() -> Spec:
    """Chart the expected KL with 2 bits in every channel, and with the plan. Rows: site, index, side, kind, nats."""
    return _spec(
        "sensitivity",
        mark={"type": "point", "filled": True, "size": 45},
        encoding={
            "x": _site_axis(),
            "y": _quantity("nats", "nats/token", scale=_log(), axis=_ticks(".0e")),
            "color": _side_colour(),
            "shape": {"field": "kind", "type": "nominal", "title": None, "legend": {"orient": "top"}},
            "tooltip": _tips(site="site", side="side", kind="with", nats="nats/token"),
        },
    )


def curve() -> Spec:
    """Chart expected KL against size, with the chosen plan marked. Rows: ratio, bytes_per_token, nats, chosen."""
    encoding = {
        "x": _quantity("bytes_per_token", "bytes per token, everything included", scale=_log(), axis=_ticks("~s")),
        "y": _quantity("nats", "expected loss, nats/token", scale=_log(), axis=_ticks(".0e")),
        "tooltip": _tips(ratio="ratio", bytes_per_token="bytes per token", nats="nats/token"),
    }
    text = {"field": "label", "type": "nominal"}
    return _spec(
        "curve",
        encoding=encoding,
        layer=[
            {"mark": {"type": "line", "color": "#6366f1"}},
            {"mark": {"type": "point", "filled": True, "size": 50, "color": "#6366f1"}},
            {"mark": {"type": "text", "dy": -10, "dx": 12}, "encoding": {"text": text}},
            {
                "transform": [{"filter": "datum.chosen"}],
                "mark": {"type": "point", "filled": True, "size": 180, "color": "#f59e0b"},
            },
        ],
    )


def heat(rows: str, title: str, is_logarithmic: bool) -> Spec:
    """Chart a value for each chunk of channels of each site. Rows: site, index, side, chunk, value."""
    scale = _log() | {"scheme": "viridis"} if is_logarithmic else {"scheme": "viridis", "domain": [0, 8], "clamp": True}
    shown = {"format": ".0e"} if is_logarithmic else {}
    return _spec(
        rows,
        mark={"type": "rect"},
        encoding={
            "x": {
                "field": "chunk",
                "type": "ordinal",
                "title": "chunk of 8 channels, by decreasing loss",
                "axis": {"labelOverlap": True, "labelAngle": 0},
            },
            "y": _site_axis(),
            "color": _quantity("value", title, scale=scale, legend={"orient": "top", "gradientLength": 160, **shown}),
            "tooltip": _tips(site="site", side="side", chunk="chunk", value=title),
        },
    ) | {"height": {"step": 9}}


def spectrum() -> Spec:
    """Chart one side of one site: the cost of dropping a channel, colored by its bits. Rows: channel, nats, bits."""
    return _spec(
        "spectrum",
        mark={"type": "bar", "tooltip": True},
        encoding={
            "x": {
                "field": "channel",
                "type": "ordinal",
                "title": "channels, by cost",
                "axis": {"labelOverlap": True, "labelAngle": 0},
            },
            "y": _quantity("exponent", "log10(nats/token)", axis={"tickCount": 5}, scale={"zero": False}),
            "y2": {"field": "floor"},
            "color": {
                "field": "bits",
                "type": "ordinal",
                "title": "bits",
                "scale": {"domain": [0, 1, 2, 3, 4, 5, 6, 8, 16], "scheme": "viridis"},
                "legend": {"orient": "top", "columns": 5, "symbolSize": 60},
            },
            "tooltip": _tips(channel="channel", nats="nats/token", bits="bits"),
        },
    ) | {"height": 150}


def roofline() -> Spec:
    """Chart a device's roofline and attention below it. Rows: `roof` (intensity, tflops); `points` (and cache)."""
    x = _quantity("intensity", "operations per byte", scale=_log(), axis=_ticks("~g"))
    y = _quantity("tflops", "attainable TFLOP/s", scale=_log(), axis=_ticks("~g"))
    tips = _tips(cache="cache", intensity="operations per byte", tflops="TFLOP/s", seconds="seconds", bound="bound by")
    colour = {"field": "cache", "type": "nominal", "title": None, "scale": _CACHES, "legend": {"orient": "top"}}
    return {
        "width": "container",
        "height": 190,
        "autosize": _FIT,
        "layer": [
            {"data": {"name": "roof"}, "mark": {"type": "line", "color": "#a1a1aa"}, "encoding": {"x": x, "y": y}},
            {
                "data": {"name": "points"},
                "mark": {"type": "point", "filled": True, "size": 120},
                "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips},
            },
        ],
    }


def _tips(**fields: str) -> list[Spec]:
    return [{"field": field, "title": title} for field, title in fields.items()]


def all_charts() -> dict[str, Spec]:
    """Return every chart by its name in a page."""
    return {
        "size": size(),
        "sensitivity": sensitivity(),
        "curve": curve(),
        "roofline": roofline(),
        "spectrum": spectrum(),
        "spectra": heat("spectra", "nats/token", True),
        "bits": heat("bits", "bits", False),
    }
