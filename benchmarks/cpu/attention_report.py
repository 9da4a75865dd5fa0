"""Table and plot of benchmarks/cpu/attention.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.cpu.attention_shapes import AttentionCase
from benchmarks.recording import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

PROMISES = {  # speedup over the best of torch, at 32,768 tokens, batch 1, for either number of threads
    ("GQA 32/8x128", "float32", "8x"): 5.0,
    ("GQA 32/8x128", "bfloat16", "8x"): 4.0,
    ("GQA 32/8x128", "float32", "4x"): 5.0,
    ("GQA 32/8x128", "float32", "half width, float16"): 5.0,
    ("MHA 32x128", "float32", "8x"): 5.0,
    ("MHA 32x128", "bfloat16", "8x"): 5.0,
    ("MHA 32x128", "float32", "full"): 1.2,
    ("MHA 32x128", "bfloat16", "full"): 1.2,
    ("GQA 32/8x128", "float32", "full"): 1.2,
    ("GQA 32/8x128", "bfloat16", "full"): 1.2,
}


COPY = "copy"  # the implementation whose row has the copy bandwidth


def speed_gb_s(by_key: Mapping[tuple[str, str, str], Row], case: str, name: str) -> float | None:
    """Return the GB/s at which an implementation loads its keys and values, None if it was not timed."""
    time_ms, size = by_key.get((case, name, "time_ms")), by_key.get((case, name, "bytes"))
    return size.value / time_ms.value / 1e6 if time_ms and size else None


def promised(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Return (case and implementation, target, measured) of the targets whose cases were measured."""
    out = []
    for row in rows:
        shape, tokens, batch, dtype, _ = row.case.split(", ")
        target = PROMISES.get((shape, dtype, row.impl.removeprefix("fhopt ")))
        if row.metric == "time_ms" and target and (tokens, batch) == ("T=32768", "B=1") and row.ratio:
            out.append((f"{row.case}: {row.impl}", target, row.ratio))
    return out


def summary(rows: Sequence[Row]) -> Table:
    """Format a row per case, a column per implementation: milliseconds, speedup over torch, share of copy bandwidth."""
    names = [name for name in dict.fromkeys(row.impl for row in rows) if name != COPY]
    by_key = {(row.case, row.impl, row.metric): row for row in rows}
    out = Table(title="attention of one token: ms (speed-up over the fastest of torch, share of a copy's GB/s)")
    out.add_column("", overflow="fold")
    for name in names:
        out.add_column(name, justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        cells, copy = [], by_key[case, COPY, "gb_s"].value
        for name in names:
            time_ms, speed = by_key.get((case, name, "time_ms")), speed_gb_s(by_key, case, name)
            shown = time_ms and speed and f"{time_ms.value:.3g} ({time_ms.ratio:.2f}x, {100 * speed / copy:.0f} %)"
            cells.append(shown or "")
        out.add_row(case, *cells)
    return out


def _group(case: str) -> str:
    shape, _, _, dtype, _ = case.split(", ")
    return f"{shape}, {dtype}"


def _label(case: str) -> tuple[str, str, str]:
    _, tokens, batch, _, threads = case.split(", ")
    return tokens, batch, threads


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """Plot speedups over torch at the longest context: a panel per shape and dtype, a bar per implementation."""
    shown = [row for row in rows if row.metric == "time_ms"]
    longest = max(int(row.case.split(", ")[1][2:]) for row in shown)
    shown = [row for row in shown if f"T={longest}," in row.case and ", B=1, " in row.case]
    groups = list(dict.fromkeys(_group(row.case) for row in shown))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(row.impl for row in shown))
    threads = list(dict.fromkeys(_label(row.case)[2] for row in shown))
    height = 0.8 / len(threads)
    for panel, group in zip(panels, groups, strict=True):
        for index, count in enumerate(threads):
            bars = {r.impl: r for r in shown if _group(r.case) == group and _label(r.case)[2] == count}
            at = [i + height * (index - (len(threads) - 1) / 2) for i, name in enumerate(names) if name in bars]
            values = [bars[name].ratio or 0.0 for name in names if name in bars]
            panel.barh(at, values, height, label=count)
        panel.axvline(1.0, color="gray", linewidth=0.8, linestyle=":")
        panel.set_title(group.replace(", ", "\n"), fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7)
    figure.supxlabel(f"speed-up over the fastest implementation in torch, T={longest:,}, B=1", fontsize=9)


def line(case: AttentionCase, rows: Sequence[Row]) -> str:
    """Format the results of a case in one line."""
    here = [row for row in rows if row.case == case.name and row.metric == "time_ms"]
    return f"{case.name}: " + ", ".join(f"{row.impl} {row.value:.3g} ({row.ratio:.2f}x)" for row in here)
