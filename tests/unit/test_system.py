"""Folders of the cache."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from attention_cases import CASES, assert_same, expected, inputs

from fhopt.codegen import build
from fhopt.codegen.build import build_torch

BUILD = importlib.import_module("fhopt.codegen.build")  # `fhopt.codegen.build` as an attribute is the function


def test_a_cache_folder_that_cannot_be_written_gives_way_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"  # permissions would not stop a test that runs as root
    blocked.write_text("")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(blocked))
    case = CASES["one token"]
    x = inputs(case)
    with pytest.warns(RuntimeWarning, match=r"cannot be used.*Set FHOPT_CACHE_DIR"):
        kernel = build_torch(case.spec())
    assert_same(kernel(*x, None, **case.options()), expected(case, x, None))


def test_what_is_run_from_the_cache_folder_cannot_be_changed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o002)  # by which folders are open to the group
    try:
        monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "new"))
        BUILD.load_module("made", "x = 1")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_nothing_is_run_from_a_folder_that_others_may_write_to(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fhopt.system._warned", set())
    left = BUILD.load_module("left", "x = 1").__file__
    Path(left).write_text("x = 'of somebody else'")
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        assert BUILD.load_module("left", "x = 1").x == 1


def test_the_working_directory_stays_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(CASES["one token"].spec())
    assert not list(tmp_path.iterdir())
