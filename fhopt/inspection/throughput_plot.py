"""Plot of `fhopt bench`, drawn by matplotlib: speed and bytes over the context, a line per KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhopt.files import check_picture
from fhopt.inspection.measured_tables import throughput_heading
from fhopt.inspection.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("prefill_tokens_per_second", "prefill throughput, tok/s", 1.0),
    ("decode_tokens_per_second", "decode throughput, tok/s", 1.0),
    ("time_to_first_token_s", "time to first token, s", 1.0),
    ("cache_bytes", "KV cache, MB", 1e6),
)


def plot_throughput(result: Mapping[str, Any], path: Path) -> Path:
    """Draw the JSON of `fhopt bench` to `path` (.png, .svg or .pdf). Raises FhoptError."""
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (field, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, result["rows"], field, unit)
        axes.set(title=title, xlabel="context, tokens", ylim=(0, None))
    figure.suptitle(throughput_heading(result))
    save_figure(figure, path)
    return path


def _panel(axes: Axes, rows: list[Mapping[str, Any]], field: str, unit: float) -> None:
    """Draw a line for each KV cache and batch: a color per cache, a dash per batch."""
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = sorted(rows, key=lambda r: (caches.index(r["cache"]), r["batch"], r["context"]))
    for (cache, batch), line in groupby(lines, key=lambda r: (r["cache"], r["batch"])):
        points = [(row["context"], row[field] / unit) for row in line]
        axes.plot(
            *zip(*points, strict=True), marker="o", color=f"C{caches.index(cache)}",
            linestyle=("-", "--", "-.", ":")[batches.index(batch) % 4],
            label=cache if len(batches) == 1 else f"{cache}, batch {batch}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({row["context"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
