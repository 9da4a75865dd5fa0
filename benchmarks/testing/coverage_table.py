"""Line and branch coverage of fhopt by package, and the modules with too little of it.

    python -m benchmarks.testing.coverage_table                    measure; benchmarks/results/coverage.json
    python -m benchmarks.testing.coverage_table --part fhopt/plan  measure this part only (repeatable), report on all
    python -m benchmarks.testing.coverage_table --no-run           report on earlier measurements
    python -m benchmarks.testing.coverage_table --list             name the parts

The tests of each package run in a separate process (coverage_runs.py), except slow ones and those that need a GPU. A
measured part is not rerun until its package or its tests change, so that the next call continues an interrupted one, or
one whose --minutes ran out. Code that runs in child processes is counted. The text of generated kernels is not part of
fhopt, and code that runs only on a GPU counts as not run.

Results are recorded once all parts are measured. The exit status is 1 if a test failed, if less than LEAST of all lines
are run, or if parts are still to be measured.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
from rich.table import Table

from benchmarks.recording import Row, record, screen
from benchmarks.testing.coverage_runs import PartRun, TestPart, combined, is_current, kept, package_of, parts, run

MIN_PERCENT = 90.0  # % of all lines
LISTED_BELOW = 80.0  # % of the lines of a module
ALL = "all"
UNEXPLAINED = "no reason is known"
REASONS = {  # why the tests of `make coverage` run few lines of a module, or of all modules below a folder
    "codegen/gpu/": "launches kernels on a GPU, or describes them to Triton",
    "fhopt/cli/demo.py": "runs in `make test-slow`, on the demo's model",
    "fhopt/evaluation/lm_eval.py": "needs the extra `evaluation`",
    "fhopt/export/mlir.py": "needs the extra `mlir`",
    "fhopt/inspection/model_explorer.py": "needs the extra `explorer`",
}


# --------------------------------------------------------------------------------------------------- results


def rows_of(files: dict[str, Any]) -> list[Row]:
    """Return percentages of lines and branches of packages and of all, then of modules below LISTED_BELOW.

    files: those of coverage.py's report, by path. The implementation of a module's row is the reason.
    """
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for file, about in files.items():
        for name in (package_of(file), ALL):
            for key, count in about["summary"].items():
                if isinstance(count, int):
                    sums[name][key] += count
    rows = []
    for name, summary in sorted(sums.items(), key=lambda item: (item[0] == ALL, item[0])):
        for metric, of in (("lines", "num_statements"), ("branches", "num_branches")):
            covered = summary["covered_lines" if metric == "lines" else "covered_branches"]
            if summary[of]:
                rows.append(Row(name, "tests", metric, 100 * covered / summary[of], "%"))
    return rows + _rows_of_modules(files)


def _rows_of_modules(files: dict[str, Any]) -> list[Row]:
    """Return a row for each module with too little line coverage, lowest first."""
    rows = []
    for file, about in files.items():
        summary = about["summary"]
        lines = 100 * summary["covered_lines"] / max(1, summary["num_statements"])
        if summary["num_statements"] and lines < LISTED_BELOW:
            rows.append(Row(file, reason_for(file), "lines_of_module", lines, "%"))
    return sorted(rows, key=lambda row: (row.value, row.case))


def reason_for(file: str) -> str:
    """Return why few lines of a module are run, from REASONS."""
    return next((reason for path, reason in REASONS.items() if file.startswith(path)), UNEXPLAINED)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Format a table of packages, and one of the modules that are listed."""
    packages = Table("package", "lines, %", "branches, %", title="Coverage", title_justify="left")
    values = {(row.case, row.metric): f"{row.value:.1f}" for row in rows}
    for name in dict.fromkeys(row.case for row in rows if row.metric == "lines"):
        packages.add_row(name, values[name, "lines"], values.get((name, "branches"), ""))
    modules = Table("module", "lines, %", "why", title=f"Modules below {LISTED_BELOW:.0f} %", title_justify="left")
    for row in rows:
        if row.metric == "lines_of_module":
            modules.add_row(row.case, f"{row.value:.1f}", row.impl)
    return [packages, modules]


# --------------------------------------------------------------------------------------------------- command


def measure(
    chosen: Sequence[TestPart], workers: int, seconds: float, part_seconds: float, again: bool
) -> list[PartRun]:
    """Run the unmeasured parts, `workers` at a time; parts beyond the time limit are skipped."""
    end = time.monotonic() + seconds

    def one(part: TestPart) -> PartRun | None:
        earlier = None if again else kept(part)
        if earlier is not None:
            return earlier
        left = min(part_seconds, end - time.monotonic())
        if left < 1:
            return None
        done = run(part, left)
        click.echo(f"{part.name}: {done.state} after {done.seconds:.0f} s", err=True)
        return done

    with ThreadPoolExecutor(workers) as pool:
        return [done for done in pool.map(one, chosen) if done is not None]


def chosen_parts(names: Sequence[str]) -> list[TestPart]:
    """Return the parts of these names, all if empty. Raises BadParameter for an unknown name."""
    known = {part.name: part for part in parts()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"unknown part {unknown[0]!r}; --list names all of them.", param_hint="--part")
    return [known[name] for name in names] if names else list(known.values())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--part", "names", multiple=True, metavar="PART", help="Measure this part only; repeatable.")
@click.option("--no-run", is_flag=True, help="Report on what was measured before.")
@click.option("--again", is_flag=True, help="Measure parts also where they were measured and nothing has changed.")
@click.option("--list", "lists", is_flag=True, help="Name the parts.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Parts at a time.")
@click.option("--minutes", type=float, default=120.0, show_default=True, help="Start and run tests for so long.")
@click.option("--part-minutes", type=float, default=20.0, show_default=True, help="Of one part at most.")
def main(
    names: tuple[str, ...], no_run: bool, again: bool, lists: bool, workers: int, minutes: float, part_minutes: float
) -> None:
    """Measure what tests cover, package by package, and report it."""
    chosen = chosen_parts(names)
    if lists:
        click.echo("\n".join(part.name for part in chosen))
        return
    runs = [] if no_run else measure(chosen, workers, 60 * minutes, 60 * part_minutes, again)
    every = parts()
    rows = rows_of(combined(every))
    waiting = [part.name for part in every if not is_current(part)]
    packages, modules = tables(rows)
    if waiting:
        screen().print(packages)  # do not record partial results: they would pass for complete ones
    else:
        record("coverage", rows, summary=packages)
    screen().print(modules)
    sentences = problems(rows, [done.part.name for done in runs if done.state == "failed"], waiting)
    click.echo("\n".join(sentences), err=True)
    sys.exit(bool(sentences))


def problems(rows: Sequence[Row], failed: Sequence[str], waiting: Sequence[str]) -> list[str]:
    """Return the problems, a sentence each. failed, waiting: names of parts."""
    lines = next(row.value for row in rows if (row.case, row.metric) == (ALL, "lines"))
    sentences = {
        f"Tests failed in {', '.join(failed)}: output.txt below build/coverage/parts.": bool(failed),
        f"{len(waiting)} parts are not measured to the end: {', '.join(waiting)}. Run it again to continue.": bool(
            waiting
        ),
        f"{lines:.1f} % of the lines are covered, expected {MIN_PERCENT:.0f} %.": lines < MIN_PERCENT,
    }
    return [sentence for sentence, is_so in sentences.items() if is_so]


if __name__ == "__main__":
    main()
