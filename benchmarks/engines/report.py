"""Rows, tables and plot of benchmarks/engines/compare.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import recording
from benchmarks.engines.catalog import OURS, SMALL_WEIGHTS
from benchmarks.engines.rounds import METRICS, EngineCase, Outcomes, figures
from benchmarks.palette import describe, sorted_bars
from benchmarks.recording import ResultsFile, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

INSTALLED = "installation"  # case for the sizes of environments
HIGHER = {metric.name: metric.higher for metric in METRICS}
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


def earlier(name: str) -> list[Row]:
    """Return the rows of a former run, including failures."""
    return list(recording.read(name).rows) if (recording.RESULTS / f"{name}.json").exists() else []


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


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot decode throughput at the longest context that every vector unit has, a panel per unit, sorted."""
    shown = [row for row in results.of(METRICS[0].name) if row.impl not in SMALL_WEIGHTS]
    if not shown:
        return
    first = CaseName.read(shown[0].case)
    by_context: dict[int, dict[str, dict[str, float]]] = {}
    for row in shown:
        case = CaseName.read(row.case)
        if (case.model, case.batch) == (first.model, first.batch):
            by_context.setdefault(case.context, {}).setdefault(case.vector_unit, {})[row.impl] = row.value
    context, speeds = max(by_context.items(), key=lambda item: (len(item[1]), item[0]))
    panels = figure.subplots(1, len(speeds), squeeze=False)[0]
    figure.set_size_inches(10.5, 3.6)
    gains = []
    for panel, (unit, measured) in zip(panels, sorted(speeds.items(), reverse=True), strict=True):
        best = _fastest_caches(measured)
        sorted_bars(panel, best, "decode throughput, tokens/s")
        panel.set_title(UNITS.get(unit, unit), fontsize=9)
        ours, others = ([v for name, v in best.items() if is_ours(name) is mine] for mine in (True, False))
        gains += [max(ours) / max(others)] if ours and others else []
    about = f"{first.model}, 16-bit weights, batch {first.batch}, each engine with its fastest KV-cache type"
    several = "; one of the panels is from another CPU with as many threads" if len(speeds) > 1 else ""
    gain = " to ".join(dict.fromkeys(f"{gain:.1f}x" for gain in sorted(gains)))
    finding = f"At a {context:,}-token context fhopt decodes {gain} faster than the best other engine"
    finding = finding if gains else f"Decode throughput at a {context:,}-token context"
    describe(figure, finding, about + several, results)


UNITS = {"AVX512": "CPU with AVX-512", "AVX2": "CPU with AVX2 only"}


def _fastest_caches(speeds: Mapping[str, float]) -> dict[str, float]:
    """Keep the fastest KV-cache type of each other engine, and all plans of fhopt."""
    best: dict[str, tuple[float, str]] = {}
    for impl, speed in speeds.items():
        engine = impl if is_ours(impl) else impl.split()[0]
        best[engine] = max(best.get(engine, (0.0, "")), (speed, impl))
    return {impl: speed for speed, impl in best.values()}


def shown_failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each engine that failed, with its error and the contexts."""
    by_error: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            case = CaseName.read(row.case)
            by_error.setdefault((row.impl, row.error), []).append(f"{case.context} x {case.batch}")
    return [f"{impl} ({', '.join(where)}): {error}" for (impl, error), where in by_error.items()]
