"""Results of benchmarks/gpu/suite.py, stored incrementally, and their presentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click
from rich.table import Table

from benchmarks import recording
from benchmarks.gpu.timing import TimedDevice
from benchmarks.palette import TEXT, color_of, describe, plain
from benchmarks.recording import ResultsFile, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]


@dataclass
class GpuReport:
    """Results so far, stored in a file after every case, and notes on them."""

    file: str
    mark: str
    rows: list[Row] = field(default_factory=list)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # cases by (implementation, note)

    def case(self, shape: str, batch: int, tokens: int) -> str:
        """Return the name of a case."""
        return f"{self.mark}{shape}, batch {batch}, {tokens:,} tokens"

    def add(self, rows: Sequence[Row]) -> None:
        """Add the rows of a case."""
        self.rows += rows
        recording.write(self.file, self.rows)

    def note(self, case: str, impl: str, what: str) -> None:
        """Record a note about one implementation."""
        what = " ".join(what.split())[:200]
        self.notes.setdefault((impl, what), []).append(case)
        click.echo(f"{case}: {impl}: {what}", err=True)

    def leave_out(self, case: str, impl: str, error: Exception) -> None:
        """Record why an implementation is not measured."""
        self.note(case, impl, f"left out, {error or type(error).__name__}")


def line(case: str, rows: Sequence[Row]) -> str:
    """Format the results of a case in one line."""
    shown = [row for row in rows if row.case == case and row.unit == "ms"]
    words = [f"{row.impl} {row.value:.4g} ms" + (f" ({row.ratio:.2f}x)" if row.ratio else "") for row in shown]
    return f"{case}: " + ", ".join(words)


COLUMNS = ("case", "implementation", "ms", "times the fastest dense", "GB/s", "of a copy")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS per case and implementation."""
    speeds = {(row.case, row.impl): row for row in rows if row.metric == "gb_s"}
    lines_of_table: list[tuple[str, ...]] = []
    for row in (row for row in rows if row.unit == "ms"):
        impl = row.impl + (" (scaled)" if row.metric == "step_ms_scaled" else "")
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        speed = speeds.get((row.case, row.impl))
        share = ("", "") if speed is None else (f"{speed.value:,.0f}", f"{speed.ratio or 0:.0%}")
        lines_of_table.append((row.case, impl, f"{row.value:.4g}", ratio, *share))
    return lines_of_table


def summary(report: GpuReport) -> Table:
    """Format the table for a terminal."""
    out = Table(title=f"{report.file}: a decode step", title_justify="left")
    for index, name in enumerate(COLUMNS):
        out.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in cells(report.rows):
        out.add_row(*row)
    return out


def markdown(report: GpuReport, machine: TimedDevice, copy: float) -> str:
    """Return the page `gpu.md`."""
    known = ", ".join(f"{name} {version}" for name, version in recording.versions().items())
    lines = [
        f"# Decoding on {machine.name}",
        "",
        f"Made by `benchmarks/gpu/suite.py`, commit {recording.commit()[:12]}, with {known}. "
        f"A copy moves {copy:,.0f} GB/s. What is compared, and how: the docstring of that file.",
        "",
    ]
    table = [COLUMNS, ["---"] * len(COLUMNS), *cells(report.rows)]
    lines += [f"| {' | '.join(row)} |" for row in table]
    if report.notes:
        lines += ["", "## Notes", ""]
    for (impl, what), cases in report.notes.items():
        lines.append(f"- {impl}: {what} ({cases[0]}{f' and {len(cases) - 1} other cases' if len(cases) > 1 else ''})")
    return "\n".join(lines) + "\n"


CASE = re.compile(r"(.+), batch (\d+), ([\d,]+) tokens")


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot speedups over the fastest dense implementation by tokens: a panel per shape, a line per latent and batch."""
    panels_of: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for row in results.of("time_ms"):
        if row.ratio is not None and (match := CASE.fullmatch(row.case)):
            lines = panels_of.setdefault(match[1], {})
            lines.setdefault((row.impl, match[2]), []).append((int(match[3].replace(",", "")), row.ratio))
    panels = figure.subplots(1, max(1, len(panels_of)), squeeze=False, sharey=True)[0]
    for panel, (shape, lines) in zip(panels, panels_of.items(), strict=False):
        for (impl, batch), points in lines.items():
            panel.plot(*zip(*points, strict=True), marker=".", label=f"{impl}, batch {batch}", color=color_of(impl))
        panel.set_xscale("log", base=2)
        panel.set_title(shape, fontsize=9)
        panel.set_xlabel("context length, tokens")
        panel.axhline(1, color=TEXT, linewidth=0.5)
        panel.legend(fontsize=6)
        plain(panel)
    panels[0].set_ylabel("speedup over the fastest dense implementation")
    best = max((row.ratio or 0.0 for row in results.of("time_ms")), default=0.0)
    describe(
        figure,
        f"Decode attention is up to {best:.1f}x faster than the fastest dense implementation",
        "one query token",
        results,
    )
