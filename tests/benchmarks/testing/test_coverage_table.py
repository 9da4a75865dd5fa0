"""The coverage table (benchmarks/testing/coverage_table.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testing import coverage_runs, coverage_table

ROOT = Path(__file__).parents[3]


def of_file(statements: int, lines: int, branches: int, taken: int) -> dict[str, Any]:
    counts = dict(num_statements=statements, covered_lines=lines, num_branches=branches, covered_branches=taken)
    return {"summary": counts | {"percent_covered": 1.5}}


def test_percentages_are_computed_from_sums_by_package_and_overall() -> None:
    files = {
        "fhopt/errors.py": of_file(100, 95, 10, 5),
        "passes/graph/program.py": of_file(50, 50, 4, 4),
        "fhopt/codegen/cpu/attention.py": of_file(30, 15, 0, 0),
        "codegen/cpu/packing.py": of_file(10, 5, 0, 0),
        "fhopt/inspection/drawing.py": of_file(10, 9, 6, 3),
    }
    values = {(row.case, row.metric): row.value for row in coverage_table.rows_of(files) if row.impl == "tests"}
    assert values["fhopt", "lines"] == 95 and values["passes/graph", "branches"] == 100
    assert values["codegen/cpu", "lines"] == 50 and ("codegen/cpu", "branches") not in values
    assert values["all", "lines"] == 100 * 174 / 200 and values["all", "branches"] == 100 * 12 / 20
    names = [*dict.fromkeys(case for case, _ in values)]
    assert names == ["codegen/cpu", "fhopt", "fhopt/inspection", "passes/graph", "all"]


def test_modules_below_the_limit_are_listed_with_the_reason() -> None:
    files = {
        "fhopt/plan/site.py": of_file(10, 9, 0, 0),
        "fhopt/cli/demo.py": of_file(10, 7, 0, 0),
        "passes/pipeline.py": of_file(10, 2, 0, 0),
        "fhopt/texts/__init__.py": of_file(0, 0, 0, 0),
    }
    rows = [row for row in coverage_table.rows_of(files) if row.metric == "lines_of_module"]
    assert [(row.case, row.value) for row in rows] == [("passes/pipeline.py", 20), ("fhopt/cli/demo.py", 70)]
    assert rows[0].impl == coverage_table.UNEXPLAINED and "test-slow" in rows[1].impl


def test_reasons_are_given_for_modules_that_exist() -> None:
    assert [path for path in coverage_table.REASONS if not (ROOT / path).exists()] == []


def test_every_test_file_is_in_one_part_named_after_its_package() -> None:
    known = coverage_runs.parts()
    files = [path for part in known for path in part.paths]
    folders = ("unit", "integration", "robustness", "benchmarks")
    assert sorted(files) == sorted(
        str(path.relative_to(ROOT / "tests")) for name in folders for path in (ROOT / "tests" / name).rglob("test_*.py")
    )
    names = {part.name for part in known}
    assert {"fhopt", "fhopt/plan", "passes/rewrite", "codegen", "codegen/cpu"} <= names and len(names) == len(known)
    assert all((ROOT / name).is_dir() for name in names if not name.endswith(".py"))


def test_a_part_is_measured_again_after_a_change_of_its_package_or_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("fhopt/plan/site.py", "fhopt/errors.py", "tests/unit/plan/test_site.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    monkeypatch.setattr(coverage_runs, "ROOT", tmp_path)
    monkeypatch.setattr(coverage_runs, "FOLDER", tmp_path / "build")
    part = coverage_runs.TestPart("fhopt/plan", ("unit/plan/test_site.py",))
    part.folder.mkdir(parents=True)

    def ended(state: str) -> None:
        about = {"sources": coverage_runs.digests(coverage_runs._sources()), "state": state}
        about["tests"] = coverage_runs.digests([tmp_path / "tests" / path for path in part.paths])
        (part.folder / coverage_runs.STATE).write_text(json.dumps(about))

    assert not coverage_runs.is_current(part) and coverage_runs.kept(part) is None
    ended("interrupted")
    assert not coverage_runs.is_current(part)
    ended("failed")
    assert coverage_runs.kept(part) == coverage_runs.PartRun(part, "failed", 0.0)
    (tmp_path / "fhopt" / "errors.py").write_text("changed")
    assert coverage_runs.is_current(part)
    for path in ("fhopt/plan/site.py", "tests/unit/plan/test_site.py"):
        (tmp_path / path).write_text("changed")
        assert not coverage_runs.is_current(part)
        ended("passed")


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_interrupted() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert coverage_runs._wait(child, 0.1) == "interrupted" and child.returncode is not None


def test_problems_are_reported() -> None:
    rows = coverage_table.rows_of({"fhopt/errors.py": of_file(100, 95, 0, 0)})
    assert coverage_table.problems(rows, [], []) == []
    failed, waiting = coverage_table.problems(rows, ["fhopt/plan"], ["fhopt/ops", "fhopt"])
    assert "fhopt/plan" in failed and waiting.startswith("2 parts are not measured to the end: fhopt/ops, fhopt.")
