"""Durations of tests: a committed table orders the files of a run, and new tests have a budget.

    make durations         runs the tests alone on this machine and writes tests/durations.json
    --budget SECONDS       fails a run in which a test that the table does not have takes longer (.ci/run)

The table has the seconds of each file, and of the slowest case of each test with its fixtures. A test above the budget
is marked slow or made faster; one that must be slow is in the table after the next `make durations`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[1] / "durations.json"


@dataclass
class Durations:
    """Seconds of files, and of the slowest case of each test, by file and name."""

    files: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path = TABLE) -> Durations:
        """Load the table; an empty one if there is no file."""
        return Durations(**json.loads(path.read_text())) if path.exists() else Durations()

    def save(self, path: Path = TABLE) -> None:
        """Write the table with one file per line."""
        lines = [f"  {json.dumps(name)}: {json.dumps(self.tests[name], sort_keys=True)}" for name in sorted(self.tests)]
        files = json.dumps({name: self.files[name] for name in sorted(self.files)})
        path.write_text(f'{{\n "files": {files},\n "tests": {{\n' + ",\n".join(lines) + "\n }\n}\n")

    def knows(self, file: str, test: str) -> bool:
        """Return whether the table has a test."""
        return test in self.tests.get(file, {})


def split_id(nodeid: str) -> tuple[str, str]:
    """Return (file below tests/, test without parameters) of a pytest node id."""
    path, _, name = nodeid.partition("::")
    return path.removeprefix("tests/"), name.partition("[")[0]


class DurationRecorder:
    """A pytest plugin of the controlling process: sums the phases of each case, then saves or compares them."""

    def __init__(self, known: Durations, budget: float | None, saves: bool) -> None:
        self.known, self.budget, self.saves = known, budget, saves
        self.cases: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the seconds of one phase of a case."""
        self.cases[report.nodeid] += report.duration

    def measured(self) -> Durations:
        """Return the table of this run; files that did not run stay as they are."""
        found = Durations(dict(self.known.files), dict(self.known.tests))
        totals: defaultdict[str, float] = defaultdict(float)
        slowest: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for nodeid, seconds in self.cases.items():
            file, test = split_id(nodeid)
            totals[file] += seconds
            slowest[file][test] = max(round(seconds, 2), slowest[file].get(test, 0.0))
        found.files |= {file: round(seconds, 1) for file, seconds in totals.items()}
        found.tests |= {file: found.tests.get(file, {}) | tests for file, tests in slowest.items()}
        return found

    def above_budget(self) -> Mapping[str, float]:
        """Return the cases of unknown tests that took longer than the budget, by id."""
        if self.budget is None:
            return {}
        new = {nodeid: s for nodeid, s in self.cases.items() if not self.known.knows(*split_id(nodeid))}
        return {nodeid: seconds for nodeid, seconds in new.items() if seconds > self.budget}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Save the table, or fail the run if a new test is above the budget."""
        if self.saves:
            self.measured().save()
        if self.above_budget() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Name the tests above the budget."""
        for nodeid, seconds in self.above_budget().items():
            terminalreporter.write_line(
                f"{nodeid} took {seconds:.1f} s; expected at most {self.budget:g} s of a new test. Make it faster, or "
                "mark it slow and run make durations."
            )
