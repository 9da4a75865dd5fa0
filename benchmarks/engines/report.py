"""Rows, tables and plot of benchmarks/engines/compare.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import recording
from benchmarks.engines.catalog import OURS, SMALL_WEIGHTS
from benchmarks.engines.rounds import METRICS, EngineCase, Outcomes, figures
from benchmarks.recording import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

INSTALLED = "installation"  # case for the sizes of environments
HIGHER = {metric.name: metric.higher for metric in METRICS}
MARKERS = "osv^DP*Xph"
SHOWN = {
    "decode_tokens_per_second": "decode, tokens/s",
    "prefill_tokens_per_second": "prompt, tokens/s",
    "first_token_s": "first token, s",
    "peak_bytes": "peak memory, MiB",
}


@dataclass(frozen=True)
class CaseName:
    """The parts of a case's name."""

    model: str
    context: int
    batch: int
    vector_unit: str

    @staticmethod
    def read(name: str) -> CaseName:
        """Parse `<model>/<context>/<batch>/<vector unit>`."""
        model, context, batch, unit = name.rsplit("/", 3)
        return CaseName(model, int(context), int(batch), unit)


def vector_unit() -> str:
    """Return the vector unit that torch uses on this CPU, such as AVX2 or AVX512."""
    return str(recording.machine()["cpu_capability"])


# --------------------------------------------------------------------------------------------------- rows


def rows_of(outcomes: Outcomes, unit: str) -> list[Row]:
    """Return the results of all outcomes; a failure is a row without a value, with the error."""
    rows = []
    for (case, engine), outcome in outcomes.items():
        name = case.name(unit)
        rows += [Row(name, engine, metric.name, value, metric.unit) for metric, value in figures(case, outcome)]
        if outcome.reports:
            rows.append(Row(name, engine, "rounds", float(len(outcome.reports)), ""))
        if outcome.error:
            rows.append(failure(case, engine, outcome.error, unit))
    return rows


def failure(case: EngineCase, engine: str, error: str, unit: str) -> Row:
    """Return the row of a failed measurement."""
    first = METRICS[0]
    return Row(case.name(unit), engine, first.name, math.nan, first.unit, error=error)


def merged(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return earlier rows of cases and implementations that were not measured now, and the new ones."""
    known = {(row.case, row.impl) for row in rows}
    return [row for row in earlier if (row.case, row.impl) not in known] + list(rows)


def earlier(file: Path) -> list[Row]:
    """Return the rows of a former run, including failures."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return [Row(**{**row, "value": math.nan if row["value"] is None else row["value"]}) for row in rows]


def compared(rows: Sequence[Row]) -> list[Row]:
    """Give rows of fhopt a baseline: the best of all other engines in the case.

    Engines with 16-bit or wider weights count, or all of them if fhopt's own weights are quantized. The ratio is above
    1 if fhopt is better.
    """
    of_others = [row for row in rows if not is_ours(row.impl) and math.isfinite(row.value)]
    out = []
    for row in rows:
        same = [other for other in of_others if (other.case, other.metric) == (row.case, row.metric)]
        others = [r.value for r in same if row.impl in SMALL_WEIGHTS or r.impl not in SMALL_WEIGHTS]
        if row.metric not in HIGHER or not is_ours(row.impl) or not others or not math.isfinite(row.value):
            out.append(row)
            continue
        best = max(others) if HIGHER[row.metric] else min(others)
        ratio = row.value / best if HIGHER[row.metric] else best / row.value
        out.append(replace(row, baseline=best, ratio=ratio))
    return out


def is_ours(impl: str) -> bool:
    """Return whether an implementation is fhopt's."""
    return impl.split()[0] == OURS


def installed(sizes: Mapping[str, int]) -> list[Row]:
    """Return rows of the installed bytes of environments."""
    return [Row(INSTALLED, name, "installed_bytes", float(size), "bytes") for name, size in sizes.items()]


# --------------------------------------------------------------------------------------------------- tables


def summary(rows: Sequence[Row], about: str) -> Table:
    """Format a line per implementation and case: all metrics, or the error."""
    table = Table(title=f"engines on {about}", title_justify="left")
    for heading in ("case", "engine"):
        table.add_column(heading, overflow="fold")
    for heading in SHOWN.values():
        table.add_column(heading, justify="right")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row.case != INSTALLED:
            cells.setdefault((row.case, row.impl), {})[row.metric] = row.error or cell(row)
    for (case, impl), values in cells.items():
        table.add_row(case, impl, *(values.get(metric, "") for metric in SHOWN))
    return table


def cell(row: Row) -> str:
    """Format a value, with its ratio to the best other engine."""
    value = row.value / 2**20 if row.unit == "bytes" else row.value
    ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + ratio


def about(machine: Mapping[str, Any]) -> str:
    """Return the CPU name, its vector unit and the number of threads."""
    return f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads"


# --------------------------------------------------------------------------------------------------- plot


def draw(figure: Figure, rows: Sequence[Row], title: str) -> None:
    """Plot decode speed against context: a panel per model, batch and vector unit, a line per implementation.

    title: the machine of the last measurement, if there are several.
    """
    shown = [r for r in rows if r.metric == METRICS[0].name and math.isfinite(r.value)]
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in shown:
        case = CaseName.read(row.case)
        groups.setdefault((case.model, case.batch, case.vector_unit), []).append(row)
    if not groups:
        return
    figure.set_size_inches(3.7 * len(groups) + 2.2, 4.8)
    figure.suptitle(f"decode speed; {title} was measured last", fontsize=9)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    implementations = list(dict.fromkeys(row.impl for row in shown))
    lines: dict[str, Any] = {}
    for panel, ((model, batch, unit), here) in zip(panels, groups.items(), strict=True):
        lines |= _lines(panel, here, implementations)
        panel.set_title(f"{model}, batch {batch}, {unit}", fontsize=8)
    legend = [lines[impl] for impl in implementations]
    panels[-1].legend(legend, implementations, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _lines(panel: Any, rows: Sequence[Row], implementations: Sequence[str]) -> dict[str, Any]:
    """Plot a line per implementation: fhopt's are thick, those of one engine share a marker."""
    engines: dict[str, str] = {}
    lines = {}
    panel.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens per second")
    for index, impl in enumerate(implementations):
        points = sorted((CaseName.read(row.case).context, row.value) for row in rows if row.impl == impl)
        marker = engines.setdefault(impl.split()[0], MARKERS[len(engines) % len(MARKERS)])
        if not points:
            continue
        style, width = ("-", 2.5) if is_ours(impl) else ("--", 1.0)
        color = f"C{index % 10}"
        line = panel.plot(*zip(*points, strict=True), style, marker=marker, label=impl, linewidth=width, color=color)
        lines[impl] = line[0]
    contexts = sorted({CaseName.read(row.case).context for row in rows})
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.set_xticks([], minor=True)
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis("{x:g}")
    return lines


def shown_failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each engine that failed, with its error and the contexts."""
    by_error: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            case = CaseName.read(row.case)
            by_error.setdefault((row.impl, row.error), []).append(f"{case.context} x {case.batch}")
    return [f"{impl} ({', '.join(where)}): {error}" for (impl, error), where in by_error.items()]
