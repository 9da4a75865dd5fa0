"""The environments of `make test-matrix` (noxfile.py): their coverage and results table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testing import version_matrix

nox: Any = pytest.importorskip("nox")  # of the extra `dev`
ROOT = Path(__file__).parents[2]

import noxfile  # noqa: E402


def versions_in_matrix(package: str) -> set[str]:
    """Return the versions of a package that environments require, "" for the newest."""
    asked = [name.partition("==") for e in noxfile.ENVIRONMENTS.values() for name in e.packages]
    return {version.removesuffix(".*") for name, _, version in asked if name == package}


def test_every_relevant_version_is_in_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"2.11", "2.12", "2.13", ""} <= versions_in_matrix("torch")
    assert {"3.6", "3.7", ""} <= versions_in_matrix("triton")
    assert {"5.20", ""} <= versions_in_matrix("transformers")
    assert {e.python for e in noxfile.ENVIRONMENTS.values()} == {"3.10", "3.11", "3.12", "3.13"}


def test_the_oldest_environment_requires_the_lower_bound_of_every_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.S | re.M)
    assert needed is not None
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)', needed[1])
    assert len(bounds) >= 8
    assert {f"{name}=={bound}" for name, bound in bounds} <= set(noxfile.ENVIRONMENTS["oldest"].packages)


def test_every_named_test_file_exists() -> None:
    assert [name for name in noxfile.TESTED if not (ROOT / "tests" / name).exists()] == []


def test_the_page_of_versions_names_every_environment() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    named = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \|", page, flags=re.M)
    assert named == [(name, e.python) for name, e in noxfile.ENVIRONMENTS.items()]
    for package in ("torch", "transformers", "Triton"):
        said = set(
            re.findall(rf"{package} (\d+\.\d+)", "\n".join(line for line in page.splitlines() if line[:3] == "| `"))
        )
        assert said == {version for version in versions_in_matrix(package.lower()) if version} - lowest(package.lower())


def lowest(package: str) -> set[str]:
    return {name.partition("==")[2] for name in noxfile.lowest() if name.startswith(f"{package}==")}


XML = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="20" time="1"/></testsuites>"""


def session(name: str, result: str, reason: str | None = None) -> dict[str, Any]:
    """A session as nox records it."""
    return {"signatures": ["matrix", f"matrix({name})"], "result": result, "reason": reason, "duration": 90.0}


def test_a_session_becomes_a_table_row(tmp_path: Path) -> None:
    versions = {"python": "3.10.13", "torch": "2.11.0+cpu"}
    (tmp_path / "oldest.json").write_text(json.dumps(versions))
    (tmp_path / "oldest.xml").write_text(XML)
    outcome = version_matrix.outcome_of(session("oldest", "failed"), tmp_path)
    assert outcome == version_matrix.EnvironmentOutcome(
        "oldest", "failed", "", 90.0, versions, passed=14, failed=3, skipped=3
    )
    assert not outcome.is_good
    rows = {row.metric: row for row in version_matrix.rows_of(outcome)}
    assert rows["failed"].value == 3 and rows["minutes"].value == 1.5
    assert rows["passed"].impl == "python 3.10.13, torch 2.11.0+cpu"


def test_an_unavailable_environment_gives_a_reason_and_is_not_a_failure(tmp_path: Path) -> None:
    reason = "Python interpreter 3.10 not found."
    outcome = version_matrix.outcome_of(session("oldest", "skipped", reason), tmp_path)
    assert outcome.is_good
    assert {row.impl for row in version_matrix.rows_of(outcome)} == {f"not tested: {reason}"}
    assert all(math.isnan(row.value) for row in version_matrix.rows_of(outcome))
    assert not version_matrix.outcome_of(session("oldest", "aborted", "conflict"), tmp_path).is_good


def test_one_environment_replaces_only_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        {"case": case, "impl": "x", "metric": "passed", "value": value, "unit": ""}
        for case, value in (("a", 1.0), ("b", None))
    ]
    (tmp_path / "matrix.json").write_text(json.dumps({"rows": known}))
    monkeypatch.setattr(version_matrix, "RESULTS", tmp_path)
    (row,) = version_matrix.kept(("a",))
    assert row.case == "b" and math.isnan(row.value)
    assert version_matrix.kept(()) == []
