"""The table of test durations, and the budget of tests that it does not have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from durations import DurationRecorder, Durations, split_id

KNOWN = Durations({"unit/test_a.py": 5.0, "unit/test_b.py": 1.0}, {"unit/test_a.py": {"test_slow": 5.0}})


def report(nodeid: str, duration: float) -> Any:
    return SimpleNamespace(nodeid=nodeid, duration=duration)


def recorded(budget: float | None = None) -> DurationRecorder:
    recorder = DurationRecorder(KNOWN, budget, saves=False)
    for nodeid, seconds in (
        ("tests/unit/test_a.py::test_slow[1]", 9.0), ("tests/unit/test_a.py::test_new[x]", 1.0),
        ("tests/unit/test_a.py::test_new[x]", 2.5), ("tests/unit/test_a.py::test_new[y]", 0.5),
    ):  # fmt: skip
        recorder.pytest_runtest_logreport(report(nodeid, seconds))
    return recorder


def test_a_node_id_has_a_file_and_a_test_without_parameters() -> None:
    assert split_id("tests/unit/test_a.py::test_x[a::b[c]]") == ("unit/test_a.py", "test_x")
    assert split_id("tests/unit/test_a.py::Group::test_x") == ("unit/test_a.py", "Group::test_x")


def test_the_table_has_sums_of_files_and_the_slowest_case_of_a_test(tmp_path: Path) -> None:
    measured = recorded().measured()
    assert measured.files == {"unit/test_a.py": 13.0, "unit/test_b.py": 1.0}  # what did not run stays
    assert measured.tests == {"unit/test_a.py": {"test_slow": 9.0, "test_new": 3.5}}
    measured.save(tmp_path / "durations.json")
    assert Durations.load(tmp_path / "durations.json") == measured
    assert Durations.load(tmp_path / "none.json") == Durations()


def test_only_new_tests_have_a_budget() -> None:
    assert recorded(budget=2.0).above_budget() == {"tests/unit/test_a.py::test_new[x]": 3.5}
    assert not recorded(budget=4.0).above_budget() and not recorded().above_budget()


@pytest.mark.parametrize(("budget", "status"), [(2.0, pytest.ExitCode.TESTS_FAILED), (4.0, pytest.ExitCode.OK)])
def test_a_new_test_above_the_budget_fails_the_run(budget: float, status: pytest.ExitCode) -> None:
    recorder, session = recorded(budget), SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    recorder.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert session.exitstatus == status
    lines: list[str] = []
    recorder.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert len(lines) == (status != pytest.ExitCode.OK)
