"""Argument types: values that they accept and refuse, without torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from imports import imported_by

from fhopt.cli import arguments
from fhopt.errors import FhoptError

PLAN = Path(__file__).parents[2] / "golden" / "saved" / "folder" / "plan"


def test_values_are_returned(tmp_path: Path) -> None:
    assert arguments.PLAN.convert(str(PLAN), None, None) == PLAN
    assert arguments.REWRITTEN.convert(str(PLAN.parent), None, None) == PLAN.parent
    assert arguments.DEVICE.convert("here:9999", None, None) == "here:9999"  # checked when it is used
    assert arguments.TEXT.convert("topics", None, None) == "topics"
    assert arguments.TEXT.convert(str(tmp_path), None, None) == str(tmp_path)


def test_a_plan_path_may_not_exist_yet_but_must_not_be_another_file(tmp_path: Path) -> None:
    for path in (tmp_path / "coming", tmp_path):
        assert arguments.COMING_PLAN.convert(str(path), None, None) == path
    os.mkfifo(tmp_path / "plan.json")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FhoptError, match=r"Write a plan with: fhopt fit"):
            arguments.COMING_PLAN.convert(str(path), None, None)


def test_other_values_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for kind, value, reason in (
        (arguments.MODEL, "nowhere", "unknown model"),
        (arguments.PLAN, str(tmp_path), "is not a plan"),
        (arguments.STATISTICS, str(tmp_path / "fifo"), "is a FIFO"),
        (arguments.DEVICE, "x", "device 'x' is unknown"),
        (arguments.TEXT, str(tmp_path / "fifo"), "is a FIFO"),
        (arguments.TEXT, "nothing", "cannot read nothing"),
        (arguments.EXPORTED, str(tmp_path), "is not a rewritten folder"),
    ):
        with pytest.raises(FhoptError, match=reason):
            kind.convert(value, None, None)


def test_the_command_line_needs_no_torch() -> None:
    assert not {"torch", "transformers", "sympy", "networkx"} & imported_by("fhopt.cli")
