"""The progress file of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fhopt.errors import FhoptError
from fhopt.inspection.progress_file import FAILED, RUNNING, STOPPED, ProgressFile, ProgressStage, beside, read_progress


def test_the_file_exists_while_a_run_does_and_is_removed_afterwards(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    path = beside(tmp_path / "plan")
    with ProgressFile(path).kept(lambda *step: steps.append(step)) as report:
        report("moments", 1, 4)
        report("moments", 2, 4)
        report("rates", 1, 2)
        found = read_progress(path)
    assert found is not None and found.state == RUNNING and found.process == os.getpid()
    assert [(s.name, s.done, s.total) for s in found.stages] == [("moments", 2, 4), ("rates", 1, 2)]
    assert steps == [("moments", 1, 4), ("moments", 2, 4), ("rates", 1, 2)]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_reason(tmp_path: Path) -> None:
    path = beside(tmp_path / "plan")
    with pytest.raises(FhoptError), ProgressFile(path).kept() as report:
        report("moments", 1, 4)
        raise FhoptError("there is no\ntext")
    found = read_progress(path)
    assert found is not None and (found.state, found.message) == (FAILED, "there is no text")


def test_a_run_refused_at_once_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(FhoptError), ProgressFile(beside(tmp_path / "plan")).kept():
        raise FhoptError("there is no text")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_process_is_gone_was_stopped(tmp_path: Path) -> None:
    path = beside(tmp_path / "plan")
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with pytest.raises(KeyboardInterrupt), ProgressFile(path).kept() as report:
        report("moments", 1, 4)
        raise KeyboardInterrupt
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": RUNNING, "process": int(child.stdout)}))
    found = read_progress(path)
    assert found is not None and found.state == STOPPED


def test_a_missing_or_truncated_file_is_no_progress(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    assert read_progress(path) is None
    path.write_text('{"state": "runn')
    assert read_progress(path) is None


def test_a_run_continues_if_its_progress_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ProgressFile(tmp_path / "file" / "below").kept() as report:
        report("moments", 1, 2)


def test_time_left_is_extrapolated_from_the_first_step() -> None:
    assert ProgressStage("moments", 10, done=1, seconds=5, first_done=1, first_seconds=5).seconds_left is None
    assert ProgressStage("moments", 10, done=4, seconds=11, first_done=1, first_seconds=5).seconds_left == 12
