"""The committed results: small enough for a repository, and valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.recording import RESULTS

MAX_BYTES = 300_000  # per file
FILES = sorted(RESULTS.iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_results_file_is_small(file: Path) -> None:
    assert file.stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix == ".json"], ids=lambda file: file.stem)
def test_a_results_file_has_machine_versions_commit_and_rows(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["machine"] and content["versions"] and content["commit"] and content["rows"]
