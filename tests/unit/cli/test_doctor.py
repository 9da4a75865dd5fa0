"""`fhopt doctor` on the command line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_models import call
from text_models import save_text_model, shown_on, start

from fhopt.hardware import this_cpu


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    for name, value in (("SECONDS", 0.0), ("VECTOR", 1 << 20), ("SIDE", 64)):
        monkeypatch.setattr(this_cpu, name, value)
    this_cpu.measured.cache_clear()


def test_json_has_machine_findings_and_model(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path / "model")
    result = call("doctor", str(folder), "--dtype", "float32", "--json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["machine"]["cores"] >= 1 and {one["state"] for one in found["findings"]} <= {"good", "slow", "missing"}
    model = found["model"]
    assert (model["sites"], model["positions"], model["itemsize"]) == (2, 512, 4)
    assert [c["cache"] for c in model["caches"]] == ["exact", "4x", "8x"]
    assert [c["bytes_per_token"] for c in model["caches"]] == [512, 128, 64]


def test_without_a_model_only_the_machine_is_reported() -> None:
    assert json.loads(call("doctor", "--json").stdout)["model"] is None


def test_any_module_has_prospects(importable: str) -> None:
    result = call("doctor", importable)
    assert result.exit_code == 0, result.output
    assert "1; 1 not rewritten, see fhopt explain" in result.stdout and "8x" in result.stdout


@pytest.mark.parametrize(("model", "message"), [("nowhere", "unknown model"), ("json:nothing", "cannot be imported")])
def test_an_invalid_model_gets_one_line(model: str, message: str) -> None:
    result = call("doctor", model)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("doctor")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "No C++ compiler was found" in text and "Install g++ (or clang++)" in text


def test_missing_transformers_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_text_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = call("doctor", str(folder))
    assert result.exit_code == 2 and "pip install 'fhopt[hf]'" in result.stderr


def test_a_terminal_and_a_pipe_are_served() -> None:
    own, other = pty.openpty()
    process = start("doctor", stdout=other, stderr=subprocess.PIPE)
    os.close(other)
    shown = shown_on(own)
    _, errors = process.communicate(timeout=240)
    os.close(own)
    assert process.returncode == 0 and errors == "" and b"memory read" in shown and b"GB/s" in shown
