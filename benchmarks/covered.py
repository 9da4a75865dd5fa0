"""Report which lines and branches of fhopt the tests run, by part, from the measurement of `make coverage`.

    make coverage                        runs the tests that are not slow under coverage.py, then this
    python benchmarks/covered.py         the table again: benchmarks/results/coverage.json and .png

Code that runs only on a GPU (Triton's kernels and their calls) counts as not covered, unless the interpreter runs it.
Code that runs in child processes is counted. Ends with 1 where less than LEAST of the lines are covered.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from recording import ROOT, Row, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

MEASURED = ROOT / "build" / "coverage" / "coverage.json"
LEAST = 90.0  # % of lines
ALL = "all"


def part_of(file: str) -> str:
    """The package of a file of fhopt: passes, codegen, seeing, or fhopt itself."""
    parents = Path(file).parts[:-1]
    return next((part for part in ("passes", "codegen", "seeing") if part in parents), "fhopt")


def rows_of(files: dict[str, Any]) -> list[Row]:
    """Percentages of lines and of branches, of each part and of all, from the files of coverage.py's report."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for file, about in files.items():
        for part in (part_of(file), ALL):
            for key, count in about["summary"].items():
                if isinstance(count, int):
                    sums[part][key] += count
    rows = []
    for part, found in sorted(sums.items(), key=lambda item: (item[0] == ALL, item[0])):
        for metric, of in (("lines", "num_statements"), ("branches", "num_branches")):
            covered = found["covered_lines" if metric == "lines" else "covered_branches"]
            if found[of]:
                rows.append(Row(part, "tests", metric, 100 * covered / found[of], "%"))
    return rows


def draw(figure: Figure, rows: list[Row]) -> None:
    """A pair of bars for each part."""
    panel = figure.subplots()
    parts = list(dict.fromkeys(row.case for row in rows))
    for i, metric in enumerate(("lines", "branches")):
        values = [row.value for row in rows if row.metric == metric]
        panel.bar([x + 0.4 * i for x in range(len(parts))], values, 0.38, label=metric)
    panel.set_xticks([x + 0.2 for x in range(len(parts))], parts)
    panel.set_ylabel("% covered")
    panel.set_ylim(0, 100)
    panel.legend(loc="lower right")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Report what tests cover."""
    if not MEASURED.exists():
        raise click.ClickException(f"{MEASURED} is not there. Measure it with: make coverage")
    rows = rows_of(json.loads(MEASURED.read_text())["files"])
    record("coverage", rows, lambda figure: draw(figure, rows))
    lines = next(row.value for row in rows if (row.case, row.metric) == (ALL, "lines"))
    if lines < LEAST:
        click.echo(f"{lines:.1f} % of the lines are covered, expected {LEAST:.0f} %.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
