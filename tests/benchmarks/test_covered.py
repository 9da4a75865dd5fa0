"""The table of what tests cover (benchmarks/covered.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import covered  # noqa: E402


def of_file(statements: int, lines: int, branches: int, taken: int) -> dict[str, Any]:
    counts = dict(num_statements=statements, covered_lines=lines, num_branches=branches, covered_branches=taken)
    return {"summary": counts | {"percent_covered": 1.5}}


def test_percentages_are_of_sums_by_part_and_of_all() -> None:
    files = {
        "fhopt/cli.py": of_file(100, 95, 10, 5),
        "passes/core.py": of_file(50, 50, 4, 4),
        "fhopt/codegen/cpu/attention.py": of_file(40, 20, 0, 0),
        "fhopt/seeing/drawing.py": of_file(10, 9, 6, 3),
    }
    found = {(row.case, row.metric): row.value for row in covered.rows_of(files)}
    assert found["fhopt", "lines"] == 95 and found["passes", "branches"] == 100 and ("codegen", "branches") not in found
    assert found["all", "lines"] == 100 * 174 / 200 and found["all", "branches"] == 100 * 12 / 20
    assert [*dict.fromkeys(case for case, _ in found)] == ["codegen", "fhopt", "passes", "seeing", "all"]
