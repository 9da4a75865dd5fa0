"""Runs of the version-dependent tests in every environment of noxfile.py.

    python -m benchmarks.testing.version_matrix                all: benchmarks/results/matrix.json and a table
    python -m benchmarks.testing.version_matrix --only oldest  one (repeatable); results of others stay in the file

With PIP_EXTRA_INDEX_URL=INDEX, the index of PyTorch's builds for CPUs, CUDA's libraries are not installed.

Nox finds the interpreters and creates the environments. An environment whose interpreter is not installed, or whose
versions the index lacks, is a row of the table with the reason. The exit status is 1 if a test failed, if an
environment could not be created for another reason, or if none was tested.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
from rich.table import Table

from benchmarks.recording import RESULTS, ROOT, Row, screen, write

REPORTS = ROOT / "build" / "matrix"  # output folder of noxfile.py's reports
SHOWN = ("python", "torch", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class EnvironmentOutcome:
    """Outcome of one environment: "success", "skipped", "failed" or "aborted", and why."""

    name: str
    state: str
    reason: str
    seconds: float
    versions: dict[str, str]  # installed ones; empty if none
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def is_good(self) -> bool:
        """Whether every test passed, or there was a reason to run none."""
        return self.state in ("success", "skipped") and not self.failed


def run(names: tuple[str, ...]) -> list[EnvironmentOutcome]:
    """Run environments (all if `names` is empty), one after the other, with their output on the screen."""
    for old in REPORTS.glob("*.*"):
        if not names or old.stem in names:
            old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        signatures = [f"matrix({name})" for name in names] or ["matrix"]
        command = [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--report", str(report)]
        subprocess.run([*command, "--session", *signatures], cwd=ROOT, check=False)
        sessions = json.loads(report.read_text())["sessions"] if report.exists() else []
    return [outcome_of(session, REPORTS) for session in sessions]


def outcome_of(session: dict[str, Any], reports: Path) -> EnvironmentOutcome:
    """Combine nox's report of a session with the files that the session left in `reports`."""
    name = session["signatures"][-1].partition("(")[2].rstrip(")")
    known, tests = reports / f"{name}.json", reports / f"{name}.xml"
    versions = json.loads(known.read_text()) if known.exists() else {}
    counts = counted(tests.read_text()) if tests.exists() else {}
    return EnvironmentOutcome(name, session["result"], session["reason"] or "", session["duration"], versions, **counts)


def counted(xml: str) -> dict[str, int]:
    """Return the numbers of passed, failed (errors included) and skipped tests in a JUnit XML file."""
    sums = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.fromstring(xml).iter("testsuite"):
        for key in sums:
            sums[key] += int(suite.get(key, 0))
    failed = sums["failures"] + sums["errors"]
    return {"passed": sums["tests"] - failed - sums["skipped"], "failed": failed, "skipped": sums["skipped"]}


def rows_of(outcome: EnvironmentOutcome) -> list[Row]:
    """Return the results of an environment; NaN, with the reason, if it was not tested."""
    tested = bool(outcome.passed or outcome.failed)
    figures = (
        ("passed", outcome.passed, ""),
        ("failed", outcome.failed, ""),
        ("skipped", outcome.skipped, ""),
        ("minutes", outcome.seconds / 60, "min"),
    )
    return [
        Row(outcome.name, said(outcome), metric, float(value) if tested else math.nan, unit)
        for metric, value, unit in figures
    ]


def kept(names: tuple[str, ...]) -> list[Row]:
    """Return the recorded rows of environments other than these; empty if `names` is empty, as all are run."""
    path = RESULTS / "matrix.json"
    rows = json.loads(path.read_text())["rows"] if names and path.exists() else []
    return [
        Row(**row | {"value": math.nan if row["value"] is None else row["value"]})
        for row in rows
        if row["case"] not in names
    ]


def said(outcome: EnvironmentOutcome) -> str:
    """Return the versions of an environment, or why it was not tested."""
    if not outcome.passed + outcome.failed:
        return f"not tested: {outcome.reason or outcome.state}"
    return ", ".join(f"{name} {outcome.versions[name]}" for name in SHOWN if name in outcome.versions)


def table(outcomes: list[EnvironmentOutcome]) -> Table:
    """Format a line per environment."""
    out = Table(title="versions", title_justify="left")
    for heading in ("environment", "installed"):
        out.add_column(heading, overflow="fold")
    for heading in ("passed", "failed", "skipped", "minutes"):
        out.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        counts = (outcome.passed, outcome.failed, outcome.skipped)
        figures = [*map(str, counts), f"{outcome.seconds / 60:.1f}"] if any(counts) else ["-"] * 4
        out.add_row(outcome.name, said(outcome), *figures)
    return out


@click.command()
@click.option("--only", "names", multiple=True, metavar="NAME", help="An environment; all where none is named.")
def main(names: tuple[str, ...]) -> None:
    """Run the environments, print a table and record the results."""
    outcomes = run(names)
    path = write("matrix", [*kept(names), *(row for outcome in outcomes for row in rows_of(outcome))])
    screen().print(table(outcomes))
    click.echo(f"matrix: {path.relative_to(ROOT)}")
    is_tested = any(outcome.passed for outcome in outcomes)
    sys.exit(0 if is_tested and all(outcome.is_good for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
