"""Results of benchmarks/gpu/suite.py, stored incrementally, and their presentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click
from rich.table import Table

from benchmarks import recording
from benchmarks.gpu.timing import TimedDevice
from benchmarks.recording import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]


@dataclass
class GpuReport:
    """Results so far, stored in a file after every case, and notes on them."""

    file: str
    mark: str
    rows: list[Row] = field(default_factory=list)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # cases by (implementation, note)
    places: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # shape, batch and tokens of a case

    def case(self, shape: str, batch: int, tokens: int) -> str:
        """Return the name of a case."""
        name = f"{self.mark}{shape}, batch {batch}, {tokens:,} tokens"
        self.places[name] = shape, batch, tokens
        return name

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


def draw(figure: Figure, report: GpuReport) -> None:
    """Plot speedups over the fastest dense implementation by tokens: a panel per shape, a line per latent and batch."""
    shown = [row for row in report.rows if row.metric == "time_ms" and row.ratio is not None]
    names = list(dict.fromkeys(report.places[row.case][0] for row in shown))
    panels = figure.subplots(1, max(1, len(names)), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=False):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in shown:
            shape, batch, tokens = report.places[row.case]
            if shape == name and row.ratio is not None:
                lines.setdefault((row.impl, batch), []).append((tokens, row.ratio))
        for (impl, batch), points in lines.items():
            panel.plot(*zip(*points, strict=True), marker=".", label=f"{impl}, batch {batch}")
        panel.set_xscale("log", base=2)
        panel.set_title(report.mark + name, fontsize=9)
        panel.set_xlabel("tokens")
        panel.axhline(1, color="grey", linewidth=0.5)
        panel.legend(fontsize=6)
    panels[0].set_ylabel("times the fastest dense way")
