"""Statistics files, recognized by their description."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from imports import imported_by

from fhopt.calibration.statistics_header import check_file, check_statistics
from fhopt.errors import FhoptError


def written(path: Path, about: object, tail: bytes = b"") -> Path:
    header = json.dumps({"__metadata__": {"fhopt": json.dumps(about)}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + tail)
    return path


def test_a_description_is_returned(tmp_path: Path) -> None:
    about = {"levels": [2], "version": 1}
    assert check_statistics(written(tmp_path / "a", about)) == about
    check_file(tmp_path / "a")
    check_file(tmp_path / "new")


@pytest.mark.parametrize(
    ("about", "tail", "reason"),
    [
        ({"version": 1}, b"", "has no statistics"),
        ({"levels": [], "version": 3}, b"", "has statistics version 3"),
        ({"levels": [], "version": 1}, b"more", "is damaged"),
        ([1], b"", "has no statistics"),
    ],
)
def test_other_files_are_refused(about: object, tail: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match=reason):
        check_statistics(written(tmp_path / "a", about, tail))


def test_a_file_other_than_statistics_is_not_overwritten(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "notes").write_text("years of work")
    for name in ("fifo", "notes"):
        with pytest.raises(FhoptError, match="exists and is not a statistics file"):
            check_file(tmp_path / name)


def test_it_needs_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.calibration.statistics_header")
